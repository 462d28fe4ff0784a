"""The rows of assignment and training: by columns in Arrow, and one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raytrain.data.corpora.blocks import Block
from raytrain.data.locator import Locator
from raytrain.data.sequences import EncodedBlock

ROW_SCHEMA = pa.schema(
    [
        ("audio_path", pa.string()),
        ("audio_start", pa.int64()),
        ("audio_size", pa.int64()),
        ("offset_ms", pa.int64()),
        ("duration_ms", pa.int64()),
        ("text", pa.string()),
        ("corpus", pa.string()),
        ("language", pa.string()),
        ("prompt_length", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
    ]
)


class Row(NamedTuple):
    """One utterance as training needs it; `tokens` is prompt + text + end of text.

    Its audio is `audio_size` bytes of `audio_path` starting at `audio_start`, or the whole file if `audio_size` is 0.
    """

    audio_path: str
    offset_ms: int
    duration_ms: int
    text: str
    language: str
    prompt_length: int
    tokens: tuple[int, ...]
    audio_start: int = 0
    audio_size: int = 0
    corpus: str = ""


def row_table(block: Block, encoded: EncodedBlock, locator: Locator) -> tuple[pa.Table, list[str | None]]:
    """A block's rows by `ROW_SCHEMA`, and the problem with each row's audio, None if there is none."""
    located = locator.locate(block.paths)
    languages = np.array([key.target_lang for key in block.prompts], object)[block.prompt_of]
    ends = np.concatenate(([0], np.cumsum(encoded.lengths))).astype(np.int32)
    columns = [
        pa.array(located.paths, pa.string()),
        pa.array(located.starts, pa.int64()),
        pa.array(located.sizes, pa.int64()),
        pa.array(block.offset_ms),
        pa.array(block.duration_ms),
        pa.array([" ".join(text.split()) for text in block.texts], pa.string()),
        pa.array([block.chunk.corpus] * len(block), pa.string()),
        pa.array(languages, pa.string()),
        pa.array(encoded.prompt_lengths.astype(np.int32)),
        pa.ListArray.from_arrays(pa.array(ends), pa.array(encoded.ids)),
    ]
    return pa.Table.from_arrays(columns, schema=ROW_SCHEMA), located.problems


def rows_of(table: pa.Table) -> list[Row]:
    """Rows of a small table of `ROW_SCHEMA`."""
    columns = {name: table[name].to_pylist() for name in Row._fields}
    columns["tokens"] = list(map(tuple, columns["tokens"]))
    return list(map(Row._make, zip(*columns.values(), strict=True)))
