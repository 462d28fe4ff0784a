"""Loss curves with a bf16 residual stream beside those of autocast, whose residual stream is float32.

    python -m benchmarks.precision_curve --corpus ../shared/corpora/digits-en --json

Trains `configs/digits.yaml`'s model, without augmenting audio, from each seed in each order of operations: `stream`
(bf16 from the features on), `autocast` (NeMo's, see `_autocast`) and, if asked for, `fp32`. A seed gives initial
weights, batches and random numbers of each step, the same in every order. A curve is the mean loss per token over each
window of 25 steps. The band at a window reaches from the least to the largest of autocast's curves over seeds, widened
by nothing: if an order's curves are drawn from the same distribution, each of three new ones leaves it at times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks._autocast import autocast_order
from benchmarks._record import record
from raytrain.config import load_config
from raytrain.data.audio import read_audio
from raytrain.data.batch import SpeechBatch
from raytrain.data.text.prompt import prompt_ids
from raytrain.data.text.tokenizer import train_tokenizer
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.optim import learning_rate, make_optimizer, set_learning_rate
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

ORDERS = ("autocast", "stream", "fp32")
WINDOW = 25  # steps
_CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
_STEPS = 300
_POOL = 8  # batches that are sorted by duration together

Curve = list[float]


# --- the corpus


@dataclass(frozen=True)
class Corpus:
    """Utterances of a manifest: audio, sequences of tokens by a tokenizer trained on their texts."""

    audios: list[np.ndarray]
    tokens: list[list[int]]
    prompt_length: int
    pad_id: int
    vocab_size: int

    @classmethod
    def read(cls, folder: Path, model: ModelConfig, num_pieces: int, longest: float) -> Corpus:
        """The utterances of `folder`/train.jsonl up to `longest` seconds. Exits with a message if it isn't there."""
        manifest = folder / "train.jsonl"
        if not manifest.is_file():
            sys.exit(
                f"{manifest} is not a file; allowed: a folder with train.jsonl (NeMo's manifest) and its audio; "
                "to do: name the digits corpus with --corpus"
            )
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        rows = [row for row in rows if row["duration"] <= longest]
        tokenizer = train_tokenizer({"en": [row["text"] for row in rows]}, num_pieces)
        prompt = prompt_ids(tokenizer, "en", "en", prompt_format=model.prompt_format, pnc=False)
        audios = [read_audio(str(folder / row["audio_filepath"]), sample_rate=model.sample_rate) for row in rows]
        tokens = [[*prompt, *tokenizer.encode_text(row["text"], "en"), tokenizer.eos_id] for row in rows]
        return cls(audios, tokens, len(prompt), tokenizer.pad_id, tokenizer.vocab_size)

    def batches(self, size: int, seed: int) -> Iterator[SpeechBatch]:
        """Endless batches of similar durations, in an order that the seed gives."""
        rng, lengths = random.Random(seed), list(map(len, self.audios))
        while True:
            order = rng.sample(range(len(lengths)), len(lengths))
            for first in range(0, len(order) - size * _POOL + 1, size * _POOL):
                pool = sorted(order[first : first + size * _POOL], key=lengths.__getitem__)
                for start in rng.sample(range(0, len(pool), size), _POOL):
                    yield self._batch(pool[start : start + size])

    def _batch(self, rows: list[int]) -> SpeechBatch:
        audios, tokens = [self.audios[row] for row in rows], [self.tokens[row] for row in rows]
        return SpeechBatch.collate(audios, tokens, [self.prompt_length] * len(rows), pad_id=self.pad_id)


# --- training


@dataclass(frozen=True)
class Recipe:
    """What all runs share."""

    corpus: Corpus
    model: ModelConfig
    settings: TrainSettings
    batch_size: int

    def losses(self, order: str, seed: int) -> list[float]:
        """Loss per token of each step."""
        torch.manual_seed(seed)
        model, losses = Canary(self.model).train(), []
        optimizer, batches = make_optimizer(model, self.settings), self.corpus.batches(self.batch_size, seed)
        with _ordered(model, order) as wrapped:
            for step in range(1, self.settings.max_steps + 1):
                set_learning_rate(optimizer, learning_rate(step, self.settings))
                result = train_step(
                    wrapped,
                    [next(batches)],
                    optimizer,
                    self.settings,
                    precision="fp32" if order == "fp32" else "bf16",
                    seeds=[hash((seed, step, 0)) & 0x7FFF_FFFF],
                )
                losses.append(float(result.sums[0] / result.sums[3]) if not result.skipped else float("nan"))
        return losses


