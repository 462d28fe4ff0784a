"""The paper's batching schemes: predicted for a corpus' lengths, or trained under a configuration.

python -m benchmarks.ablation --manifest manifest.jsonl --json              # canary-1b and canary-1b-flash on 80 GiB
python -m benchmarks.ablation --config configs/digits-ablation.yaml --json  # RAYTRAIN_DATA_ROOT names the corpora

A finished ablation (in RAYTRAIN_RUN_ROOT) is not trained again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._record import record
from raytrain.config import check_config, load_config
from raytrain.console import Console
from raytrain.experiments.ablate import PredictOptions, predict_ablation, run_ablation
from raytrain.model.formats.published import PUBLISHED


def predicted(manifest: Path, vocabulary: int) -> dict[str, Any]:
    """All schemes for the two large models, with a tokenizer trained on the manifest's texts."""
    with tempfile.TemporaryDirectory() as folder:
        config = check_config(
            {
                "name": "benchmark",
                "run": {"root": folder},
                "data": {"train": [str(manifest.absolute())]},
                "tokenizer": {"vocab_size": vocabulary},
            }
        )
        models = {name: PUBLISHED[name] for name in ("canary-1b", "canary-1b-flash")}
        body = asdict(predict_ablation(config, Console(), models, PredictOptions()))
    result: dict[str, Any] = {"utterances": body["utterances"], "hours": round(body["hours"], 1)}
    for name, model in body["models"].items():
        rows = {row["scheme"]: row for row in model["schemes"]}
        result[name] = {
            "schemes": [_short(row) for row in model["schemes"]],
            "gpu_plans": [_short(plan) for plan in model["gpu_plans"]],
            "D_over_A": round(rows["D"]["mean_batch"] / rows["A"]["mean_batch"], 2),
            "memory_fit_error": round(model["memory_fit_error"], 4),
        }
    return result


def trained(path: Path) -> dict[str, Any]:
    """The result of `raytrain ablate`, without individual steps."""
    ablation = run_ablation(load_config(path), Console())
    times = {trial.scheme: trial.seconds_to_target for trial in ablation.best_trials()}
    body = asdict(ablation)
    result = {**body, "schemes": [_short(row) for row in body["schemes"]]}
    del result["random_batch"]
    result["trials"] = [_short(trial) for trial in body["trials"]]
    if times.get("R") and times.get("D+"):
        result["D+_time_over_R"] = round(times["D+"] / times["R"], 3)
    return result


def _short(row: dict[str, Any]) -> dict[str, Any]:
    left_out = ("memory_trace", "title")
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in row.items()
        if name not in left_out
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--manifest", type=Path, help="predict for the lengths of a NeMo manifest")
    what.add_argument("--config", type=Path, help="train")
    parser.add_argument("--vocabulary", type=int, default=256, help="of the tokenizer, with --manifest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.manifest:
        record("ablation_predicted", predicted(arguments.manifest, arguments.vocabulary), as_json=arguments.json)
    else:
        record(f"ablation_{arguments.config.stem}", trained(arguments.config), as_json=arguments.json)


if __name__ == "__main__":
    main()
