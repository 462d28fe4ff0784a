"""The benchmarks run, and the parity check sees differences where there are some."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED

from benchmarks._models import SHAPES, config_of
from raytrain.config import load_config
from raytrain.data.text.tokenizer import train_tokenizer
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.model.formats.nemo import write_nemo
from raytrain.model.formats.portable import ModelParts

ROOT = Path(__file__).parents[1]


def parity(model: Path, expected: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.parity", str(model), str(expected), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@torch.no_grad()
def test_parity_measures_differences(tmp_path):
    tokenizer = train_tokenizer({"en": ["one two three"] * 3}, 16)
    torch.manual_seed(0)
    config = ModelConfig(
        encoder_layers=1,
        encoder_width=16,
        encoder_heads=2,
        subsampling_channels=4,
        decoder_layers=1,
        decoder_width=16,
        decoder_heads=2,
        max_positions=32,
        vocab_size=tokenizer.vocab_size,
    )
    model = Canary(config).eval()
    write_nemo(tmp_path / "m.nemo", ModelParts.of(model, tokenizer.models))
    wave, lengths, ids = torch.randn(2, 9000), torch.tensor([9000, 4321]), torch.randint(0, 16, (2, 6))
    wave[1, 4321:] = 0
    mel, mel_len = model.preprocessor(wave, lengths)
    enc, enc_len = model.encode(wave, lengths)
    log_probs = model.decode_logits(ids, enc, enc_len).log_softmax(-1)
    log_probs[1, 2, 3] += 0.5
    mel[0, 5, 7] -= 0.25
    mel[1, :, 30:] = 9  # past its end: does not count
    arrays = {
        "wave": wave,
        "wave_len": lengths,
        "mel": mel,
        "mel_len": mel_len,
        "enc": enc,
        "enc_len": enc_len,
        "ids": ids,
        "ids_len": torch.tensor([6, 4]),
        "logp": log_probs,
    }
    np.savez(tmp_path / "expected.npz", **{name: value.numpy() for name, value in arrays.items()})
    measured = parity(tmp_path / "m.nemo", tmp_path / "expected.npz")
    assert measured["encoder"] < 1e-5
    assert measured["log_probs"] == pytest.approx(0.5, abs=1e-4) and measured["mel"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize("name", ["tiny-canary", "tiny-canary2"])
def test_parity_with_nemo(name):
    root = SHARED / "reference" / name
    if not root.exists():
        pytest.skip("the recorded outputs of NeMo are not available")
    assert max(parity(root / "model.nemo", root / "expected.npz").values()) < 1e-4


@pytest.mark.parametrize("name", list(SHAPES))
def test_benchmarks_have_the_shapes_of_the_configurations(name):
    assert config_of(name) == load_config(ROOT / "configs" / f"{name}.yaml").model


def test_a_search_that_reads_peaks_takes_a_probe_per_bucket():
    from benchmarks.oomptimizer import count_probes

    edges = [
        (duration, tokens) for duration in range(2000, 40000, 2000) for tokens in (duration // 100, duration // 50)
    ]
    counts = count_probes(edges, [(1e9, 1e4 * duration + 1e5 * tokens) for duration, tokens in edges], int(2e10), 4)
    assert counts["answers"] == 4 * len(edges) and counts["answers_above_what_fits"] == 0
    assert counts["probes_per_bucket"] <= 1.3 and counts["four_processes_probes_per_bucket"] <= 1.5
    assert counts["without_peaks_probes_per_bucket"] <= 2.5 < counts["nemo_rule_probes_per_bucket"] / 2
    assert counts["mean_share_of_largest"] > 0.96


@pytest.mark.slow  # two clusters; test_cluster.py has what nodes leave on one
@pytest.mark.timeout(240)
def test_clusters_of_one_and_two_nodes_give_the_same_bytes(tmp_path):
    from benchmarks.cluster import measure

    measured = measure(tmp_path, 3000, [1, 2], chunk_bytes=100_000)
    assert measured["same_results"] and set(measured["ids"]) == {
        "statistics.json",
        "bucket_plan.json",
        "histogram.parquet",
        "assignment",
    }
    assert measured["rows"][0] + sum(measured["rejected"][0].values()) == 3000
    for run in measured["nodes"].values():
        assert run["statistics_rows_per_second"] == pytest.approx(3000 / run["statistics_seconds"], rel=0.1)
        assert run["driver_peak_mib"] > 100
    assert not list(tmp_path.glob("nodes-*/assignment"))


def test_a_stopped_cluster_benchmark_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "benchmarks.cluster", "--lines", "100000000", "--folder", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/manifest.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not list(tmp_path.iterdir())


def test_rtfx_compares_models_at_equal_length_of_text():
    from benchmarks.rtfx import Utterances, load, measure, times_faster

    settings = SimpleNamespace(device="cpu", seconds=2.0, delta=1)
    runs = {}
    for name, precision in (("canary-1b", "fp32"), ("canary-1b-flash", "int8")):
        parts, model = load("canary-tiny", precision, "cpu")
        runs[name] = Utterances(parts, 2, 1, settings, model)
    measured = measure(runs, 5, 4.0, 2)
    for run, figures in zip(runs.values(), measured.values(), strict=True):
        assert run.search() == [5, 5] and figures["tokens"] == 5
        assert figures["rtfx"] == pytest.approx(4000 / (figures["encoder_ms"] + figures["decoder_ms"]), rel=0.02)
    flash, deep = measured["canary-1b-flash"], measured["canary-1b"]
    faster = deep["decoder_ms"] / flash["decoder_ms"]
    assert times_faster(measured)["decoder"] == pytest.approx(faster, rel=0.05, abs=0.006)
    assert times_faster({"canary-1b": deep}) is None
