"""Stage `statistics` end to end on Ray, compared with a straightforward script in one process, on the same manifest.

    python -m benchmarks.statistics --manifest manifest.jsonl --tokenizer spe.model --json python -m
    benchmarks.statistics --utterances 300000          # a generated manifest

End to end is what the stage does with Ray and its workers running: plan the chunks, read, tokenize, count, add up, and
write the histogram; `seconds_while_workers_start` is the same for the first job of a fresh Ray. The straightforward
rule parses each line, encodes its text as a whole, keeps all lengths in lists and sorts them, as NeMo's script does; it
runs on the first `--single` lines, since its rate does not depend on their number. Both count the same tokens, which
the benchmark checks. `driver_peak_mib` is the driver's highest resident memory in the stage; `--driver-growth N`
repeats the stage on N copies of the manifest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import sentencepiece

# As a script, this file's folder would come first, and this file would shadow the standard `statistics`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._record import record
from benchmarks.padding import draw_lengths
from raytrain.cluster.counting import count_all
from raytrain.cluster.session import ray_session
from raytrain.config import ClusterSection, Config, check_config
from raytrain.data.counts import Counts
from raytrain.data.text.tokenizer import SPECIALS, CanaryTokenizer, train_specials, train_tokenizer
from raytrain.lengths.histogram import LengthHistogram
from raytrain.run_folder.chunks import chunks_of
from raytrain.run_folder.histograms import write_histogram


class PeakMemory:
    """Context in which `peak_mib` tracks the highest resident memory of this process; `growth_mib` is the increase
    since the start."""

    def __enter__(self) -> PeakMemory:
        self._process, self._stop = psutil.Process(), threading.Event()
        self._start = self.peak_mib = self._resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth_mib(self) -> float:
        return self.peak_mib - self._start

    def _resident(self) -> float:
        return self._process.memory_info().rss / 2**20

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak_mib = max(self.peak_mib, self._resident())


def stage(config: Config, tokenizer: CanaryTokenizer, folder: Path) -> tuple[LengthHistogram, float, float]:
    """The stage's counts, its seconds, and the driver's peak in MiB."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        total = Counts()
        for _, partial in count_all(chunks_of(config, "train"), tokenizer, config):
            total.add(partial)
        histogram = total.histogram
        write_histogram(folder / "histogram.parquet", histogram)
        seconds = time.perf_counter() - start
    return histogram, seconds, memory.peak_mib


def single_process(manifest: Path, model: Path, lines: int, prompt: int) -> tuple[float, np.ndarray]:
    """Utterances per second of the straightforward rule, and the sorted lengths (N, 2) that it found."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    start = time.perf_counter()
    found = []
    with open(manifest, "rb") as file:
        for line, _ in zip(file, range(lines), strict=False):
            row = orjson.loads(line)
            tokens = len(processor.encode(row["text"])) + prompt + 1
            found.append((row["duration"], tokens))
    found.sort()
    return len(found) / (time.perf_counter() - start), np.array(found)


def check_equal(config: Config, tokenizer: CanaryTokenizer, lengths: np.ndarray, lines: int) -> None:
    """Raise unless both methods give the same durations and tokens for the first lines."""
    from raytrain.data.corpora.reading import read_blocks
    from raytrain.data.sequences import BlockEncoder

    encoder = BlockEncoder(tokenizer, config.model.prompt_format)
    mine: list[tuple[int, int]] = []
    for chunk in chunks_of(config, "train"):
        for block in read_blocks(chunk):
            mine += zip(block.duration_ms.tolist(), encoder.count(block)[0].tolist(), strict=True)
        if len(mine) >= lines:
            break
    theirs = sorted((int(np.ceil(round(seconds * 1000, 6))), int(tokens)) for seconds, tokens in lengths)
    if sorted(mine[:lines]) != theirs:
        raise SystemExit("the stage and the straightforward rule differ")


def make_manifest(folder: Path, utterances: int, block: int | None = None) -> tuple[Path, Path]:
    """A manifest of random lengths and words without audio, and a BPE model of 256 pieces for its texts. Rows are
    generated and written `block` at a time, by default all at once."""
    rng, block = np.random.default_rng(1), block or utterances
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(1, 9, 2000)], object)
    path = folder / "manifest.jsonl"
    with open(path, "wb") as file:
        for first in range(0, utterances, block):
            lengths = draw_lengths(min(block, utterances - first), seed=2 + first // block)
            for row in _rows(rng, words, *lengths, first):
                file.write(orjson.dumps(row) + b"\n")
    model = folder / "spe.model"
    model.write_bytes(train_tokenizer({"en": words.tolist()}, 256).models["en"])
    return path, model


def _rows(rng: Any, words: np.ndarray, durations: np.ndarray, tokens: np.ndarray, first: int) -> Iterator[dict]:
    chosen = words[np.minimum(rng.zipf(1.3, int(tokens.sum()) // 2 + len(tokens)), len(words)) - 1]
    start = 0
    for number, (duration, size) in enumerate(zip(durations.tolist(), tokens.tolist(), strict=True), first):
        text = " ".join(chosen[start : start + max(1, size // 2)])
        start += max(1, size // 2)
        yield {"audio_filepath": f"{number}.wav", "duration": duration / 1000, "text": text, "lang": "en"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, help="NeMo JSONL in English; generated if missing")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model of its text")
    parser.add_argument("--utterances", type=int, default=300_000, help="lines of the generated manifest")
    parser.add_argument("--single", type=int, default=200_000, help="lines for the straightforward rule")
    parser.add_argument("--driver-growth", type=int, default=0, help="also count this many copies of the manifest")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name, ray_session(ClusterSection(num_cpus=arguments.cpus)):
        folder = Path(name)
        manifest, model = arguments.manifest, arguments.tokenizer
        if manifest is None:
            manifest, model = make_manifest(folder, arguments.utterances)
        tokenizer = CanaryTokenizer({SPECIALS: train_specials(["en"]), "en": model.read_bytes()})

        def config(copies: int) -> Config:
            train = [{"name": "all", "path": [str(manifest.absolute())] * copies}]
            data = {"train": train, "default_language": "en", "audio_sample": 0}  # there is no audio
            return check_config({"name": "benchmark", "data": data})

        # The first run starts Ray's workers and imports Ray Data there.
        _, first_seconds, _ = stage(config(1), tokenizer, folder)
        histogram, seconds, mib = stage(config(1), tokenizer, folder)
        prompt = 9  # <|startofcontext|> … <|nodiarize|>, see raytrain.data.text.prompt
        rate, lengths = single_process(manifest, model, arguments.single, prompt)
        check_equal(config(1), tokenizer, lengths, len(lengths))
        result: dict[str, Any] = {
            "utterances": histogram.total,
            "hours": round(histogram.hours, 1),
            "seconds": round(seconds, 2),
            "seconds_while_workers_start": round(first_seconds, 2),
            "utterances_per_second": round(histogram.total / seconds),
            "single_process_utterances_per_second": round(rate),
            "ratio": round(histogram.total / seconds / rate, 2),
            "driver_peak_mib": round(mib, 1),
        }
        if arguments.driver_growth:
            many, seconds, mib = stage(config(arguments.driver_growth), tokenizer, folder)
            result["copies"] = {
                "utterances": many.total,
                "seconds": round(seconds, 2),
                "utterances_per_second": round(many.total / seconds),
                "driver_peak_mib": round(mib, 1),
            }
    record("statistics", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
