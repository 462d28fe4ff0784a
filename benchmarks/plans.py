"""Padding and padded compute of every policy on a manifest, and the time that planning takes.

python -m benchmarks.plans --manifest manifest.jsonl --tokenizer spe.model --json
python -m benchmarks.plans --json                  # a drawn mix of lengths instead
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import orjson

from benchmarks._models import config_of
from benchmarks._record import record
from benchmarks.padding import draw_lengths
from raytrain.lengths import BucketSettings, LengthHistogram
from raytrain.lengths.compare import compare_policies
from raytrain.model.cost import cost_of


def read_lengths(manifest: Path, tokenizer: Path, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Durations in ms and tokens with a prompt of `prompt` and the end of text, (N,) each."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    durations, texts = [], []
    with open(manifest, "rb") as file:
        for line in file:
            row = orjson.loads(line)
            durations.append(int(np.ceil(round(row["duration"] * 1000, 6))))
            texts.append(row["text"])
    tokens = [len(ids) + prompt + 1 for ids in processor.encode(texts, num_threads=2)]
    return np.array(durations), np.array(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, help="NeMo JSONL")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model")
    parser.add_argument("--utterances", type=int, default=400_000, help="how many to draw without a manifest")
    parser.add_argument("--model", default="canary-1b", help="whose costs count: a name in configs/")
    parser.add_argument("--durations", type=int, default=30)
    parser.add_argument("--split", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.manifest:
        lengths = read_lengths(arguments.manifest, arguments.tokenizer, prompt=9)
    else:
        lengths = draw_lengths(arguments.utterances, seed=1)
    histogram = LengthHistogram.from_lengths(*lengths)
    settings = BucketSettings(arguments.durations, arguments.split, max_tokens=arguments.max_tokens)
    rows = compare_policies(histogram, settings, cost_of(config_of(arguments.model)))
    result = {row.policy: {key: value for key, value in asdict(row).items() if key != "policy"} for row in rows}
    equal, best = rows[2].padded_compute, rows[-1].padded_compute
    # Compute that goes into padding, against the useful compute, which is the same for all.
    less = 1 - (best / (1 - best)) / (equal / (1 - equal))
    summary = {"utterances": histogram.total, "by_need_pads_less_than_equal_mass": round(less, 4)}
    record("plans", {**summary, "policies": result}, as_json=arguments.json)


if __name__ == "__main__":
    main()
