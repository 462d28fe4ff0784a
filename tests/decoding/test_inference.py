"""Many recordings on Ray: batches by memory, rows in order, faults by row, resuming after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import orjson
import pytest
import soundfile
import torch
from conftest import ray_processes, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.cluster.inference import make_batches, recognize
from raytrain.cluster.inference_worker import Batch, RecognitionJob, read_batch
from raytrain.cluster.pool import Pool, find_pool
from raytrain.console import Console
from raytrain.data.corpora.reading import plan_chunks
from raytrain.data.corpora.types import Corpus
from raytrain.data.text.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.decoding.batching import sorted_batches
from raytrain.decoding.recognizer import PARTS
from raytrain.decoding.requests import ManifestRow, Prompts, Request, read_requests
from raytrain.decoding.settings import DecodeSettings
from raytrain.decoding.transcriber import Transcriber
from raytrain.errors import ConfigError, DataError, ManifestError, RaytrainError
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.model.formats.portable import ModelParts
from raytrain.operations.transcript_parts import cut_parts
from raytrain.operations.transcription import TranscriptionSpec, load_parts, transcribe_manifests
from raytrain.storage.finished import Finished, FinishedParts
from raytrain.training.conversion import Format, save_model
from raytrain.training.memory.decoding import BatchSizes, DecodeTracer, upper_edge

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
POOL = Pool(workers=2, cuda=True, budget_bytes=0, threads=1, actor_cpus=0.4, reader_cpus=1)
MODEL = ModelConfig(
    encoder_layers=2,
    encoder_width=64,
    encoder_heads=2,
    subsampling_channels=32,
    decoder_layers=2,
    decoder_width=64,
    decoder_heads=2,
    max_positions=128,
    vocab_size=40,
)


@pytest.fixture(scope="module")
def parts() -> ModelParts:
    """A random model whose texts vary with the audio and end."""
    tokenizer = train_tokenizer({"en": ["one two three four"] * 9, "de": ["eins zwei drei vier"] * 9}, 24)
    torch.manual_seed(5)
    model = Canary(replace(MODEL, encoder_layers=1, encoder_width=32, vocab_size=tokenizer.vocab_size)).eval()
    for name, weight in model.named_parameters():
        if "transf_decoder" in name and weight.ndim == 2:
            weight.data *= 3
    model.log_softmax.mlp["layer0"].bias.data[tokenizer.eos_id] = 3.0
    return ModelParts.of(model, tokenizer.models)


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "own"
    save_model(parts, path, Format.raytrain)
    return path


@pytest.fixture
def folder(corpus, tmp_path) -> Path:
    """A folder with the test recordings, and one of all of them, longer than a window of 4 s."""
    for row in rows_of(corpus / "test.jsonl"):
        shutil.copy(corpus / row["audio_filepath"], tmp_path)
    pieces = [soundfile.read(path) for path in sorted(tmp_path.glob("*.flac"))]
    soundfile.write(tmp_path / "long.wav", np.concatenate([samples for samples, _ in pieces]), pieces[0][1])
    return tmp_path


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def manifest_of(corpus: Path) -> list[dict]:
    """The test rows with audio next to the manifest."""
    rows = rows_of(corpus / "test.jsonl")
    return [{**row, "audio_filepath": Path(row["audio_filepath"]).name} for row in rows]


def write(path: Path, *lines: dict | bytes) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else orjson.dumps(line)) + b"\n" for line in lines))
    return path


def order_of(manifest: Path, checkpoint: Path, **options) -> TranscriptionSpec:
    output = options.pop("output", manifest.with_name("out.jsonl"))
    return TranscriptionSpec((Corpus("c", str(manifest)),), output, checkpoint, **options)


# Batches and memory


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40_000), st.integers(1, 9)), max_size=60),
    st.integers(1, 200_000),
    st.integers(0, 50_000),
)
def test_every_utterance_is_in_one_batch_of_at_most_the_largest_size_and_padding(utterances, budget, padding):
    durations, pieces = [item[0] for item in utterances], [item[1] for item in utterances]
    batches = sorted_batches(durations, pieces, lambda ms: max(1, budget // ms), padding)
    assert sorted(index for batch in batches for index in batch) == list(range(len(utterances)))
    for batch in batches:
        assert len(batch) == 1 or sum(pieces[index] for index in batch) <= max(1, budget // durations[batch[0]])
        assert sum((durations[batch[0]] - durations[index]) * pieces[index] for index in batch) <= padding
    flat = [durations[index] for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


def test_predicted_memory_grows_with_duration_batch_and_beam():
    deep = replace(MODEL, decoder_layers=8, decoder_width=256)  # its caches of keys and values are the peak
    tracer = {beam: DecodeTracer(deep, DecodeSettings(beam_size=beam), device_type="cpu") for beam in (1, 2, 4)}

    def peak(size: int, ms: int, beam: int) -> int:
        return tracer[beam].trace(size, ms, tracer[beam].most_tokens(ms)).peak_bytes

    for ms in (500, 3000, 20_000):
        sizes = [peak(size, ms, 1) for size in (1, 2, 4, 8, 16)]
        beams = [peak(4, ms, beam) for beam in (1, 2, 4)]
        assert sizes == sorted(set(sizes)) and beams == sorted(set(beams))
        # Close to affine: a line through two sizes predicts a third.
        assert sizes[2] + 3 * (sizes[3] - sizes[2]) == pytest.approx(sizes[4], rel=0.05)
    lengths = [peak(4, ms, 1) for ms in (500, 1000, 3000, 10_000, 20_000, 40_000)]
    assert lengths == sorted(set(lengths))
    assert peak(16, 2000, 4) > 1.5 * peak(16, 2000, 1)


MEASURE = """
import gc, sys, torch
torch.set_num_threads(1)
from test_inference import MODEL, Canary, DecodeSettings, replace
from raytrain.data.batch import SpeechBatch
from raytrain.decoding.search import transcribe_batch
layers, beams, size, duration_ms = map(int, sys.argv[1:])
torch.manual_seed(0)
model = Canary(replace(MODEL, decoder_layers=layers, decoder_width=256, max_positions=256)).eval()
model.log_softmax.mlp["layer0"].bias.data[3] = -1e4  # no text ends before its cap
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
def run(size, duration_ms):
    batch = SpeechBatch.synthetic(size, duration_ms, 10, vocab=40, device="cpu")
    batch.audio_lengths[-1] -= 4000  # one ends before the others
    with torch.inference_mode():
        transcribe_batch(model, batch, 3, DecodeSettings(beam_size=beams))
