"""A manifest's rows get the audio of the tar with its number, in whatever order files are listed."""

import io
import json
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.corpora.reading import plan_chunks, read_chunk
from raytrain.data.corpora.tarred import pair_shards, shard_numbers
from raytrain.data.corpora.types import BadRow, Corpus
from raytrain.data.locator import AudioLocator
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import read_range

# (folder, set): the prefix of the number in manifests and tars, with several sets in some cases.
SETS = (
    [("m_", "a_")],
    [("sharded_manifests/manifest__", "audio__")],
    [("v2/manifest_16k_", "v2/audio_48k_")],
    [
        ("bucket1/sharded_manifests/manifest_", "bucket1/audio_"),
        ("bucket2/sharded_manifests/manifest_", "bucket2/audio_"),
    ],
    [("bucket_1/manifest_", "bucket_1/audio_"), ("bucket_2/manifest_", "bucket_2/audio_")],
    [("manifests/en/m", "tars/en/a"), ("manifests/de/m", "tars/de/a"), ("manifests/pt/m", "tars/pt/a")],
    [("en_manifest_", "en_audio_"), ("de_manifest_", "de_audio_")],
)
ENDINGS = [("", ""), ("_v3", "_v3"), ("", "-16k"), ("-of-64", "-of-64")]


@settings(max_examples=200, deadline=None)
@given(
    sets=st.sampled_from(SETS),
    numbers=st.lists(st.integers(0, 2000), min_size=1, max_size=12, unique=True),
    forms=st.tuples(st.sampled_from(["{}", "{:06d}"]), st.sampled_from(["{}", "{:03d}"])),
    endings=st.sampled_from(ENDINGS),
    packed=st.sampled_from(["", ".gz", ".zst"]),
    seed=st.integers(0, 100),
)
def test_pairs_do_not_depend_on_the_order_of_listing(sets, numbers, forms, endings, packed, seed):
    name, tar_name = (form + ending for form, ending in zip(forms, endings, strict=True))
    expected = {
        f"/d/{manifest_set}{name.format(number)}.json{packed}": f"/d/{tar_set}{tar_name.format(number)}.tar"
        for manifest_set, tar_set in sets
        for number in numbers
    }
    manifests, tars = list(expected), list(expected.values())
    random.Random(seed).shuffle(manifests)
    random.Random(seed + 1).shuffle(tars)
    pairs = pair_shards(manifests, tars)
    assert [path for path, _, _ in pairs] == manifests
    assert {path: tar for path, tar, _ in pairs} == expected
    if len(numbers) > 1:
        assert {number for _, _, number in pairs} == set(numbers)


@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=8, unique=True),
    st.lists(st.integers(0, 50), min_size=2, max_size=8, unique=True),
)
def test_numbers_that_differ_are_refused_by_name(ids, tar_ids):
    manifests, tars = [f"/d/m_{shard}.json" for shard in ids], [f"/d/a_{shard}.tar" for shard in tar_ids]
    if set(ids) == set(tar_ids):
        assert len(pair_shards(manifests, tars)) == len(ids)
        return
    with pytest.raises(ManifestError) as caught:
        pair_shards(manifests, tars)
    alone, tars_alone = set(ids) - set(tar_ids), set(tar_ids) - set(ids)
    assert any(f"/d/m_{shard}.json" in str(caught.value) for shard in alone) == bool(alone)
    assert any(f"/d/a_{shard}.tar" in str(caught.value) for shard in tars_alone) == bool(tars_alone)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("manifests", "tars"),
    [
        (["x/m_0.json", "y/m_0.json"], ["p/a_0.tar", "q/a_0.tar"]),
        (["m_0.json", "m_0.json"], ["a_0.tar", "a_0.tar"]),
        (["m_0.json", "m_00.json"], ["a_0.tar", "b_0.tar"]),
        (["en/m_0.json", "en/n_0.json"], ["en/a_0.tar", "de/a_0.tar"]),
        (["m_3.json"], ["a_7.tar"]),
    ],
)
def test_pairs_that_names_do_not_tell_are_refused(manifests, tars):
    for listed in (manifests, manifests[::-1]):
        with pytest.raises(ManifestError) as caught:
            pair_shards(listed, tars)
        assert any(path in str(caught.value) for path in manifests) and any(tar in str(caught.value) for tar in tars)


