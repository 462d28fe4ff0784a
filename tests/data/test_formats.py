"""Each corpus format, as its standard writer writes it, read from a folder and from S3."""

import csv
import gzip
import io
import json
import math
import tarfile
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import upload
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import MultiCut
from lhotse.shar import SharWriter

from raytrain.data.audio import read_audio
from raytrain.data.audio.embedded import read_audio_bytes
from raytrain.data.corpora.reading import find_format, plan_chunks, read_chunk
from raytrain.data.corpora.rows import RowParser
from raytrain.data.corpora.tar_index import TarIndex
from raytrain.data.corpora.types import BadRow, Chunk, Corpus, Utterance
from raytrain.data.text.slots import PromptKey
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import read_range
from raytrain.storage.locations import StorageReadError

RATE = 8000
TEXTS = ["one", "zwei drei", "four", "fünf, sechs", "seven"]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Folder with five recordings 0.wav … 4.wav of 1.0, 1.1, … seconds."""
    folder = tmp_path_factory.mktemp("sounds")
    noise = np.random.default_rng(1)
    for number in range(len(TEXTS)):
        soundfile.write(folder / f"{number}.wav", noise.normal(size=RATE + 800 * number) / 9, RATE, subtype="PCM_16")
    return folder


@pytest.fixture(params=["local", "s3"])
def placed(request):
    """A function that copies a folder to where the test reads it."""
    if request.param == "local":
        return str
    bucket = request.getfixturevalue("s3")
    return lambda folder: upload(folder, f"{bucket}/{uuid.uuid4().hex}")


def read(path, format=None, chunk_bytes=1 << 20, **settings):
    """All rows of a corpus, read by the format detected from its files."""
    corpus = Corpus("c", path, format, **{"language": "en", **settings})
    chunks = plan_chunks([corpus], chunk_bytes)
    return [row for chunk in chunks for row in read_chunk(chunk)]


def samples(row):
    """The audio of a row."""
    span = {}
    if row.audio_path.endswith(".tar"):
        span["start"], span["size"] = TarIndex(row.audio_path).find(row.member)
    elif row.member:
        span["start"], span["size"] = int(row.member), -1
    return read_audio(row.audio_path, offset_ms=row.offset_ms, duration_ms=row.duration_ms, sample_rate=RATE, **span)


def wave(sounds, number):
    return soundfile.read(sounds / f"{number}.wav", dtype="float32")[0]


def check(rows, sounds):
    """Rows are all the recordings in order, each with its text, duration and samples."""
    assert [row for row in rows if isinstance(row, BadRow)] == []
    assert [row.text for row in rows] == TEXTS
    assert [row.duration_ms for row in rows] == [1000 + 100 * number for number in range(len(TEXTS))]
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(samples(row), wave(sounds, number))


# NeMo


def nemo_rows(**fields):
    return [
        {"audio_filepath": f"{number}.wav", "duration": 1 + number / 10, "text": text, **fields}
        for number, text in enumerate(TEXTS)
    ]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".jsonl.zst"])
def test_nemo_manifests(tmp_path, sounds, placed, ending):
    for number in range(5):
        (tmp_path / f"{number}.wav").write_bytes((sounds / f"{number}.wav").read_bytes())
    codec = {".gz": "gzip", ".zst": "zstd"}.get(ending[-4:].removeprefix("l"))
    data = jsonl(nemo_rows())
    (tmp_path / f"m{ending}").write_bytes(pa.compress(data, codec, asbytes=True) if codec else data)
    check(read(f"{placed(tmp_path)}/m{ending}", chunk_bytes=100), sounds)


def test_relative_audio_may_lie_in_another_folder(tmp_path, sounds):
    (tmp_path / "m.json").write_bytes(jsonl(nemo_rows()))
    check(read(f"{tmp_path}/m.json", audio=str(sounds)), sounds)


def test_a_broken_archive_is_an_error(tmp_path):
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(jsonl(nemo_rows() * 999))[:-50])
    with pytest.raises(StorageReadError, match="can't read .*m.jsonl.gz to its end; because"):
        read(f"{tmp_path}/m.jsonl.gz", "nemo")


@given(
    kinds=st.lists(st.sampled_from(["good", "blank", "bad", "ümlaut"]), max_size=12),
    chunk_bytes=st.integers(1, 200),
    newline=st.sampled_from(["\n", "\r\n"]),
    has_bom=st.booleans(),
    ends=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_lines_are_the_same_and_have_the_same_numbers_in_any_chunks(
    tmp_path_factory, kinds, chunk_bytes, newline, has_bom, ends
):
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    good = {"audio_filepath": "a.wav", "duration": 1}
    lines = [
        {"blank": "", "bad": "{"}.get(kind) if kind in ("blank", "bad") else json.dumps({**good, "text": f"{kind}{n}"})
        for n, kind in enumerate(kinds)
    ]
    path.write_bytes(b"\xef\xbb\xbf" * has_bom + newline.join(lines).encode() + newline.encode() * ends)
    wanted = [(n + 1, "bad_json") if kind == "bad" else f"{kind}{n}" for n, kind in enumerate(kinds) if kind != "blank"]
    rows = read(str(path), "nemo", chunk_bytes)
    assert [row.text if isinstance(row, Utterance) else (row.line, row.reason) for row in rows] == wanted


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_nemo_tarred_sets(tmp_path, sounds, placed):
    # NeMo names the second span of a recording -sub2 and stores the recording once.
    rows = [{**row, "audio_filepath": f"x-{number}-sub{number}.wav"} for number, row in enumerate(nemo_rows())]
    for shard, numbers in enumerate([(0, 1), (2, 3, 4)]):
        (tmp_path / f"manifest_{shard}.json").write_bytes(jsonl(rows[number] for number in numbers))
        members = {f"./x-{number}.wav": (sounds / f"{number}.wav").read_bytes() for number in numbers}
        write_tar(tmp_path / f"audio_{shard}.tar", members)
    folder = placed(tmp_path)
    manifests, tars = f"{folder}/manifest__OP_0..1_CL_.json", f"{folder}/audio__OP_0..1_CL_.tar"
    rows = read(manifests, audio=tars)
    check(rows, sounds)
    assert [row.audio_path for row in rows] == [f"{folder}/audio_0.tar"] * 2 + [f"{folder}/audio_1.tar"] * 3
    with pytest.raises(ManifestError, match="corpus c: manifests and tars differ in number; got 2 manifests, 1 tars"):
        read(manifests, audio=f"{folder}/audio_0.tar")
    with pytest.raises(ManifestError, match="corpus c: can't read .*audio_7.tar"):
        read(manifests, audio=f"{folder}/audio_{{0,7}}.tar")


def test_a_member_is_found_by_its_name_its_stem_or_its_recording(tmp_path):
    names = ["a.wav", "b.1.flac", "b.1.json", "c.nodata", "d/e.opus", "f", "g-sub2.wav", "g.wav"]
    write_tar(tmp_path / "t.tar", {name: name.encode() for name in names})
    index = TarIndex(str(tmp_path / "t.tar"))
    for asked, expected in [
        ("a.wav", "a.wav"),
        ("a", "a.wav"),
        ("./a", "a.wav"),
        ("b.1", "b.1.flac"),
        ("c", None),
        ("d/e", "d/e.opus"),
        ("f", "f"),
        ("g-sub2.wav", "g-sub2.wav"),
        ("g-sub3.wav", "g.wav"),
        ("b", None),
        ("e", None),
    ]:
        span = index.find(asked)
        assert (span and read_range(str(tmp_path / "t.tar"), *span)) == (expected and expected.encode())


def test_a_compressed_tar_is_refused(tmp_path):
    (tmp_path / "t.tar").write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(StorageReadError, match="t.tar is not a tar that can be read by range; .*uncompressed"):
        TarIndex(str(tmp_path / "t.tar"))


# Lhotse


def make_cuts(sounds, ids="cut-{}"):
    cuts = []
    for number, text in enumerate(TEXTS):
        cut = Recording.from_file(sounds / f"{number}.wav").to_cut()
        cut.id = ids.format(number)
        spans = [
            SupervisionSegment(f"{number}-{n}", cut.recording_id, n / 9, 0.1, text=word, language="en")
            for n, word in enumerate(text.split())
        ]
        cut.supervisions = spans[::-1]
        cuts.append(cut)
    return CutSet.from_cuts(cuts)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_lhotse_cuts(tmp_path, sounds, ending):
    make_cuts(sounds).to_jsonl(f"{tmp_path}/cuts.{ending}")
    check(read(f"{tmp_path}/cuts.{ending}", language=None, chunk_bytes=300), sounds)


def test_lhotse_cuts_and_their_audio_on_s3(tmp_path, sounds, s3):
    for number in range(5):
        (tmp_path / f"{number}.wav").write_bytes((sounds / f"{number}.wav").read_bytes())
    cuts = make_cuts(sounds)
    for number, cut in enumerate(cuts):
        # Relative to the cuts.
        cut.recording.sources[0].source = f"{number}.wav"
    cuts.to_jsonl(f"{tmp_path}/cuts.jsonl")
    check(read(f"{upload(tmp_path, f'{s3}/lhotse')}/cuts.jsonl"), sounds)


def test_a_cut_of_a_part_of_a_recording(tmp_path, sounds):
    cut = make_cuts(sounds)[4].truncate(offset=0.25, duration=0.5)
    cut.supervisions = [SupervisionSegment("s", cut.recording_id, 0, 0.5, text="part")]
    CutSet.from_cuts([cut]).to_jsonl(f"{tmp_path}/cuts.jsonl")
    (row,) = read(f"{tmp_path}/cuts.jsonl")
    assert (row.offset_ms, row.duration_ms, row.text) == (250, 500, "part")
    np.testing.assert_allclose(samples(row), cut.load_audio()[0], atol=1e-7)


def cut_of(sounds, **changes):
    cut = make_cuts(sounds)[0]
    for name, value in changes.items():
        setattr(cut, name, value)
    return cut


def read_cuts(path, *cuts):
    CutSet.from_cuts(cuts).to_jsonl(path / "cuts.jsonl")
    return read(f"{path}/cuts.jsonl", "lhotse_cuts", language=None)


def test_fields_of_nemo_come_from_the_cut_and_then_from_its_supervisions(tmp_path, sounds):
    cut = cut_of(sounds, custom={"source_lang": "de", "pnc": "no", "irrelevant": 1})
    cut.supervisions[0].custom = {"pnc": "yes", "emotion": "happy"}
    skipped = cut_of(sounds, id="skipped", custom={"_skipme": True})
    (row, bad) = read_cuts(tmp_path, cut, skipped)
    # The supervision's language is that of the text.
    assert row[4:8] == ("de", "en", False, (("emotion", "happy"),))
    assert (bad.line, bad.reason) == (2, "skipme")


def stereo(path):
    soundfile.write(path, np.zeros((RATE, 2)), RATE)
    return Recording.from_file(path)


def test_cuts_that_are_not_a_span_of_a_mono_file_are_named(tmp_path, sounds):
    cut, second = list(make_cuts(sounds))[:2]
    both = stereo(tmp_path / "stereo.wav")
    memory, command = cut_of(sounds, id="memory"), cut_of(sounds, id="command")
    memory.recording.sources = [AudioSource("memory", [0], "UklGRg==")]
    command.recording.sources = [AudioSource("command", [0], "cat x.wav")]
    cuts = [
        cut.append(second),
        cut.pad(duration=9),
        MonoCut("none", 0, 1, 0, cut.supervisions),
        memory,
        command,
        MonoCut("left", 0, 1, 0, cut.supervisions, recording=both),
        MultiCut("both", 0, 1, [0, 1], cut.supervisions, recording=both),
        cut.perturb_speed(1.1),
        cut_of(sounds, id="resampled").resample(4000),
    ]
    *bad, good = read_cuts(tmp_path, *cuts)
    assert {row.reason for row in bad} == {"unsupported_audio"}
    for row, detail in zip(
        bad, ["MixedCut", "MixedCut", "no rec", "'memory'", "'command'", "several", "several", "Speed"], strict=True
    ):
        assert detail in row.detail
    np.testing.assert_array_equal(samples(good), wave(sounds, 0))


def test_a_channel_in_a_separate_file_is_mono(tmp_path, sounds):
    recording = Recording(
        "two", [AudioSource("file", [n], str(sounds / f"{n}.wav")) for n in (0, 1)], RATE, RATE, 1.0, [0, 1]
    )
    supervisions = make_cuts(sounds)[0].supervisions
    cuts = [
        MonoCut("a", 0, 1, 1, supervisions, recording=recording),
        MultiCut("b", 0, 1, [0], supervisions, recording=recording),
    ]
    first, second = read_cuts(tmp_path, *cuts)
    assert [row.audio_path for row in (first, second)] == [str(sounds / "1.wav"), str(sounds / "0.wav")]


@pytest.mark.parametrize(
    "line",
    [
        '{"type": "MonoCut"}',
        '{"type": "MonoCut", "recording": {"sources": [{"type": "file", "channels": 0}]}, "channel": 0}',
        '{"type": "MonoCut", "recording": 5, "channel": 0, "duration": 1}',
    ],
)
def test_a_damaged_cut_is_a_bad_row(tmp_path, line):
    (tmp_path / "cuts.jsonl").write_text(line)
    (row,) = read(f"{tmp_path}/cuts.jsonl")
    assert isinstance(row, BadRow) and row.reason in ("bad_json", "unsupported_audio")


@pytest.mark.parametrize("kind", ["flac", "wav"])
def test_lhotse_shar(tmp_path, sounds, placed, kind):
    cuts = make_cuts(sounds, ids="day/cut.{}")
    (tmp_path / "shar").mkdir()
    with SharWriter(tmp_path / "shar", {"recording": kind}, shard_size=2) as writer:
        for cut in cuts:
            writer.write(cut)
    folder = f"{placed(tmp_path)}/shar"
    rows = read(folder, language=None)
    check(rows, sounds)
    shards = [0, 0, 1, 1, 2]
    assert [row.audio_path for row in rows] == [f"{folder}/recording.{shard:06d}.tar" for shard in shards]
    for row, cut in zip(rows, CutSet.from_shar(in_dir=tmp_path / "shar"), strict=True):
        np.testing.assert_array_equal(samples(row), cut.load_audio()[0])


def test_lhotse_shar_of_parts_agrees_with_lhotse(tmp_path, sounds):
    cuts = make_cuts(sounds).cut_into_windows(0.3).modify_ids(lambda name: f"{name}_sp1.1").to_eager()
    for cut in cuts:
        cut.supervisions = [SupervisionSegment("s", cut.recording_id, 0, 0.1, text="word")]
    cuts.to_shar(tmp_path, {"recording": "flac"}, shard_size=8)
    rows = read(str(tmp_path))
    for row, cut in zip(rows, CutSet.from_shar(in_dir=tmp_path), strict=True):
        assert row.offset_ms == 0
        np.testing.assert_array_equal(samples(row), cut.load_audio()[0])


def test_shar_shards_may_be_plain_in_several_folders_named_one_by_one_and_beside_other_tars(tmp_path, sounds):
    cuts = make_cuts(sounds)
    for name, part in (("a", cuts.subset(first=2)), ("b", cuts.subset(last=3))):
        (tmp_path / name).mkdir()
        part.to_shar(tmp_path / name, {"recording": "wav"})
    packed = tmp_path / "a" / "cuts.000000.jsonl.gz"
    (tmp_path / "a" / "cuts.000000.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    check(read((f"{tmp_path}/a", f"{tmp_path}/b/cuts.000000.jsonl.gz")), sounds)
    (tmp_path / "b" / "recording.000000.tar").rename(tmp_path / "recording.000000.tar")
    (row, *_) = read(f"{tmp_path}/b", audio=str(tmp_path))
    assert row.audio_path == f"{tmp_path}/recording.000000.tar"


def test_a_shar_set_in_one_piece(tmp_path, sounds):
    with SharWriter(tmp_path, {"recording": "wav"}, shard_size=None) as writer:
        for cut in make_cuts(sounds):
            writer.write(cut)
    check(read(f"{tmp_path}/cuts.jsonl.gz"), sounds)
    check(read(str(tmp_path), "lhotse_shar"), sounds)


def test_what_a_shar_folder_lacks_is_named(tmp_path, sounds):
    make_cuts(sounds).to_shar(tmp_path, {"recording": "wav"})
    (tmp_path / "recording.000000.tar").unlink()
    with pytest.raises(ManifestError, match="corpus c: .*cuts.000000.jsonl.gz has no tar.*recording.000000.tar"):
        read(str(tmp_path))
    (tmp_path / "cuts.000000.jsonl.gz").unlink()
    with pytest.raises(ManifestError, match="corpus c: .* holds no cuts"):
        read(str(tmp_path), "lhotse_shar")


def test_a_shar_cut_without_audio_is_named(tmp_path, sounds):
    cuts = [cut_of(sounds), MonoCut("none", 0, 1, 0, make_cuts(sounds)[0].supervisions)]
    CutSet.from_cuts(cuts).to_shar(tmp_path, {"recording": "wav"})
    good, bad = read(str(tmp_path))
    assert isinstance(good, Utterance) and (bad.line, bad.reason) == (2, "unsupported_audio")


# Parquet


HUGGING_FACE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def embedded(sounds):
    return pa.array([{"bytes": (sounds / f"{n}.wav").read_bytes(), "path": f"{n}.wav"} for n in range(5)], HUGGING_FACE)


@pytest.mark.parametrize(
    ("text", "has_duration"),
    [("text", True), ("sentence", False), ("transcription", True), ("normalized_text", False)],
)
def test_parquet_with_embedded_audio(tmp_path, sounds, placed, has_duration, text):
    table = pa.table({"audio": embedded(sounds), text: TEXTS, "lang": ["de"] * 5})
    if has_duration:
        table = table.append_column("duration", pa.array([1 + n / 10 for n in range(5)]))
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=2)
    folder = placed(tmp_path)
    rows = read(folder, chunk_bytes=1)
    check(rows, sounds)
    assert [row.member for row in rows] == ["0", "1", "2", "3", "4"]
    assert {(row.audio_path, row.source_lang) for row in rows} == {(f"{folder}/train-00000-of-00001.parquet", "de")}
    assert read(folder, chunk_bytes=1 << 30) == rows


def test_parquet_with_paths(tmp_path, sounds, placed):
    names = [f"{number}.wav" for number in range(5)]
    for name in names:
        (tmp_path / name).write_bytes((sounds / name).read_bytes())
    (tmp_path / "3.wav").rename(tmp_path / "3")
    names[3] = "3"  # not a row number
    for kind, audio in {"text": names, "struct": [{"bytes": None, "path": name} for name in names]}.items():
        audio = pa.array(audio, HUGGING_FACE if kind == "struct" else pa.string())
        pq.write_table(pa.table({"audio": audio, "text": TEXTS}), tmp_path / f"{kind}.parquet")
    folder = placed(tmp_path)
    for kind in ("text", "struct"):
        rows = read(f"{folder}/{kind}.parquet")
        check(rows, sounds)
        assert [row.member for row in rows] == [""] * 5


def test_parquet_with_both_and_with_neither(tmp_path, sounds):
    data, path = (sounds / "0.wav").read_bytes(), str(sounds / "1.wav")
    audio = [
        {"bytes": data, "path": "x"},
        {"bytes": None, "path": path},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"RIFF", "path": None},
    ]
    table = pa.table({"audio": pa.array(audio, HUGGING_FACE), "text": TEXTS})
    for has_duration in (False, True):
        if has_duration:
            table = table.append_column("duration", pa.array([1.0] * 5))
        pq.write_table(table, tmp_path / "x.parquet")
        inside, outside, *bad = read(f"{tmp_path}/x.parquet", chunk_bytes=1)
        np.testing.assert_array_equal(samples(inside), wave(sounds, 0))
        np.testing.assert_array_equal(samples(outside), wave(sounds, 1)[: len(samples(outside))])
        reasons = [(row.line, row.reason) for row in bad if isinstance(row, BadRow)]
        assert reasons == [(3, "missing_field"), (4, "missing_field")] + [(5, "bad_audio")] * (not has_duration)


def test_parquet_with_bytes_alone_and_other_fields(tmp_path, sounds):
    table = pa.table(
        {
            "audio": embedded(sounds).field("bytes"),
            "text": TEXTS,
            "offset": [0, 0.5, None, 0, 0],
            "language": ["de"] * 5,
            "pnc": [None, "no", None, None, "maybe"],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    *rows, bad = read(f"{tmp_path}/x.parquet", language=None)
    assert [(row.offset_ms, row.duration_ms, row.source_lang, row.pnc) for row in rows] == [
        (0, 1000, "de", True),
        (500, 600, "de", False),
        (0, 1200, "de", True),
        (0, 1300, "de", True),
    ]
    assert (bad.line, bad.reason) == (5, "bad_slot")
    # A corpus' language overrides a column that may hold a word like German.
    assert read(f"{tmp_path}/x.parquet", language="en")[0].source_lang == "en"


def test_embedded_audio_is_not_read_for_rows_with_durations(tmp_path):
    audio = pa.array([{"bytes": b"x" * 300_000, "path": None}] * 20, HUGGING_FACE)
    table = pa.table({"audio": audio, "text": ["x"] * 20, "duration": [1.0] * 20})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)
    # What is overwritten can't be read as Parquet.
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    assert [row.member for row in read(str(path))] == [str(n) for n in range(20)]
    with pytest.raises(StorageReadError, match="x.parquet as Parquet"):
        read_audio_bytes(str(path), [3])


def test_embedded_audio_is_found_by_row(tmp_path):
    data = [None if n == 150 else b"%d" % n for n in range(200)]
    audio = pa.array([{"bytes": recording, "path": None} for recording in data], HUGGING_FACE)
    pq.write_table(pa.table({"audio": audio, "text": ["x"] * 200}), tmp_path / "x.parquet", row_group_size=90)
    rows = [199, 0, 63, 64, 65, 89, 90, 90]
    assert read_audio_bytes(f"{tmp_path}/x.parquet", rows) == {row: b"%d" % row for row in rows}
    for row in (150, 200):
        with pytest.raises(StorageReadError, match=f"holds no audio in row {row + 1}"):
            read_audio_bytes(f"{tmp_path}/x.parquet", [0, row])


def test_chunks_of_parquet_are_row_groups_of_about_that_size(tmp_path):
    audio = pa.array([{"bytes": bytes([n]) * 1000, "path": None} for n in range(10)], HUGGING_FACE)
    pq.write_table(
        pa.table({"audio": audio, "text": ["x"] * 10}), tmp_path / "x.parquet", row_group_size=2, use_dictionary=False
    )
    group = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0).total_byte_size
    for size, spans in {1: [2, 4, 6, 8, 10], 2 * group: [4, 8, 10], 1 << 20: [10]}.items():
        chunks = plan_chunks([Corpus("c", f"{tmp_path}/*.parquet")], size)
        assert [chunk.end for chunk in chunks] == spans
        assert [chunk.first_line for chunk in chunks] == [1, *(end + 1 for end in spans[:-1])]


def test_what_parquet_lacks_is_named(tmp_path):
    pq.write_table(pa.table({"audio": ["a.wav"], "words": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ManifestError, match="lacks a column; got audio, words; allowed: audio, and one of text"):
        read(f"{tmp_path}/x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ManifestError, match="corpus c: can't read .*x.parquet as Parquet; because"):
        read(f"{tmp_path}/x.parquet")
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(ManifestError, match="corpus c: no .*parquet in"):
        read(f"{tmp_path}", "parquet")


# Audio folders


def fill_folder(folder, sounds):
    (folder / "data").mkdir()
    for number in range(5):
        (folder / "data" / f"{number}.wav").write_bytes((sounds / f"{number}.wav").read_bytes())
    return [f"data/{number}.wav" for number in range(5)]


def test_audiofolder_with_jsonl(tmp_path, sounds, placed):
    names = fill_folder(tmp_path, sounds)
    columns = ["transcription", "text", "sentence", "text", "text"]
    rows = [{"file_name": name, text: words} for name, text, words in zip(names, columns, TEXTS, strict=True)]
    rows[0]["text"] = "less exact"
    (tmp_path / "metadata.jsonl").write_bytes(jsonl(rows))
    check(read(placed(tmp_path), chunk_bytes=60), sounds)


def test_audiofolder_with_csv(tmp_path, sounds, placed):
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription", "duration"])
        for number, name in enumerate(fill_folder(tmp_path, sounds)):
            writer.writerow([name, TEXTS[number].replace(" ", "\n"), "" if number % 2 else 1 + number / 10])
    check(read(placed(tmp_path)), sounds)


def test_rows_of_csv_have_the_numbers_of_their_first_lines(tmp_path, sounds):
    fill_folder(tmp_path, sounds)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,duration,offset,language,_skipme\n"
        '"data/0.wav","one\n\ntwo",,0.25,de,\n'
        "\n"
        "data/1.wav,no comma, please,1,,,\n"
        "data/2.wav,x,soon,,,\n"
        'data/none.wav,"y\n",,,,False\n'
        "data/3.wav,z,1,,,True\n"
        "metadata.csv,w,,,,\n"
    )
    row, *bad = read(str(tmp_path), language=None)
    assert row[:5] == (f"{tmp_path}/data/0.wav", 250, 750, "one two", "de")
    assert [(row.line, row.reason) for row in bad] == [
        (6, "bad_json"),
        (7, "bad_duration"),
        (8, "bad_audio"),
        (10, "skipme"),
        (11, "bad_audio"),
    ]
    assert "no such file" in bad[2].detail


def test_durations_are_measured_where_they_are_missing(tmp_path, sounds):
    fill_folder(tmp_path, sounds)
    rows = [
        {"file_name": "data/0.wav", "text": "x", "duration": 0.5},
        {"file_name": "data/1.wav", "text": "x"},
        {"file_name": "data/2.wav", "text": "x", "offset": 0.2},
        {"file_name": "data/2.wav", "text": "x", "offset": 7},
        {"text": "x"},
        {"file_name": 5, "text": "x"},
        [1],
    ]
    (tmp_path / "metadata.jsonl").write_bytes(jsonl(rows))
    parsed = read(f"{tmp_path}/metadata.jsonl", "audiofolder")
    assert [row.duration_ms for row in parsed[:3]] == [500, 1100, 1000]
    assert [(row.line, row.reason) for row in parsed[3:]] == [
        (4, "bad_duration"),
        (5, "missing_field"),
        (6, "missing_field"),
        (7, "bad_json"),
    ]


def test_a_broken_csv_is_an_error(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.wav,\xff\n")
    with pytest.raises(StorageReadError, match="can't read .*metadata.csv to its end; because .*utf-8"):
        read(str(tmp_path))


# All


def test_a_format_is_detected_from_the_files(tmp_path, sounds):
    def actual(path, **settings):
        return find_format(Corpus("c", path, **settings), [path])

    (tmp_path / "m.json").write_bytes(jsonl([{"audio_filepath": "a.wav", "duration": 1, "text": 'the final "Cut"'}]))
    assert actual(f"{tmp_path}/m.json") == "nemo"
    assert actual(f"{tmp_path}/m.json", audio="s3://speech/audio_{0..7}.tar") == "nemo_tarred"
    make_cuts(sounds).to_jsonl(tmp_path / "c.jsonl.gz")
    assert actual(f"{tmp_path}/c.jsonl.gz") == "lhotse_cuts"
    (tmp_path / "shar").mkdir()
    make_cuts(sounds).to_shar(tmp_path / "shar", {"recording": "wav"})
    assert actual(f"{tmp_path}/shar/cuts.000000.jsonl.gz") == "lhotse_shar"
    for name, file in [
        ("lhotse_shar", "cuts.000000.jsonl.gz"),
        ("parquet", "a.parquet"),
        ("audiofolder", "metadata.csv"),
        ("audiofolder", "metadata.jsonl"),
    ]:
        (folder := tmp_path / file).mkdir()
        (folder / file).touch()
        assert actual(str(folder)) == name
    assert actual("s3://speech/x.parquet") == "parquet"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="corpus c: can't tell what .*empty holds"):
        actual(f"{tmp_path}/empty")


@pytest.mark.parametrize("name", ["nemo", "nemo_tarred", "lhotse_cuts", "lhotse_shar", "parquet", "audiofolder", None])
def test_a_corpus_whose_files_are_missing_is_named(tmp_path, name):
    for path in (f"{tmp_path}/none.jsonl", f"{tmp_path}/none_*.jsonl"):
        with pytest.raises(ManifestError, match="^corpus spoken: .*none.*RAYTRAIN_DATA_ROOT"):
            plan_chunks([Corpus("spoken", path, name, audio=f"{tmp_path}/none.tar")])


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2),
    st.floats(),
    st.just(1e300),
    st.just([1]),
    st.just({"a": 1}),
    st.sampled_from(["", " ", "x", "en", "<|de|>", "<|en", "yes", "no", "<|nopnc|>", "asr"]),
)
FIELDS = (
    "audio_filepath",
    "duration",
    "offset",
    "text",
    "source_lang",
    "lang",
    "target_lang",
    "pnc",
    "_skipme",
    "taskname",
    "itn",
    "timestamp",
    "unknown",
)
plain = st.fixed_dictionaries(
    {
        "audio_filepath": st.sampled_from(["a.wav", "/b.wav", "s3://c/d.wav"]),
        "duration": st.floats(0.0001, 100),
        "text": st.sampled_from(["one", " one  two\n"]),
    },
    optional={"offset": st.floats(0, 9), "lang": st.sampled_from(["en", "<|de|>"]), "pnc": st.booleans()},
)
spoilt = st.builds(lambda row, change: {**row, **change}, plain, st.dictionaries(st.sampled_from(FIELDS), odd))
raw_rows = st.one_of(plain, spoilt, spoilt, st.none(), st.just(("bad_audio", "broken")), st.sampled_from([5, [1], "x"]))


@given(rows=st.lists(raw_rows, max_size=6), language=st.sampled_from([None, "en"]))
@settings(max_examples=400, deadline=None)
def test_a_block_gives_each_row_the_same_result_as_the_parser_alone(rows, language):
    chunk = Chunk("/m/m.jsonl", 0, 1, language=language)
    numbers = range(5, 5 + len(rows))
    block = RowParser(chunk).block(numbers, rows)
    alone = {number: RowParser(chunk).parse(row) for number, row in zip(numbers, rows, strict=True) if row is not None}
    assert block.num_lines == len(rows)
    assert dict(zip(block.numbers.tolist(), map(repr, block.utterances()), strict=True)) == {
        number: repr(actual) for number, actual in alone.items() if isinstance(actual, Utterance)
    }
    assert [(row.line, row.reason, row.detail) for row in block.bad] == [
        (number, *actual) for number, actual in alone.items() if not isinstance(actual, Utterance)
    ]
    assert all(key.__class__ is PromptKey for key in block.prompts)
    assert all(math.isfinite(row.duration_ms) and row.duration_ms > 0 for row in block.utterances())
