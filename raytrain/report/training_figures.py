"""Training curves from the lines of `metrics.jsonl`: loss, error rate, learning rate, batch size, memory."""

from __future__ import annotations

from collections.abc import Sequence

from raytrain.report.figures import Figure, curve
from raytrain.report.views import Metrics


def training_figures(metrics: Sequence[Metrics]) -> list[Figure]:
    """A figure per metric in the lines."""
    steps = [line for line in metrics if "loss" in line]
    validations = [line for line in metrics if "wer" in line]
    return [
        *(_loss(metrics, steps) if steps else ()),
        *(_error_rates(validations) if validations else ()),
        *_learning_rate(steps),
        *_batch_size(steps),
        *_memory(steps),
    ]


def _loss(metrics: Sequence[Metrics], steps: Sequence[Metrics]) -> list[Figure]:
    first, last = steps[0], steps[-1]
    went = "fell" if last["loss"] < first["loss"] else "did not fall: it went"
    sentence = (
        f"The training loss {went} from {first['loss']:.2f} to {last['loss']:.2f} per token in {last['step']} steps."
    )
    labels = {"loss": "training", "val_loss": "validation (cross-entropy)"}
    return [curve("Loss", metrics, labels, "loss per token", sentence)]


def _error_rates(validations: Sequence[Metrics]) -> list[Figure]:
    best = min(validations, key=lambda line: line["wer"])
    sentence = f"The lowest validation WER is {best['wer']:.1%}, at step {best['step']}"
    later = f"{sentence}, after {best['time_s'] / 60:.1f} minutes."
    labels = {"wer": "validation WER"}
    return [
        curve("WER by step", validations, labels, "WER (%)", f"{sentence}.", percent=True),
        curve("WER by wall time", validations, labels, "WER (%)", later, by="time_s", scale=1 / 60, percent=True),
    ]


def _learning_rate(steps: Sequence[Metrics]) -> list[Figure]:
    rates = [line for line in steps if "lr" in line]
    if not rates:
        return []
    top = max(rates, key=lambda line: line["lr"])
    sentence = f"The learning rate peaks at {top['lr']:.1e} at step {top['step']} and ends at {rates[-1]['lr']:.1e}."
    return [curve("Learning rate", steps, {"lr": "learning rate"}, "learning rate", sentence)]


def _batch_size(steps: Sequence[Metrics]) -> list[Figure]:
    sizes = [line["batch_size"] for line in steps if "batch_size" in line]
    if not sizes:
        return []
    sentence = f"A step averages {sum(sizes) / len(sizes):.1f} utterances over all workers."
    labels = {"batch_size": "utterances over all workers"}
    return [curve("Batch size", steps, labels, "utterances per step", sentence)]


def _memory(steps: Sequence[Metrics]) -> list[Figure]:
    peaks = [line["memory_gib"] for line in steps if "memory_gib" in line]
    if not peaks:
        return []
    sentence = f"The first worker's memory peaked at {max(peaks):.2f} GiB."
    return [curve("Memory", steps, {"memory_gib": "peak of worker 0"}, "GiB", sentence)]