run(1, 1000)
gc.collect()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
run(size, duration_ms)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("case", [(1, 1, 24, 8000), (6, 4, 12, 8000)], ids=["encoder", "beams"])
def test_predicted_memory_is_that_of_a_process(case):
    layers, beams, size, duration_ms = case
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not report a process' peak memory")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "decoding"))),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", MEASURE, *map(str, case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    config = replace(MODEL, decoder_layers=layers, decoder_width=256, max_positions=256)
    tracer = DecodeTracer(config, DecodeSettings(beam_size=beams), device_type="cpu")
    traced = tracer.trace(size, duration_ms, tracer.most_tokens(duration_ms))
    assert next(iter(traced.by_module())) == ("encoder" if layers == 1 else "decoder")
    assert traced.peak_bytes - traced.resident_bytes == pytest.approx(int(done.stdout), rel=0.1)


def test_batches_stay_under_the_budget_and_are_larger_for_short_rows():
    job = RecognitionJob(load_parts, DecodeSettings(), 16_000, 0, window_s=40.0, overlap_s=4.0)
    tracer = DecodeTracer(MODEL, job.settings)
    budget = tracer.trace(40, 5000, tracer.most_tokens(5000)).peak_bytes
    sizes = BatchSizes(tracer, budget)
    durations = np.exp(np.random.default_rng(1).uniform(np.log(300), np.log(90_000), 400)).astype(int).tolist()
    numbered = [(number, Request("a.wav", 0, 0, 0, ms, (1, 2))) for number, ms in enumerate(durations)]
    batches = make_batches(numbered, sizes, job, POOL)
    assert sorted(number for batch in batches for number in batch.ids) == list(range(400))
    seen = []
    for batch in batches:
        longest, _ = job.piece(max(durations[number] for number in batch.ids))
        most = sum(job.piece(durations[number])[1] for number in batch.ids)
        assert most <= batch.limit or len(batch.ids) == 1
        peak = tracer.trace(min(most, batch.limit), longest, tracer.most_tokens(longest)).peak_bytes
        assert peak <= budget or batch.limit == 1
        seen.append((longest, len(batch.ids)))
    assert max(size for ms, size in seen if ms < 3000) > 5 * max(size for ms, size in seen if ms > 30_000)
    # One more utterance would not have fit, as a rule: the budget is used.
    near = upper_edge(5000)
    assert tracer.trace(sizes.largest(near) + 2, near, tracer.most_tokens(near)).peak_bytes > budget


