"""Files by path and by URI: patterns, ranges, compressed streams, and readable errors."""

import gzip
import uuid

import fsspec
import pyarrow as pa
import pytest

from raytrain.storage.filesystem import (
    bare_name,
    file_size,
    file_sizes,
    fingerprint,
    is_folder,
    list_files,
    open_stream,
    read_range,
)
from raytrain.storage.locations import StorageReadError, absolute, locate, parent
from raytrain.storage.patterns import expand


@pytest.fixture(params=["local", "file", "s3", "memory"])
def folder_and_write(request, tmp_path):
    """(a folder or URI, a function that writes a file into it)."""
    folder = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://box/{uuid.uuid4().hex}"}.get(
        request.param
    ) or f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"

    def write(name, data):
        if request.param == "memory":
            fsspec.filesystem("memory").pipe(f"{folder}/{name}", data)
        elif request.param == "s3":
            filesystem, path = locate(f"{folder}/{name}")
            with filesystem.open_output_stream(path, compression=None) as file:
                file.write(data)
        else:
            (tmp_path / name).write_bytes(data)

    return folder, write


def test_files_are_sized_listed_and_read_by_range(folder_and_write):
    folder, write = folder_and_write
    for name in ("b c#%.bin", "a.bin", "a.txt"):
        write(name, b"0123456789")
    assert list_files(folder, "*.bin") == [f"{folder}/a.bin", f"{folder}/b c#%.bin"]
    assert expand(f"{folder}/*.bin") == list_files(folder, "*.bin")
    assert file_sizes(list_files(folder)) == [10, 10, 10]
    assert read_range(f"{folder}/b c#%.bin", 3, 4) == b"3456"
    assert read_range(f"{folder}/a.bin", 0, 0) == b"0123456789"
    assert is_folder(folder) and not is_folder(f"{folder}/a.bin") and not is_folder(f"{folder}/none")
    assert fingerprint(f"{folder}/a.bin")[0] == 10


def test_a_range_that_is_not_there_is_an_error(folder_and_write):
    folder, write = folder_and_write
    write("a.bin", b"0123456789")
    with pytest.raises(StorageReadError, match="a.bin is truncated; got 2 bytes starting at 8; allowed: 4"):
        read_range(f"{folder}/a.bin", 8, 4)


@pytest.mark.parametrize("action", [file_size, open_stream, fingerprint, lambda path: read_range(path, 0, 1)])
def test_a_missing_file_is_named(folder_and_write, action):
    folder, write = folder_and_write
    write("a.bin", b"0")
    with pytest.raises(StorageReadError, match="^can't read .*none.bin; because no such file or directory; to do"):
        action(f"{folder}/none.bin")


def test_a_missing_file_among_many_is_named(folder_and_write):
    folder, write = folder_and_write
    write("a.bin", b"0")
    with pytest.raises(StorageReadError, match="none.bin; because no such file"):
        file_sizes([f"{folder}/a.bin", f"{folder}/none.bin"])


def test_a_folder_is_not_a_file(folder_and_write):
    folder, write = folder_and_write
    write("a.bin", b"0")
    with pytest.raises(StorageReadError, match="because is a directory"):
        file_size(folder)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".GZ"])
def test_streams_are_decompressed_by_their_ending(folder_and_write, ending):
    folder, write = folder_and_write
    text = b"one\ntwo\n" * 1000
    codec = {"gz": "gzip", "zst": "zstd"}.get(ending[1:].lower())
    write(f"m.jsonl{ending}", pa.compress(text, codec, asbytes=True) if codec else text)
    with open_stream(f"{folder}/m.jsonl{ending}") as file:
        assert file.read() == text


def test_several_gzip_members_are_one_stream(tmp_path):
    (tmp_path / "m.gz").write_bytes(gzip.compress(b"one") + gzip.compress(b"two"))
    with open_stream(str(tmp_path / "m.gz")) as file:
        assert file.read() == b"onetwo"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("m_{0..2}.json", ["m_0.json", "m_1.json", "m_2.json"]),
        ("m__OP_0..2_CL_.json", ["m_0.json", "m_1.json", "m_2.json"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{8..010}", ["008", "009", "010"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}_{0..1}", ["a_0", "a_1", "b_0", "b_1"]),
        ("_OP_a,b_CL_", ["a", "b"]),
        ("s3://{x,y}/m", ["s3://x/m", "s3://y/m"]),
        ("{id}/m[1].json", ["{id}/m[1].json"]),
        ("plain", ["plain"]),
    ],
)
def test_a_pattern_expands_to_names(pattern, names):
    assert expand(pattern) == names


def test_braces_and_stars_go_together(tmp_path):
    for name in ("x_1.json", "x_2.json", "y_1.json", "z_1.json"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/{{x,y}}_*.json") == [f"{tmp_path}/{name}_{n}.json" for name, n in ("x1", "x2", "y1")]
    assert expand(f"{tmp_path}/?_2.json") == [f"{tmp_path}/x_2.json"]


@pytest.mark.parametrize(
    "pattern", ["{0..1000000}", "{9999999999999..0}", "{0..999}{0..999}{0..999}", "{0..99999}{0..99999}{0..99999}"]
)
def test_a_pattern_for_too_many_files_is_refused_at_once(pattern):
    with pytest.raises(StorageReadError, match="matches too many files; allowed: 1000000"):
        expand(pattern)


def test_a_star_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(StorageReadError, match="no file matches .*none_"):
        expand(f"{tmp_path}/none_*")
    with pytest.raises(StorageReadError, match="can't list .*gone; because no such file"):
        expand(f"{tmp_path}/gone/*")


def test_an_unknown_filesystem_is_refused():
    with pytest.raises(StorageReadError, match="no filesystem for carrier-pigeon://loft; .*Protocol not known"):
        file_size("carrier-pigeon://loft/m.jsonl")


def test_a_missing_bucket_is_named(s3):
    with pytest.raises(StorageReadError, match="^can't .*s3://no-such-bucket/m.jsonl"):
        file_size("s3://no-such-bucket/m.jsonl")


def test_paths_are_put_together_by_their_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("m.jsonl") == str(tmp_path / "m.jsonl")
    assert absolute("m.jsonl", "s3://speech/") == "s3://speech/m.jsonl"
    assert absolute("/data/m.jsonl", "s3://speech") == "/data/m.jsonl"
    assert absolute("s3://speech/m.jsonl", "/data") == "s3://speech/m.jsonl"
    assert (parent("/m.jsonl"), parent("s3://speech/a/m.jsonl")) == ("/", "s3://speech/a")
    assert (bare_name("a/m.jsonl.gz"), bare_name("a/m.tar")) == ("m.jsonl", "m.tar")
