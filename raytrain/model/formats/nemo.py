"""NeMo archives: a tar of `model_config.yaml`, `model_weights.ckpt` and the tokenizer's SentencePiece models.

    parts = read_nemo(Path("canary-180m-flash.nemo"))
    write_nemo(Path("copy.nemo"), parts)              # loads again bit-equal, here and in NeMo

An archive is untrusted. Nothing is extracted by the names it holds, only plain tar or gzip with regular files
is read, sizes are limited, and weights load with `weights_only` from an uncompressed torch archive.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import reprlib
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import torch

from raytrain.errors import CheckpointError
from raytrain.model.formats.nemo_config import model_config_of, nemo_config_of
from raytrain.model.formats.portable import ModelParts, check_state, float32_state
from raytrain.model.formats.sentencepieces import PLAIN_NAME, SPECIAL_TOKENS, Piece, read_pieces
from raytrain.storage.yaml_loading import load_yaml

MAX_BYTES = 16 << 30
_MAX_MEMBERS, _MAX_YAML, _MAX_TOKENIZER = 10_000, 4 << 20, 64 << 20
_BLOCK = 4 << 20
_SAVE_AGAIN = "save the model again with NeMo's save_to"
_MAX_HEADER = 1 << 20
# Exceptions of the standard library's readers for damaged or malicious archives.
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    OverflowError,
    struct.error,
    tarfile.TarError,
    zlib.error,
    zipfile.BadZipFile,
)
Members = dict[str, tarfile.TarInfo]


def read_nemo(path: Path, *, max_bytes: int = MAX_BYTES) -> ModelParts:
    """Settings, weights (float32) and tokenizer of an archive.

    Raises `CheckpointError` if it can't be read, is larger than `max_bytes` (unpacked), is unsafe, or holds a model
    that differs from the published Canary; the message lists every difference.
    """
    path = Path(path)
    try:
        with _open(path, max_bytes) as archive:
            members = _members(archive, path, max_bytes)
            raw = _yaml(_read(archive, members, "model_config.yaml", _MAX_YAML, path), path)
            tokenizers = _tokenizers(archive, members, raw, path)
            config = model_config_of(raw, vocab_size=_vocab_size(tokenizers, path), source=str(path))
            state = _weights(archive, members, path)
            check_state(config, state)
            if sum(value.numel() * 4 for value in state.values()) > max_bytes:
                raise _too_large(path, max_bytes)
    except _DAMAGED as error:
        raise CheckpointError(
            f"{path} can't be read as a .nemo archive",
            why=str(error) or "it is damaged",
            remedy="download the archive again and compare its size; a model is a .nemo file or a folder",
        ) from error
    return ModelParts(config, float32_state(state), tokenizers)


class _Member(tarfile.TarInfo):
    """A member whose extended headers have a plausible size, since tarfile reads them whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        )
        if self.type in headers and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # tarfile's hook has no type: it is private


@contextlib.contextmanager
def _open(path: Path, max_bytes: int) -> Iterator[tarfile.TarFile]:
    """The tar; a gzip is first unpacked into an anonymous file, up to the limit."""
    with open(path, "rb") as file, tempfile.TemporaryFile() as unpacked:
        plain: BinaryIO = file
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            with gzip.GzipFile(fileobj=file) as packed:
                _copy(packed, unpacked, max_bytes, path)
            plain = unpacked
        plain.seek(0)
        with tarfile.open(fileobj=plain, mode="r:", tarinfo=_Member) as archive:
            yield archive


def _copy(source: gzip.GzipFile, target: BinaryIO, limit: int, path: Path) -> None:
    copied = 0
    while block := source.read(_BLOCK):
        copied += len(block)
        if copied > limit:
            raise _too_large(path, limit)
        target.write(block)
    target.seek(0)


def _too_large(path: Path, limit: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is too large",
        allowed=f"at most {limit} bytes unpacked",
        remedy="raise the limit for a model that you trust",
    )