def _ordered(model: Canary, order: str) -> contextlib.AbstractContextManager[nn.Module]:
    return autocast_order(model) if order == "autocast" else contextlib.nullcontext(model)


def recipe(folder: Path, steps: int, batch_size: int, longest: float) -> Recipe:
    """The digits configuration's model and settings, with a schedule that fits into `steps`; of utterances up to
    `longest` seconds."""
    config = load_config(_CONFIG)
    corpus = Corpus.read(folder, config.model, config.tokenizer.vocab_size, longest)
    if (least := batch_size * _POOL) > len(corpus.audios):
        sys.exit(
            f"{folder} has {len(corpus.audios)} utterances up to {longest} s; a batch of {batch_size} needs {least}"
        )
    settings = replace(config.train, max_steps=steps, warmup_steps=max(1, steps // 6), average_decay=None)
    model = replace(config.model, vocab_size=corpus.vocab_size, ctc_head=settings.ctc_weight > 0)
    return Recipe(corpus, model, settings, batch_size)


# --- curves


def smoothed(losses: list[float], window: int = WINDOW) -> Curve:
    """Means over consecutive windows of steps."""
    return [round(statistics.fmean(losses[end - window : end]), 4) for end in range(window, len(losses) + 1, window)]


def compared(curves: dict[int, Curve], reference: dict[int, Curve]) -> dict[str, Any]:
    """How an order's curves by seed lie relative to the band of the reference's.

    `above` and `below` count the points outside of it, with the largest distances in nats; `paired` are mean and
    largest absolute difference from the reference's curve of the same seed, `mean_curve_outside` counts windows
    whose mean over seeds is outside.
    """
    low, high = (list(map(pick, zip(*reference.values(), strict=True))) for pick in (min, max))
    band = list(zip(low, high, strict=True))
    above = [value - top for curve in curves.values() for value, (_, top) in zip(curve, band, strict=True)]
    below = [bottom - value for curve in curves.values() for value, (bottom, _) in zip(curve, band, strict=True)]
    differences = [
        value - expected
        for seed in curves.keys() & reference.keys()
        for value, expected in zip(curves[seed], reference[seed], strict=True)
    ]
    means = map(statistics.fmean, zip(*curves.values(), strict=True))
    return {
        "points": len(above),
        "above": sum(excess > 0 for excess in above),
        "most_above": round(max(0.0, *above), 4),
        "below": sum(excess > 0 for excess in below),
        "most_below": round(max(0.0, *below), 4),
        "mean_curve_outside": sum(not bottom <= mean <= top for mean, (bottom, top) in zip(means, band, strict=True)),
        "mean_band_width": round(statistics.fmean(top - bottom for bottom, top in band), 4),
        "paired_mean": round(statistics.fmean(differences), 4),
        "paired_most": round(max(map(abs, differences)), 4),
    }


def measure(shared: Recipe, orders: list[str], seeds: list[int]) -> dict[str, Any]:
    """Curves of each order and seed, and how those of the other orders lie relative to autocast's."""
    curves: dict[str, dict[int, Curve]] = {order: {} for order in orders}
    seconds: dict[str, float] = dict.fromkeys(orders, 0.0)
    for seed in seeds:
        for order in orders:
            start = time.perf_counter()
            curves[order][seed] = smoothed(shared.losses(order, seed))
            seconds[order] += time.perf_counter() - start
            print(f"{order} {seed}: {curves[order][seed]} {seconds[order]:.0f} s", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "utterances": len(shared.corpus.audios),
        "batch_size": shared.batch_size,
        "steps": shared.settings.max_steps,
        "window": WINDOW,
        "seconds": {order: round(taken) for order, taken in seconds.items()},
        "curves": curves,
    }
    for order in orders:
        if order != "autocast" and "autocast" in orders:
            result[f"{order} beside autocast"] = compared(curves[order], curves["autocast"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("../shared/corpora/digits-en"), help="with train.jsonl")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["autocast", "stream"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=_STEPS)
    parser.add_argument("--batch-size", type=int, default=16, help="utterances")
    parser.add_argument("--longest", type=float, default=6.0, help="utterances, in seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shared = recipe(arguments.corpus, arguments.steps, arguments.batch_size, arguments.longest)
    theme = "precision_curve" if arguments.steps == _STEPS else f"precision_curve_{arguments.steps}_steps"
    record(theme, measure(shared, arguments.orders, arguments.seeds), as_json=arguments.json)


if __name__ == "__main__":
    main()
