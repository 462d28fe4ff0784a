"""Word error rate over the training time of a whole run, and on its test manifests at the end.

python -m benchmarks.convergence --config configs/digits.yaml --json      # RAYTRAIN_DATA_ROOT names the corpora

A finished run (in RAYTRAIN_RUN_ROOT) is not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._record import record
from raytrain.config import Config, load_config
from raytrain.console import Console
from raytrain.stages.pipeline import run_pipeline


def curve(config: Config) -> dict[str, Any]:
    """Validation WER and training loss of the run, and its test scores."""
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_bytes().splitlines()]
    checks = [line for line in lines if "wer" in line]
    steps = [line for line in lines if "loss" in line]
    scores = json.loads((config.run_dir / "scores.json").read_bytes())["body"]
    return {
        "config": config.name,
        "workers": config.train.most_workers,
        "steps": steps[-1]["step"],
        "training_minutes": round(checks[-1]["time_s"] / 60, 2),
        "audio_hours": round(steps[-1]["audio_hours"], 2),
        "test_wer": scores["wer"],
        "test_utterances": scores["utterances"],
        "validation": [
            {
                "step": entry["step"],
                "minutes": round(entry["time_s"] / 60, 2),
                "wer": round(entry["wer"], 5),
                "val_loss": round(entry["val_loss"], 4),
            }
            for entry in checks
        ],
        "training": [
            {"step": entry["step"], "loss": round(entry["loss"], 4), "lr": round(entry["lr"], 7)}
            for entry in steps[:: len(steps) // 60 + 1]
        ],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """The curve as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    minutes = [entry["minutes"] for entry in result["validation"]]
    axes.plot(minutes, [100 * entry["wer"] for entry in result["validation"]], marker="o", color="#2f6db5")
    axes.axhline(100 * result["test_wer"], color="#d9762b", ls="--", label=f"test WER {result['test_wer']:.1%}")
    axes.set(xlabel="training (minutes)", ylabel="validation WER (%)", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/digits.yaml"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    run_pipeline(config, Console(quiet=arguments.json))
    result = curve(config)
    path = record(f"convergence_{config.name}", result, as_json=arguments.json)
    draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
