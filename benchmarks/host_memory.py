"""Resident memory of CPU training steps with random shapes, by the capacity of oneDNN's primitive cache."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys

from benchmarks._record import record

CAPACITIES = ("1024", "64", "16")


def measure(steps: int) -> list[int]:
    """MiB resident after every 30 steps; runs in a separate process, since the cache is per process."""
    import psutil
    import torch

    from raytrain.data.batch import SpeechBatch
    from raytrain.model.canary import Canary
    from raytrain.model.config import ModelConfig
    from raytrain.training.optim import make_optimizer
    from raytrain.training.settings import TrainSettings
    from raytrain.training.step import train_step

    torch.set_num_threads(1)
    config = ModelConfig(
        encoder_layers=2,
        encoder_width=144,
        encoder_heads=4,
        subsampling_channels=48,
        decoder_layers=1,
        decoder_width=144,
        decoder_heads=4,
        vocab_size=100,
        ctc_head=True,
    )
    settings = TrainSettings(ctc_weight=0.5)
    model = Canary(config).train()
    optimizer = make_optimizer(model, settings)
    rng, seen = random.Random(0), []
    for step in range(steps + 1):
        batch = SpeechBatch.synthetic(8, rng.randint(500, 4000), rng.randint(12, 24), vocab=100, device="cpu")
        train_step(model, [batch], optimizer, settings, precision="fp32")
        if step % 30 == 0:
            seen.append(round(psutil.Process().memory_info().rss / 2**20))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.steps)))
        return
    result = {"steps": arguments.steps}
    for capacity in CAPACITIES:
        environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": capacity}
        command = [sys.executable, __file__, "--measure", "--steps", str(arguments.steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        result[f"resident_mib_with_{capacity}_entries"] = json.loads(done.stdout.splitlines()[-1])
    record("host_memory", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