def test_a_small_budget_still_gives_batches_of_one_and_caps_hold():
    tracer = DecodeTracer(MODEL, DecodeSettings())
    poor = BatchSizes(tracer, 1 << 20)
    assert poor.largest(40_000) == 1 and poor.prediction(40_000).batch_size is None
    assert BatchSizes(tracer, 1 << 40, max_size=7).largest(1000) == 7


# Rows


def prompts_of(parts: ModelParts) -> Prompts:
    return Prompts(CanaryTokenizer(parts.tokenizers), parts.config.prompt_format, parts.config.max_positions)


def test_rows_of_other_formats_are_requests_for_the_same_audio(parts, corpus, folder):
    lhotse = pytest.importorskip("lhotse")
    from lhotse.shar import SharWriter

    rows = manifest_of(corpus)[:3]
    write(folder / "plain.jsonl", *rows)
    with tarfile.open(folder / "audio_0.tar", "w") as tar:
        for row in rows:
            tar.add(folder / row["audio_filepath"], row["audio_filepath"])
    cuts = []
    for number, row in enumerate(rows):
        cut = lhotse.Recording.from_file(folder / row["audio_filepath"], recording_id=f"r{number}").to_cut()
        cut.supervisions = [
            lhotse.SupervisionSegment(
                f"s{number}",
                cut.recording_id,
                0,
                cut.duration,
                text=row["text"],
                language=row["source_lang"],
                custom={"pnc": row["pnc"]},
            )
        ]
        cuts.append(cut)
    lhotse.CutSet.from_cuts(cuts).to_file(folder / "cuts.jsonl")
    (folder / "shar").mkdir()
    with SharWriter(folder / "shar", fields={"recording": "flac"}, shard_size=10) as writer:
        for cut in cuts:
            writer.write(cut)
    corpora = {
        "plain": Corpus("c", str(folder / "plain.jsonl")),
        "tarred": Corpus("c", str(folder / "plain.jsonl"), audio=str(folder / "audio_{0..0}.tar")),
        "cuts": Corpus("c", str(folder / "cuts.jsonl")),
        "shar": Corpus("c", str(folder / "shar")),
    }
    job = RecognitionJob(load_parts, DecodeSettings(), 16_000, 0)
    audio = {}
    for name, source in corpora.items():
        lines = list(read_requests(plan_chunks([source]), prompts_of(parts)))
        assert [row.error for row in lines] == [None] * 3, name
        table = read_batch(Batch((0, 1, 2), tuple(row.request for row in lines), 3), job)
        audio[name] = (table["tensor_0"][0].as_py(), [row.request.prompt for row in lines])
        assert audio[name] == audio["plain"], name


def test_bad_rows_are_named_and_missing_durations_read(parts, corpus, folder):
    rows = manifest_of(corpus)[:2]
    del rows[0]["duration"], rows[0]["text"]
    lines = [
        rows[0],
        b"",
        {"text": "no audio", "duration": 1},
        b"{not json",
        b"[1]",
        {**rows[1], "duration": -1},
        {"audio_filepath": "gone.wav", "lang": "en"},
        {**rows[1], "lang": "fr", "source_lang": "fr"},
        {**rows[1], "_skipme": True, "note": "x"},
    ]
    write(folder / "m.jsonl", *lines)
    parsed = list(read_requests(plan_chunks([Corpus("c", str(folder / "m.jsonl"))]), prompts_of(parts)))
    whys = [row.error and row.error.partition(":")[0].partition(";")[0] for row in parsed]
    assert whys == [
        None,
        "missing_field",
        "bad_json",
        "bad_json",
        "bad_duration",
        "bad_audio",
        "unknown language",
        None,
    ]
    seconds = soundfile.info(folder / rows[0]["audio_filepath"]).duration
    assert parsed[0].request.duration_ms == pytest.approx(1000 * seconds, abs=1) and parsed[0].fields == rows[0]
    assert parsed[2].fields == {"manifest": str(folder / "m.jsonl"), "line": 4}
    assert parsed[7].fields["note"] == "x"