def test_names_without_numbers_go_by_their_words_or_in_order():
    assert pair_shards(["b.json", "a.json.gz"], ["a.tar", "b.tar"]) == [
        ("b.json", "b.tar", None),
        ("a.json.gz", "a.tar", None),
    ]
    assert pair_shards(["b.json", "a.json"], ["x.tar", "y.tar"]) == [
        ("b.json", "x.tar", None),
        ("a.json", "y.tar", None),
    ]
    assert pair_shards(["train_v2.json"], ["audio.tar"]) == [("train_v2.json", "audio.tar", None)]
    assert pair_shards(["dev_16k.json"], ["audio_0.tar"]) == [("dev_16k.json", "audio_0.tar", None)]
    assert shard_numbers(["a-00003-of-00008.tar"]) == [3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve shards whose members have the same names in each; a member holds the number of its shard."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(12):
        rows = [{"audio_filepath": f"{i}.flac", "duration": 1, "text": f"{number}", "shard_id": number} for i in (0, 1)]
        (folder / f"manifest_{number}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with tarfile.open(folder / f"audio_{number}.tar", "w") as tar:
            for i in (0, 1):
                data, info = f"{number}".encode(), tarfile.TarInfo(f"{i}.flac")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize(
    ("path", "audio"),
    [
        ("manifest_*.json", "audio__OP_0..11_CL_.tar"),
        ("manifest_{11..0}.json", "audio_*.tar"),
        (tuple(f"manifest_{n}.json" for n in sorted(map(str, range(12)))), "audio_{0..11}.tar"),
    ],
)
def test_every_row_gets_the_audio_of_its_shard(shards, path, audio):
    chunks = plan_chunks([Corpus("c", path, "nemo_tarred", audio=audio, language="en").below(str(shards))])
    seen = []
    for chunk in chunks:
        finder = AudioLocator(chunk)
        for row in read_chunk(chunk):
            (file,), (start,), (size,), (problem,) = finder.locate([row.member])
            assert problem is None and read_range(file, start, size).decode() == row.text
            seen.append(row.text)
    assert sorted(seen) == sorted([str(number) for number in range(12)] * 2)


@pytest.mark.parametrize("shard_id", [4, "4", None, "absent"])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_row_of_another_shard_is_a_bad_row(tmp_path, shard_id, wrong):
    row = {"audio_filepath": "0.flac", "duration": 1, "text": "one", "lang": "en"} | (
        {} if shard_id == "absent" else {"shard_id": shard_id}
    )
    for number in (4, 5):
        extra = [{**row, "shard_id": 9 if wrong else number}] if wrong else []
        rows = [row if number == 4 else {**row, "shard_id": 5}, *extra]
        (tmp_path / f"m_{number}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"a_{number}.tar").touch()
    corpus = Corpus("c", f"{tmp_path}/m_*.json", audio=f"{tmp_path}/a_*.tar")
    rows_read = [row for chunk in plan_chunks([corpus]) for row in read_chunk(chunk)]
    bad = [row for row in rows_read if isinstance(row, BadRow)]
    assert len(rows_read) - len(bad) == 2
    assert [(row.reason, row.line) for row in bad] == ([("wrong_shard", 2)] * 2 if wrong else [])


def test_shar_shards_never_share_a_tar(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cuts.000000.jsonl").touch()
        (tmp_path / name / "recording.000000.tar").touch()
    folders = (f"{tmp_path}/a", f"{tmp_path}/b")
    rows_read = plan_chunks([Corpus("c", folders, "lhotse_shar")])
    assert [chunk.audio for chunk in rows_read] == [f"{folder}/recording.000000.tar" for folder in folders]
    with pytest.raises(ManifestError, match=r"/a/cuts.000000.jsonl and .*/b/cuts.000000.jsonl, both with"):
        plan_chunks([Corpus("c", folders, "lhotse_shar", audio=f"{tmp_path}/a")])