def _members(archive: tarfile.TarFile, path: Path, max_bytes: int) -> Members:
    """Regular files by plain name. Anything but folders and regular files inside the archive is refused."""
    members: Members = {}
    total = 0
    for number, member in enumerate(archive):
        if number > _MAX_MEMBERS:
            raise _too_large(path, max_bytes)
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name:
            raise CheckpointError(
                f"{path} holds a file that escapes its folder",
                got=reprlib.repr(member.name),
                remedy="don't unpack it; download the model from a source that you trust",
            )
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise CheckpointError(
                f"{path} holds a link, device or sparse file",
                got=reprlib.repr(member.name),
                remedy="unpack the archive, replace such members with plain files, and pack it again with tar",
            )
        total += member.size
        if total > max_bytes:
            raise _too_large(path, max_bytes)
        if str(name) in members:
            raise CheckpointError(
                f"{path} holds two files with the same name",
                got=reprlib.repr(member.name),
                remedy=_SAVE_AGAIN,
            )
        members[str(name)] = member
    return members


def _read(archive: tarfile.TarFile, members: Members, name: str, limit: int, path: Path) -> bytes:
    member = members.get(name)
    if member is None:
        raise CheckpointError(
            f"{path} lacks {name}",
            got=", ".join(sorted(members)[:8]) or "an empty archive",
            remedy="name a .nemo archive of an EncDecMultiTaskModel, and download it again if it is supposed to be one",
        )
    if member.size > limit:
        raise CheckpointError(
            f"{name} in {path} is too large",
            got=member.size,
            allowed=f"at most {limit} bytes",
            remedy="download the archive again; a genuine model's file is never that large",
        )
    return _open_member(archive, member).read()


def _open_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file is not None, "`_members` holds regular files only"
    return file


def _yaml(data: bytes, path: Path) -> dict[str, Any]:
    try:
        raw = load_yaml(data, _MAX_YAML)
    except ValueError as error:
        raise CheckpointError(
            f"model_config.yaml in {path} is not valid YAML",
            why=str(error),
            remedy=_SAVE_AGAIN,
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"model_config.yaml in {path} holds no settings",
            got=type(raw).__name__,
            remedy=_SAVE_AGAIN,
        )
    return raw


def _tokenizers(archive: tarfile.TarFile, members: Members, raw: Mapping[str, object], path: Path) -> dict[str, bytes]:
    section = raw.get("tokenizer")
    languages = section.get("langs") if isinstance(section, dict) else None
    languages = languages if isinstance(languages, dict) else {}
    _check_names(languages, path)
    tokenizers = {}
    for language, entry in languages.items():
        reference = entry.get("model_path") if isinstance(entry, dict) else None
        if not isinstance(language, str) or not PLAIN_NAME.fullmatch(language):
            raise CheckpointError(
                f"{path} has a language that is not a plain name",
                got=reprlib.repr(language),
                remedy="rename the language in model_config.yaml (tokenizer.langs) to letters, digits, - and _",
            )
        if not isinstance(reference, str) or not reference.startswith("nemo:"):
            raise CheckpointError(
                f"{path} names no SentencePiece model for {language}",
                got=reprlib.repr(reference),
                allowed="model_path: nemo:<file>",
                remedy=f"{_SAVE_AGAIN}, which puts the tokenizers into the archive",
            )
        tokenizers[language] = _read(archive, members, reference.removeprefix("nemo:"), _MAX_TOKENIZER, path)
    return tokenizers


def _check_names(languages: Mapping[str, object], source: Path | str) -> None:
    if next(iter(languages), None) != SPECIAL_TOKENS or len(languages) < 2:
        raise CheckpointError(
            f"{source} has no aggregate tokenizer",
            got=reprlib.repr(list(languages)),
            allowed=f"{SPECIAL_TOKENS} first, then at least one language",
            why="prompts are looked up in the special-token model",
            remedy="use a Canary with an aggregate tokenizer, as all published models have",
        )


def _vocab_size(tokenizers: dict[str, bytes], path: Path) -> int:
    return sum(len(_pieces(name, proto, path)) for name, proto in tokenizers.items())


def _pieces(name: str, proto: bytes, path: Path | str) -> list[Piece]:
    try:
        return read_pieces(proto)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the tokenizer {name} of {path} can't be read",
            why=str(error),
            remedy="download the archive again, or save the model again with NeMo's save_to",
        ) from error