def test_parts_hold_all_rows_and_are_bounded():
    request = Request("a.wav", 0, 0, 0, 3_600_000, (1,))
    rows = [ManifestRow({"n": n}, request if n % 2 else None, "bad" if not n % 2 else None) for n in range(50)]
    cut = list(cut_parts(rows, 30))
    assert [row.fields["n"] for part in cut for row in part.rows] == list(range(50))
    assert [part.first for part in cut] == [0, 20, 40] and [part.waiting for part in cut] == [10, 10, 5]
    assert [len(part.rows) for part in cut_parts(rows[:9:2], 2)] == [2, 2, 1]


def test_a_part_counts_only_for_its_model_settings_rows_and_bytes(tmp_path):
    store = FinishedParts(tmp_path / "out.jsonl", "key")
    store.write(0, "rows", [b'{"a":1}', b'{"error":"x"}'], 1)
    store.write(1, "more", [b'{"b":2}'], 0)
    assert store.find(0, "rows") == Finished(2, 1)
    assert store.find(0, "other") is None and store.find(2, "rows") is None
    assert FinishedParts(tmp_path / "out.jsonl", "other").find(0, "rows") is None
    path = store.folder / "part-000000.jsonl"
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole.replace(b":1}", b":2}"), b"", b"[1]\n"):
        path.write_bytes(damaged)
        assert store.find(0, "rows") is None
    path.write_bytes(whole)
    store.join(2)
    assert (tmp_path / "out.jsonl").read_bytes() == b'{"a":1}\n{"error":"x"}\n{"b":2}\n'
    assert list(tmp_path.iterdir()) == [tmp_path / "out.jsonl"]


# On Ray


