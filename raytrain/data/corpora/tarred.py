"""NeMo's tarred sets: `manifest_0.json` names the members of `audio_0.tar`, and so on.

Members may have the same names in every tar, so a manifest paired with the wrong tar would go unnoticed: they are
paired by the numbers in their names, and rows with another `shard_id` are rejected.

Several rows may be spans of one member; NeMo then calls them `name-sub1.wav`, `name-sub2.wav` where the tar holds
`name.wav` (see `tar_index.TarIndex`).
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from raytrain.data.corpora.lines import WHOLE
from raytrain.data.corpora.types import Chunk, Corpus
from raytrain.errors import ManifestError
from raytrain.storage.filesystem import bare_name, file_sizes
from raytrain.storage.patterns import expand

_TOTAL = re.compile(r"[-_.]of[-_.][0-9]+$")
_AT_END = re.compile(r"(?:^|[-_.])[0-9]+$")
_WORD = re.compile(r"[^\W_]+")


def make_chunks(corpus: Corpus, paths: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    """One chunk for each manifest and its tar. Raises `ManifestError` if the pairing is ambiguous."""
    patterns = (corpus.audio,) if isinstance(corpus.audio, str) else corpus.audio or ()
    tars = [tar for pattern in patterns for tar in expand(pattern)]
    if len(tars) == len(paths):
        file_sizes([*paths, *tars])  # a missing file fails here, not on a worker
    for path, tar, shard in pair_shards(paths, tars, f"corpus {corpus.name}"):
        yield Chunk(path, 0, WHOLE, audio=tar, first_line=1, shard=shard)


def pair_shards(
    manifests: Sequence[str], tars: Sequence[str], what: str = "corpus"
) -> list[tuple[str, str, int | None]]:
    """(manifest, tar, shard number) of each manifest, in their order.

    If all names have a shard number, files with the same number belong together; if several share a number, those whose
    paths have the most words in common do. Names without numbers are paired by their words (`en.json`, `en.tar`) or, if
    these do not decide, in order, and the shard's number is None. Raises `ManifestError` that names the files if
    numbers differ or several pairings are possible.
    """
    ids, tar_ids = shard_numbers(manifests), shard_numbers(tars)
    lonely = _lonely(manifests, ids, tars, tar_ids) if ids is not None and tar_ids is not None else ""
    if len(manifests) != len(tars):
        raise ManifestError(
            f"{what}: manifests and tars differ in number",
            got=f"{len(manifests)} manifests, {len(tars)} tars" + (f", {lonely}" if lonely else ""),
            allowed="one manifest for each tar",
            remedy="name all manifests in path and all tars in audio",
        )
    if lonely:
        raise ManifestError(
            f"{what}: manifests and tars have different numbers",
            got=lonely,
            allowed="for each manifest the tar with its number, such as manifest_12.json and audio_12.tar",
            remedy="correct path and audio, or rename the files",
        )
    if ids is not None and tar_ids is not None:
        matched = _matched(list(zip(manifests, ids, strict=True)), list(zip(tars, tar_ids, strict=True)), what)
        return list(zip(manifests, matched, ids, strict=True))
    try:
        matched = _matched([(path, 0) for path in manifests], [(tar, 0) for tar in tars], what)
    except ManifestError:
        matched = list(tars)
    return [(path, tar, None) for path, tar in zip(manifests, matched, strict=True)]


def _matched(manifests: Sequence[tuple[str, int]], tars: Sequence[tuple[str, int]], what: str) -> list[str]:
    """The tar of each (manifest, number): among the tars with that number, the one that has the most words in common.
    Raises `ManifestError` if the pairing is not one to one.
    """
    tars_of: dict[int, list[tuple[str, Counter[str]]]] = {}
    for tar, number in tars:
        tars_of.setdefault(number, []).append((tar, _words(tar)))
    first_of: dict[str, str] = {}
    for path, number in manifests:
        words = _words(path)
        ranked = sorted((((words & those).total(), tar) for tar, those in tars_of[number]), reverse=True)[:2]
        if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
            raise _ambiguous(what, f"{path}, which could belong to {ranked[1][1]} or {ranked[0][1]}")
        tar = ranked[0][1]
        if tar in first_of:
            raise _ambiguous(what, f"{first_of[tar]} and {path}, which would both belong to {tar}")
        first_of[tar] = path
    return list(first_of)


def shard_numbers(paths: Sequence[str]) -> list[int] | None:
    """The shard number in each file's name, None if there is none: the last number in which the names differ, or else
    the number at their ends (`audio_3.tar`, `audio-3-of-8.tar`)."""
    stems = [_TOTAL.sub("", _stem(path)) for path in paths]
    numbers = [re.findall(r"[0-9]+", stem) for stem in stems]
    if not all(numbers):
        return None
    columns = list(zip(*numbers, strict=True)) if len(set(map(len, numbers))) == 1 else []
    varying = [column for column in columns if len(set(map(int, column))) > 1]
    if varying:
        return list(map(int, varying[-1]))
    if columns and not all(map(_AT_END.search, stems)):
        return None
    return [int(digits[-1]) for digits in numbers]


def _words(path: str) -> Counter[str]:
    """A path's words and numbers, the numbers without leading zeros."""
    return Counter(str(int(word)) if word.isdecimal() else word for word in _WORD.findall(path))


def _stem(path: str) -> str:
    return posixpath.splitext(bare_name(path))[0]


def _lonely(manifests: Sequence[str], ids: Sequence[int], tars: Sequence[str], tar_ids: Sequence[int]) -> str:
    """Names the first manifest and the first tar whose number the other side lacks, or has less often."""
    lacking = []
    for kind, paths, numbers, counterparts in (("tar", manifests, ids, tar_ids), ("manifest", tars, tar_ids, ids)):
        left = Counter(numbers) - Counter(counterparts)
        lacking += [f"no {kind} for {path}" for path, number in zip(paths, numbers, strict=True) if number in left][:1]
    return " and ".join(lacking)


def _ambiguous(what: str, got: str) -> ManifestError:
    return ManifestError(
        f"{what}: it is unclear which manifest belongs to which tar",
        got=got,
        allowed="each number once, or paths that tell the files of a number apart (en/manifest_0.json, en/audio_0.tar)",
        remedy="split it into several corpora, one for each set of numbers",
    )
