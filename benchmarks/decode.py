"""Decoding speed by model, batch and beam, as RTFx: audio-seconds per second.

    python -m benchmarks.decode --models canary-1b canary-1b-flash --batches 1 4 --beams 1 4
    python -m benchmarks.decode --models canary-tiny --nemo-python nemo-venv/bin/python

Weights are random and the end of text has probability zero: every utterance gets the same number of tokens in every
model. `rtfx` covers encoder and decoder, `decoder_ms` only the search. NeMo decodes with the same weights, with its
greedy strategy and with beam 1, alternating with ours; the faster of its two counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks._peer import Peer, in_turn
from benchmarks._record import record
from benchmarks.train_step import parts_of, peer_of
from raytrain.data.text.prompt import prompt_ids
from raytrain.data.text.tokenizer import CanaryTokenizer
from raytrain.decoding.search import decode
from raytrain.decoding.settings import DecodeSettings
from raytrain.model.formats.portable import ModelParts


class Decoding:
    """One model and one batch of noise; `encode` and `search` are timed. `model` is that of `parts` if it is built."""

    def __init__(
        self, parts: ModelParts, batch: int, beam: int, arguments: Any, model: torch.nn.Module | None = None
    ) -> None:
        tokenizer = CanaryTokenizer(parts.tokenizers)
        self.eos, self.device, seconds = tokenizer.eos_id, arguments.device, arguments.seconds
        device = self.device
        self.prompt = prompt_ids(tokenizer, "en", "en", prompt_format=parts.config.prompt_format)
        # The cap includes the prompt, whose length differs between formats; the texts should be equally long.
        self.delta = arguments.delta + len(self.prompt)
        self.settings = DecodeSettings(beam_size=beam, max_generation_delta=self.delta)
        self.model = parts.build().to(device) if model is None else model
        torch.manual_seed(0)
        self.audio = torch.randn(batch, int(seconds * parts.config.sample_rate), device=device)
        self.lengths = torch.full((batch,), self.audio.shape[1], device=device)
        self.prompts = torch.tensor([self.prompt] * batch, device=device)
        self.sizes = torch.full((batch,), len(self.prompt), device=device)

    @torch.inference_mode()
    def encode(self) -> None:
        self.states = self.model.encode(self.audio, self.lengths)
        self._wait()

    @torch.inference_mode()
    def search(self) -> list[int]:
        hypotheses = decode(self.model, *self.states, self.prompts, self.sizes, self.eos, self.settings)
        self._wait()
        return [len(beam[0].ids) for beam in hypotheses]

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median seconds."""
    return statistics.median(seconds_of(work) for _ in range(rounds))


def measure(parts: ModelParts, batch: int, beam: int, arguments: Any, peer: Peer | None) -> dict[str, Any]:
    run = Decoding(parts, batch, beam, arguments)
    run.encode()
    tokens = run.search()
    encoder, decoder = timed(run.encode, arguments.rounds), timed(run.search, arguments.rounds)
    row = {
        "tokens": tokens[0],
        "encoder_ms": round(1000 * encoder, 1),
        "decoder_ms": round(1000 * decoder, 1),
        "rtfx": round(batch * arguments.seconds / (encoder + decoder), 2),
    }
    if peer is not None:
        for strategy in ("greedy", "beam") if beam == 1 else ("beam",):
            answer = peer.ask(
                do="decode",
                batch=batch,
                seconds=arguments.seconds,
                beam=beam,
                delta=run.delta,
                strategy=strategy,
                prompt=run.prompt,
            )
            compared = in_turn(run.search, lambda: peer.ask(do="run")["seconds"], arguments.rounds)
            row[f"nemo_{strategy}"] = {"tokens": answer["result"][0], **compared}
        row["times_faster_than_nemo"] = min(
            value["times_faster"] for key, value in row.items() if key.startswith("nemo_")
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["canary-tiny"], help="names in configs/, or paths of models")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--beams", nargs="+", type=int, default=[1])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each utterance")
    parser.add_argument("--delta", type=int, default=40, help="tokens of text beyond the number of encoder frames")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nemo-python", type=Path, help="Python of an environment that has nemo_toolkit[asr]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.nemo_python:
        arguments.device = "cpu"  # NeMo runs on the CPU
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"threads": arguments.threads, "seconds": arguments.seconds}
    for name in arguments.models:
        parts = parts_of(name)
        label = Path(name).parent.name if Path(name).exists() else name
        with peer_of(parts, arguments.nemo_python) as peer:
            if peer is not None:
                result["peer"] = peer.versions
            for batch in arguments.batches:
                for beam in arguments.beams:
                    result[f"{label} batch {batch} beam {beam}"] = measure(parts, batch, beam, arguments, peer)
    flash, deep = (
        result.get(f"{name} batch {max(arguments.batches)} beam 1") for name in ("canary-1b-flash", "canary-1b")
    )
    if flash and deep:
        result["flash_times_faster_than_1b"] = round(flash["rtfx"] / deep["rtfx"], 2)
    record(
        "decode_beside_nemo" if arguments.nemo_python else "decode",
        result,
        as_json=arguments.json,
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