def test_texts_are_those_of_single_recordings_in_input_order(parts, checkpoint, corpus, folder, local_ray):
    rows = manifest_of(corpus)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    rows = [{**rows[i], "speaker": {"number": i}, "pred_text": "old", "error": "old"} for i in order]
    rows.insert(3, {"audio_filepath": "long.wav", "lang": "de"})
    (folder / "broken.wav").write_bytes(b"RIFF no audio")
    rows.insert(5, {"audio_filepath": "broken.wav", "duration": 2.0, "lang": "en"})
    (folder / "x.raw").write_bytes(bytes(3000))  # raw samples, which can't be interpreted
    rows.insert(7, {"audio_filepath": "x.raw", "duration": 2.0, "lang": "en"})
    rows.insert(6, {"audio_filepath": "gone.flac", "duration": 2.0, "lang": "en"})
    rows.append({"duration": 1.0, "lang": "en"})
    half = {"offset": 0.5, "duration": 1.0, "lang": "en", "audio_filepath": rows[0]["audio_filepath"]}
    rows.append(half)
    write(folder / "m.jsonl", *rows)
    arguments = [
        "transcribe",
        "-m",
        str(checkpoint),
        "--manifest",
        "m.jsonl",
        "--root",
        str(folder),
        "--output",
        str(folder / "out.jsonl"),
        "--window-seconds",
        "4",
        "--part-rows",
        "6",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 1, done.output
    summary = json.loads(next(line for line in done.output.splitlines() if line.startswith("{")))
    lines = rows_of(folder / "out.jsonl")
    assert len(lines) == len(rows) and not (folder / "out.jsonl.parts").exists()
    alone = {
        (language, pnc): Transcriber(parts, language=language, pnc=pnc is None, window_s=4.0, batch_size=1)
        for language in ("en", "de")
        for pnc in (None, "no")
    }
    texts, unreadable = set(), ("broken.wav", "gone.flac", "x.raw")
    for asked, row in zip(rows, lines, strict=True):
        fields = {name: value for name, value in asked.items() if name not in ("pred_text", "error")}
        assert {name: row.get(name) for name in fields} == fields
        audio = asked.get("audio_filepath", "")
        if audio in ("", *unreadable):
            assert "pred_text" not in row and row["error"]
            continue
        if asked is rows[-1]:
            wave, rate = soundfile.read(folder / audio)
            soundfile.write(folder / "half.wav", wave[rate // 2 : rate // 2 + rate], rate)
            audio = "half.wav"
        prompt = (asked.get("lang") or asked["source_lang"], asked.get("pnc"))
        wanted = next(alone[prompt].run([str(folder / audio)]))
        assert (row["pred_text"], "error" in row) == (wanted.text, False)
        assert row["confidence"] == pytest.approx(wanted.confidence, abs=2e-4)
        texts.add(row["pred_text"])
    assert len(texts) > 5, "the model's texts are too uniform"
    assert lines[3]["pred_text"] and soundfile.info(folder / "long.wav").duration > 8  # three windows or more
    assert (summary["rows"], summary["failed"], summary["parts"]) == (len(rows), 4, -(-len(rows) // 6))
    assert set(summary["part_seconds"]) == {"decode audio", *PARTS}
    assert all(value > 0 for value in summary["part_seconds"].values())
    audio_seconds = sum(
        soundfile.info(folder / row["audio_filepath"]).duration
        for row in rows
        if row not in (half,) and row.get("audio_filepath", "x.raw") not in unreadable
    )
    span = min(1.0, soundfile.info(folder / half["audio_filepath"]).duration - 0.5)
    assert summary["audio_s"] == pytest.approx(audio_seconds + span, abs=0.1)
    assert summary["rtfx"] == pytest.approx(summary["audio_s"] / summary["seconds"], rel=0.01)


def test_audio_is_decoded_in_separate_processes(parts, checkpoint, corpus, folder, local_ray):
    write(folder / "m.jsonl", *manifest_of(corpus))
    rows = list(read_requests(plan_chunks([Corpus("c", str(folder / "m.jsonl"))]), prompts_of(parts)))
    pool = find_pool(1, "auto", None)
    job = RecognitionJob(partial(load_parts, str(checkpoint)), DecodeSettings(beam_size=2), 16_000, 0)
    numbered = [(number, row.request) for number, row in enumerate(rows)]
    sizes = BatchSizes(DecodeTracer(parts.config, job.settings), pool.budget_bytes, max_size=3)
    batches = make_batches(numbered, sizes, job, pool)
    results = list(recognize(batches, job, pool))
    assert [[text["id"] for text in line.texts] for line in results] == [list(batch.ids) for batch in batches]
    models, readers = ({line.processes[name] for line in results} for name in ("model", "reader"))
    assert len(models) == 1 and not models & readers and os.getpid() not in models | readers


def test_a_worker_that_can_not_load_the_model_is_an_error_that_says_so(corpus, folder, parts, local_ray):
    write(folder / "m.jsonl", *manifest_of(corpus))
    rows = list(read_requests(plan_chunks([Corpus("c", str(folder / "m.jsonl"))]), prompts_of(parts)))
    pool = find_pool(1, "cpu", None)
    job = RecognitionJob(partial(load_parts, str(folder / "nowhere")), DecodeSettings(), 16_000, 0)
    sizes = BatchSizes(DecodeTracer(parts.config, job.settings), pool.budget_bytes)
    batches = make_batches([(number, row.request) for number, row in enumerate(rows)], sizes, job, pool)
    with pytest.raises(RaytrainError, match="a worker failed; because .*nowhere.* to do: check"):
        list(recognize(batches, job, pool))


def test_impossible_pools_are_rejected(local_ray):
    pool = find_pool(None, "cpu", None)
    assert pool.workers == 1 and not pool.cuda and pool.budget_bytes > 2**20
    assert pool.actor_cpus * pool.workers + pool.reader_cpus <= 2 and pool.actor_cpus != pool.reader_cpus
    assert find_pool(2, "cpu", None).budget_bytes == pytest.approx(pool.budget_bytes / 2, rel=0.01)
    with pytest.raises(ConfigError, match="no room for so many workers; got 50"):
        find_pool(50, "cpu", None)
    with pytest.raises(ConfigError, match="the device is unavailable; got cuda"):
        find_pool(1, "cuda", None)


def test_a_killed_job_resumes_and_a_changed_setting_starts_over(checkpoint, corpus, tmp_path, local_ray):
    rows = []
    for number, row in enumerate(rows_of(corpus / "train.jsonl") * 2):
        name = f"{number:03d}.flac"
        shutil.copy(corpus / row["audio_filepath"], tmp_path / name)
        rows.append({**row, "audio_filepath": name})
    manifest = write(tmp_path / "m.jsonl", *rows)
    whole = transcribe_manifests(order_of(manifest, checkpoint, output=tmp_path / "whole.jsonl", part_rows=16), QUIET)
    assert (whole.parts, whole.parts_from_before, whole.failed) == (12, 0, 0)

    before = ray_processes()
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "raytrain",
        "transcribe",
        "-m",
        str(checkpoint),
        "--manifest",
        str(manifest),
        "--output",
        str(out),
        "--part-rows",
        "16",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    folder = tmp_path / "out.jsonl.parts"
    wait_for(lambda: len(list(folder.glob("part-*"))) >= 3 or process.poll() is not None, "three parts", every=0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, process.stderr.read().decode()
    process.stderr.close()
    wait_for(lambda: not ray_processes() - before, "its Ray has ended")
    assert not out.exists()
    done = sorted(int(path.stem.removeprefix("part-")) for path in folder.glob("part-*"))
    assert 3 <= len(done) < 12
    shutil.copytree(folder, tmp_path / "other.jsonl.parts")

    # Another setting: none of the finished parts counts.
    other = order_of(manifest, checkpoint, output=tmp_path / "other.jsonl", part_rows=16, window_s=1.0)
    assert transcribe_manifests(other, QUIET).parts_from_before == 0
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "whole.jsonl").read_bytes()

    # Finished parts are not redone: their audio no longer exists.
    for part in done:
        for row in rows[part * 16 : part * 16 + 16]:
            os.unlink(tmp_path / row["audio_filepath"])
    resumed = transcribe_manifests(order_of(manifest, checkpoint, output=out, part_rows=16), QUIET)
    assert (resumed.parts_from_before, resumed.failed) == (len(done), 0)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not folder.exists()


def test_an_error_not_caused_by_a_row_ends_the_job_at_once(checkpoint, corpus, folder, local_ray):
    with pytest.raises(ManifestError, match="no such file"):
        transcribe_manifests(order_of(folder / "gone.jsonl", checkpoint), QUIET)
    empty = write(folder / "empty.jsonl", b"", b"")
    with pytest.raises(ManifestError, match="have no rows"):
        transcribe_manifests(order_of(empty, checkpoint), QUIET)
    manifest = write(folder / "m.jsonl", *manifest_of(corpus))
    with pytest.raises(ConfigError, match="model and one second .*--device-memory"):
        transcribe_manifests(order_of(manifest, checkpoint, device_memory=1 << 20), QUIET)
    with pytest.raises(ConfigError, match="larger than the vocabulary"):
        transcribe_manifests(order_of(manifest, checkpoint, settings=DecodeSettings(500)), QUIET)
    with pytest.raises(DataError, match="wrong length; got 50"):
        transcribe_manifests(order_of(manifest, checkpoint, window_s=50.0), QUIET)
    assert not list(folder.glob("out.jsonl*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "not both"),
        (["a.wav", "--manifest", "m.jsonl"], "not both"),
        (["a.wav", "--output", "o.jsonl"], "requires --manifest"),
        (["a.wav", "--device-memory", "1GiB"], "--device-memory"),
        (["--manifest", "m.jsonl"], "--output"),
        (["--manifest", "m.jsonl", "--output", "o", "--n-best", "2", "--beam-size", "2"], "--n-best"),
        (["--manifest", "m.jsonl", "--output", "o", "--audio", "a", "--audio", "b"], "2 times for 1 manifests"),
        (["--manifest", "m.jsonl", "--output", "o", "--device-memory", "much"], "is not a size"),
    ],
)
def test_options_that_do_not_go_together_are_named(arguments, message):
    done = CliRunner().invoke(app, ["transcribe", "-m", "x", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and message in done.output