def _weights(archive: tarfile.TarFile, members: Members, path: Path) -> dict[str, torch.Tensor]:
    """The weights as saved, under NeMo's names."""
    member = members.get("model_weights.ckpt")
    if member is None:
        raise CheckpointError(
            f"{path} lacks model_weights.ckpt",
            got=", ".join(sorted(members)[:8]),
            remedy=f"{_SAVE_AGAIN}; sharded (distributed) weights are not read",
        )
    file = _open_member(archive, member)
    _check_stored(file, path)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Torch's own message advises loading without protection.
        raise CheckpointError(
            f"the weights of {path} can't be loaded",
            why="the file is damaged or holds something other than tensors",
            remedy="download the archive again; if it holds more than tensors, save it again with NeMo's save_to",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise CheckpointError(
            f"the weights of {path} are not a flat dictionary of tensors",
            remedy=f"{_SAVE_AGAIN}, not from a training checkpoint (.ckpt)",
        )
    return state


def _check_stored(file: IO[bytes], path: Path) -> None:
    """Refuse a compressed torch archive, and go back to the start of the file."""
    with zipfile.ZipFile(file) as entries:  # raises BadZipFile for the pickle format of torch < 1.6
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.infolist()):
            raise CheckpointError(
                f"the weights of {path} are compressed",
                why="torch never compresses; it could be a decompression bomb",
                remedy=_SAVE_AGAIN,
            )
    file.seek(0)


def write_nemo(path: Path, parts: ModelParts) -> None:
    """Write an archive that NeMo's `EncDecMultiTaskModel.restore_from` and `read_nemo` load bit-equal.

    It appears at `path` complete or not at all. Raises `StorageError` if it can't be written.
    """
    import yaml

    from raytrain.storage.artifacts import atomic_write

    check_state(parts.config, parts.state)
    _check_names(parts.tokenizers, "the model")
    if (size := _vocab_size(parts.tokenizers, Path("the model"))) != parts.config.vocab_size:
        raise CheckpointError(
            "tokenizer and model differ",
            got=f"{size} ids",
            allowed=f"{parts.config.vocab_size} ids",
            remedy="convert from the run folder that has both, without files from elsewhere",
        )
    files: dict[str, bytes] = {}
    langs = {name: _add_tokenizer(files, name, proto) for name, proto in parts.tokenizers.items()}
    config = nemo_config_of(parts.config, langs)
    files["model_config.yaml"] = yaml.safe_dump(config, sort_keys=False).encode()
    with tempfile.TemporaryFile() as weights, atomic_write(Path(path)) as target:
        torch.save({name: value.detach().cpu().contiguous() for name, value in parts.state.items()}, weights)
        with tarfile.open(fileobj=target, mode="w:") as archive:
            for name, data in files.items():
                _add(archive, name, io.BytesIO(data), len(data))
            size = weights.seek(0, os.SEEK_END)
            weights.seek(0)
            _add(archive, "model_weights.ckpt", weights, size)


def _add_tokenizer(files: dict[str, bytes], name: str, proto: bytes) -> dict[str, str]:
    """Add a SentencePiece model with the two listings that NeMo expects next to it; returns its configuration."""
    pieces = _pieces(name, proto, "this model")
    listing = "".join(f"{piece.text}\t{piece.score:g}\n" for piece in pieces).encode()
    words = "".join(f"{piece.text}\n" for piece in pieces).encode()
    entry = {"dir": name, "type": "bpe"}
    for key, ending, data in (
        ("model_path", "tokenizer.model", proto),
        ("vocab_path", "vocab.txt", words),
        ("spe_tokenizer_vocab", "tokenizer.vocab", listing),
    ):
        digest = hashlib.blake2b(name.encode() + b"\0" + data, digest_size=16).hexdigest()
        files[f"{digest}_{ending}"] = data
        entry[key] = f"nemo:{digest}_{ending}"
    return entry


def _add(archive: tarfile.TarFile, name: str, file: BinaryIO, size: int) -> None:
    member = tarfile.TarInfo(f"./{name}")
    member.size, member.mode = size, 0o644
    archive.addfile(member, file)
