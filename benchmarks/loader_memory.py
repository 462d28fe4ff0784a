"""Resident memory of a loader that runs for an hour, with all formats and augmentation.

python -m benchmarks.loader_memory --minutes 60 --json

Also plots the curve next to the result. Anonymous memory is what the process itself holds; the rest of the resident
memory consists of pages of the assignment's files, which the kernel drops as needed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])  # as a script, this file's folder would come first

from benchmarks._record import RESULTS, record
from benchmarks.loader import FORMATS, RATE, SIZES, open_loader, write_assignment, write_sounds
from raytrain.data.augment import Augmenter, AugmentSettings
from raytrain.lengths import BatchSchedule


def resident_mib() -> tuple[float, float]:
    """(anonymous, all) resident memory of this process."""
    with open("/proc/self/status") as file:
        status = {line.split(":")[0]: line.split()[1] for line in file if line.startswith(("RssAnon", "VmRSS"))}
    return int(status["RssAnon"]) / 1024, int(status["VmRSS"]) / 1024


def run(minutes: float, pause: float, rows: int) -> dict[str, Any]:
    """Load for `minutes`, with a pause of `pause` seconds after each batch in place of a training step."""
    points: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        sounds = [sound for name in FORMATS for sound in write_sounds(Path(folder) / name, *FORMATS[name], 100)]
        assignment = write_assignment(Path(folder) / "assignment", sounds * (rows // len(sounds)))
        schedule = BatchSchedule(1, assignment.rows_per_bucket, SIZES)
        augmenter = Augmenter(
            AugmentSettings(speeds=(0.9, 1.0, 1.1), gain_db=(-6.0, 6.0), noise=(f"{folder}/flac/0000*.flac",)), RATE
        )
        start = time.perf_counter()
        batches, seconds = 0, 0.0
        with open_loader(assignment, schedule, 2, augmenter) as loader:
            for loaded in loader:
                batches += 1
                seconds += float(loaded.batch.audio_lengths.sum()) / RATE
                now = time.perf_counter() - start
                if not points or now >= points[-1][0] + minutes / 4:  # 240 points
                    points.append((now, *resident_mib()))
                if now > minutes * 60:
                    break
                time.sleep(pause)
    times, anonymous, resident = (np.array(column) for column in zip(*points, strict=True))
    late = times > times[-1] / 4
    slope = float(np.polyfit(times[late] / 3600, anonymous[late], 1)[0])
    _draw(times / 60, anonymous, resident)
    return {
        "minutes": round(times[-1] / 60, 1),
        "batches": batches,
        "audio_hours": round(seconds / 3600, 1),
        "anonymous_mib_after_a_quarter": round(float(anonymous[late][0]), 1),
        "anonymous_mib_at_the_end": round(float(anonymous[-1]), 1),
        "anonymous_mib_largest": round(float(anonymous.max()), 1),
        "growth_mib_per_hour_after_a_quarter": round(slope, 2),
        "anonymous_mib": [round(value, 1) for value in anonymous.tolist()[:: max(1, len(points) // 60)]],
    }


def _draw(minutes: np.ndarray, anonymous: np.ndarray, resident: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(minutes, resident, label="resident, with pages of mapped files")
    axes.plot(minutes, anonymous, label="anonymous")
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None), title="Memory of the loader's process")
    axes.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"loader_memory_cpu_{datetime.date.today():%Y%m%d}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds after each batch, where a step would train")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = run(arguments.minutes, arguments.pause, arguments.rows)
    record("loader_memory", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
