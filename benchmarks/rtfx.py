"""RTFx (audio-seconds per second) of encoder, decoder and both, by model, precision, batch and length of text.

    python -m benchmarks.rtfx --models canary-1b canary-1b-flash --precisions fp32 int8 --batches 1 4

Models alternate within a round, so that other load on the machine affects all of them alike, and each part's fastest
round counts, since it was disturbed least. Weights are random and greedy search ends after a given number of tokens,
the same in every model: `--tokens-per-second` of audio, excluding prompt and end (English has 3 to 4 with 1024 pieces).
On a GPU the decoder is timed with and without CUDA graphs. `flash_times_faster_than_1b` compares the two at equal
length of text.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks._models import random_parts
from benchmarks._record import record
from benchmarks.decode import Decoding, seconds_of
from raytrain.decoding.graphs import VARIABLE
from raytrain.decoding.greedy import greedy_search
from raytrain.decoding.precision import prepare_for_inference
from raytrain.decoding.steps import PromptGroup
from raytrain.model.formats.portable import ModelParts
from raytrain.model.linear import PRECISIONS

MODELS = ("canary-1b", "canary-1b-flash", "canary-180m-flash", "canary-tiny")


class Utterances(Decoding):
    """A batch whose texts have `tokens` tokens, whatever the number of frames."""

    tokens = 0

    @torch.inference_mode()
    def search(self) -> list[int]:
        limits = torch.full_like(self.sizes, self.tokens)
        states, lengths = self.states
        group = PromptGroup(states, lengths, self.prompts, limits)
        hypotheses = greedy_search(self.model, group, self.eos, self.settings.length_penalty)
        self._wait()
        return [len(hypothesis.ids) for hypothesis in hypotheses]


def load(name: str, precision: str, device: str) -> tuple[ModelParts, torch.nn.Module]:
    """A random model, and its parts without the weights, which are packed in the model."""
    parts = random_parts(name, device=device)
    model = prepare_for_inference(parts.build(), precision, torch.device(device))
    return replace(parts, state={}), model


def measure(runs: dict[str, Utterances], tokens: int, audio_seconds: float, rounds: int) -> dict[str, dict[str, Any]]:
    """By model, the fastest round; models alternate within each round."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            run.tokens = tokens
            timings = {"encoder": seconds_of(run.encode), **_searches(run)}
            for part, value in timings.items() if number else ():  # the first round warms up
                times[name].setdefault(part, []).append(value)
            assert set(run.search() if not number else [tokens]) == {tokens}
    return {name: _figures(parts, tokens, audio_seconds) for name, parts in times.items()}


def _searches(run: Utterances) -> dict[str, float]:
    if run.device != "cuda":
        return {"decoder": seconds_of(run.search)}
    timings = {}
    for key, value in (("decoder", "1"), ("decoder_without_graphs", "0")):
        with _environment(VARIABLE, value):
            timings[key] = seconds_of(run.search)
    return timings


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _figures(times: dict[str, list[float]], tokens: int, audio_seconds: float) -> dict[str, Any]:
    fastest = {part: min(values) for part, values in times.items()}
    encoder, decoder = fastest["encoder"], fastest["decoder"]
    return {
        "tokens": tokens,
        **{f"{part}_ms": round(1000 * value, 1) for part, value in fastest.items()},
        "ms_per_token": round(1000 * decoder / tokens, 2),
        "encoder_rtfx": round(audio_seconds / encoder, 2),
        "decoder_rtfx": round(audio_seconds / decoder, 2),
        "rtfx": round(audio_seconds / (encoder + decoder), 2),
    }


def times_faster(timings: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """canary-1b-flash over canary-1b, if both were measured."""
    if not {"canary-1b", "canary-1b-flash"} <= timings.keys():
        return None
    flash, deep = timings["canary-1b-flash"], timings["canary-1b"]
    return {
        "whole": round(flash["rtfx"] / deep["rtfx"], 2),
        "decoder": round(flash["decoder_rtfx"] / deep["decoder_rtfx"], 2),
        "encoder": round(flash["encoder_rtfx"] / deep["encoder_rtfx"], 2),
    }


def measure_all(arguments: Any) -> dict[str, Any]:
    """Every precision with all models in memory at once, in every shape."""
    result: dict[str, Any] = {"threads": arguments.threads, "flash_times_faster_than_1b": {}}
    for precision in arguments.precisions:
        models = {name: load(name, precision, arguments.device) for name in arguments.models}
        for seconds in arguments.seconds:
            for batch in arguments.batches:
                settings = argparse.Namespace(device=arguments.device, seconds=seconds, delta=1)
                runs = {name: Utterances(parts, batch, 1, settings, model) for name, (parts, model) in models.items()}
                for rate in arguments.tokens_per_second:
                    tokens = max(1, round(rate * seconds))
                    timings = measure(runs, tokens, batch * seconds, arguments.rounds)
                    shape = f"{precision} {batch} x {seconds:g} s {tokens} tokens"
                    result |= {f"{name} {shape}": figures for name, figures in timings.items()}
                    if ratio := times_faster(timings):
                        result["flash_times_faster_than_1b"][shape] = ratio
        del models, runs
        gc.collect()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["canary-tiny"], choices=MODELS)
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=PRECISIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--seconds", nargs="+", type=float, default=[5.0], help="lengths of utterances")
    parser.add_argument("--tokens-per-second", nargs="+", type=float, default=[4.0], help="of audio, in the text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record("rtfx", measure_all(arguments), as_json=arguments.json, device=arguments.device)


if __name__ == "__main__":
    main()
