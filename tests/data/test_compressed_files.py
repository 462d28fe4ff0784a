"""Files that do not match their extension, or end early, raise errors that name them and a remedy."""

import gzip
import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.corpora.reading import plan_chunks, read_chunk
from raytrain.data.corpora.types import Corpus
from raytrain.errors import ManifestError
from raytrain.operations.run_storage import read_start
from raytrain.storage.filesystem import open_file, open_stream
from raytrain.storage.locations import StorageReadError

ROWS = b"".join(
    b'{"audio_filepath":"%d.flac","duration":1,"text":"one %x","lang":"en"}\n' % (n, n**5) for n in range(200)
)
ENDINGS = ("gz", "zst")


def compressed(ending: str, data: bytes = ROWS) -> bytes:
    import pyarrow

    return gzip.compress(data) if ending == "gz" else bytes(pyarrow.compress(data, "zstd", asbytes=True))


def read_all(path: str) -> bytes:
    with open_stream(path) as file:
        return b"".join(iter(lambda: file.read(1000), b""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compressed")


@settings(max_examples=60, deadline=None)
@given(ending=st.sampled_from(ENDINGS), share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_an_error_with_its_name(folder, ending, share):
    path, whole = folder / f"m.jsonl.{ending}", compressed(ending)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(StorageReadError, match=f"m.jsonl.{ending}.*to do: check it with"):
        read_all(str(path))


@settings(max_examples=60, deadline=None)
@given(ending=st.sampled_from(ENDINGS), data=st.binary(max_size=3000))
def test_uncompressed_bytes_are_an_error_or_are_read_as_they_are(folder, ending, data):
    path = folder / f"m.jsonl.{ending}"
    path.write_bytes(data)
    try:
        read_all(str(path))
    except StorageReadError as error:
        assert f"m.jsonl.{ending}" in str(error) and error.remedy
    path.write_bytes(compressed(ending, data))
    assert read_all(str(path)) == data


DAMAGES = {
    "plain": lambda whole: ROWS,
    "cut": lambda whole: whole[: len(whole) // 2],
    "cut in its head": lambda whole: whole[:5],
    "empty": lambda whole: b"",
    "garbage": lambda whole: whole[:40] + np.random.default_rng(1).bytes(400),
    "garbage after it": lambda whole: whole + b"garbage" * 20,
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [None, "nemo", "lhotse_cuts", "nemo_tarred", "lhotse_shar"])
def test_every_reader_names_a_file_that_can_not_be_decompressed(tmp_path, name, damage, ending):
    path = tmp_path / f"cuts.000.jsonl.{ending}"
    path.write_bytes(DAMAGES[damage](compressed(ending)))
    (tmp_path / "recording.000.tar").touch()
    audio = f"{tmp_path}/recording.000.tar" if name == "nemo_tarred" else None
    with pytest.raises((StorageReadError, ManifestError), match=f"cuts.000.jsonl.{ending}.*check it with") as caught:
        for chunk in plan_chunks([Corpus("c", str(path), name, audio=audio, language="en")]):
            list(read_chunk(chunk))
    assert str(caught.value).isprintable() and "fix its extension" in str(caught.value)
    if damage != "garbage after it":
        assert f".{ending}" in read_start(str(path)) or damage == "cut"


def test_irregular_files_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.jsonl")
    for opened in (open_stream, open_file):
        with pytest.raises(StorageReadError, match="m.jsonl.*it is a pipe"):
            opened(str(tmp_path / "m.jsonl"))
        with pytest.raises(StorageReadError, match="it is a folder"):
            opened(str(tmp_path))
    for path in (f"{tmp_path}/m.jsonl", "/dev/zero"):
        for name in (None, "nemo"):
            with pytest.raises(ManifestError, match=path):
                plan_chunks([Corpus("c", path, name)])


def test_a_stream_can_be_read_as_text(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(compressed("gz", "a,é\n1,2\n".encode()))
    with open_stream(str(tmp_path / "a.csv.gz")) as file:
        assert io.TextIOWrapper(file, "utf-8").read() == "a,é\n1,2\n"
