"""Padding and padded compute of every policy on a manifest, the planning time, and the gain from finer candidate edges.

python -m benchmarks.plans --manifest manifest.jsonl --tokenizer spe.model --json
python -m benchmarks.plans --json                  # a drawn mix of lengths instead
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._models import config_of
from benchmarks._record import record
from benchmarks.padding import draw_lengths
from raytrain.lengths import BucketPlan, BucketSettings, LengthHistogram, make_plan
from raytrain.lengths.compare import compare_policies
from raytrain.lengths.cost import CostModel
from raytrain.lengths.optimal import NUM_CANDIDATES, optimal_rows, optimal_token_edges
from raytrain.model.cost import cost_of

FINER = (400, 80)  # durations and tokens
SAMPLE = 2000


class WordTokens(dict):
    """Tokens of a word, counted once per distinct word."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self.processor.encode(word))
        return number


def read_lengths(manifest: Path, tokenizer: Path, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Durations in ms and tokens with a prompt of `prompt` and the end of text, (N,) each.

    Token counts add up over words if no piece of the tokenizer crosses a space: the first `SAMPLE` texts and every
    thousandth text are encoded as a whole, and a difference raises `ValueError`.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    by_word = WordTokens(processor)
    durations, tokens = array("q"), array("q")
    with open(manifest, "rb") as file:
        for number, line in enumerate(file):
            row = orjson.loads(line)
            found = sum(map(by_word.__getitem__, row["text"].split()))
            if (number < SAMPLE or number % 1000 == 0) and found != len(processor.encode(row["text"])):
                raise ValueError(f"line {number + 1}: the tokens of its words do not add up to those of the text")
            durations.append(int(np.ceil(round(row["duration"] * 1000, 6))))
            tokens.append(found + prompt + 1)
    return np.array(durations), np.array(tokens)


def least_cost(histogram: LengthHistogram, cost: CostModel, num_cells: int, number: tuple[int, int]) -> float:
    """Least total cost in at most `num_cells` cells, with `number` candidates of durations and tokens."""
    rows = optimal_rows(histogram, cost, num_cells, num_candidates=number)
    index = np.searchsorted([row.max_duration_ms for row in rows], histogram.cells)
    total = 0.0
    for place, row in enumerate(rows):
        tokens, counts = histogram.tokens[index == place], histogram.counts[index == place]
        edges = optimal_token_edges(tokens, counts, row.max_duration_ms, cost, row.num_token_buckets)
        padded = edges[np.searchsorted(edges, tokens)]
        total += float((counts * cost.of(np.full(len(tokens), row.max_duration_ms), padded)).sum())
    return total


def nearness(histogram: LengthHistogram, plan: BucketPlan, cost: CostModel, num_cells: int) -> dict[str, Any]:
    """Padded compute of `num_cells` cells by need for the utterances of `plan`, with the candidates that planning
    uses and with finer ones."""
    kept = histogram.select(plan.assign(histogram.cells, histogram.tokens)[0] >= 0)
    real = float((kept.counts * cost.of(kept.cells, kept.tokens)).sum())
    return {
        f"padded_compute_of_{durations}x{tokens}": round(
            1 - real / least_cost(kept, cost, num_cells, (durations, tokens)), 6
        )
        for durations, tokens in (NUM_CANDIDATES, FINER)
    }


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
    cost, num_cells = cost_of(config_of(arguments.model)), arguments.durations * arguments.split
    rows = compare_policies(histogram, settings, cost)
    result = {row.policy: {key: value for key, value in asdict(row).items() if key != "policy"} for row in rows}
    by_need = replace(settings, policy="optimal", num_cells=num_cells)
    plan = make_plan(histogram, by_need, "", cost)
    start = time.perf_counter()
    make_plan(histogram, replace(by_need, num_cells=120), "", cost)
    seconds_120 = time.perf_counter() - start
    equal, best = rows[2].padded_compute, rows[-1].padded_compute
    summary = {
        "utterances": histogram.total,
        "model": arguments.model,
        # Relative to the useful compute, which is the same except for the few utterances that only one policy rejects.
        "less_padding_compute_than_equal_mass": round(1 - (best / (1 - best)) / (equal / (1 - equal)), 4),
        "less_total_compute_than_equal_mass": round(1 - (1 - equal) / (1 - best), 4),
        "less_total_compute_without_any_padding": equal,
        "seconds_for_120_cells": round(seconds_120, 3),
        "by_need_by_candidates": nearness(histogram, plan, cost, num_cells),
    }
    record("plans", {**summary, "policies": result}, as_json=arguments.json)


if __name__ == "__main__":
    main()
