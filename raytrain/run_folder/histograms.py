"""`histogram.parquet`: the length histogram as a table with a row for each cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raytrain.errors import ArtifactError, DataError
from raytrain.lengths.histogram import LengthHistogram
from raytrain.storage.artifacts import atomic_write

_COLUMNS = ("duration_ms", "tokens", "count")
_REAL_DURATION = "real_duration_ms"


def write_histogram(path: Path, histogram: LengthHistogram) -> None:
    """One row per cell: `duration_ms`, `tokens`, `count`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = (histogram.cells, histogram.tokens, histogram.counts)
    table = pa.table(dict(zip(_COLUMNS, columns, strict=True)))
    table = table.replace_schema_metadata({_REAL_DURATION: str(histogram.real_duration_ms)})
    with atomic_write(path) as file:
        pq.write_table(table, file)


def read_histogram(path: Path) -> LengthHistogram:
    """The inverse of `write_histogram`. Raises `ArtifactError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
        cells, tokens, counts = (_checked(column.cast(pa.int64()).to_numpy()) for column in table.itercolumns())
        real_duration_ms = int((table.schema.metadata or {})[_REAL_DURATION.encode()])
        return LengthHistogram.from_arrays(cells, tokens, counts, real_duration_ms)
    except (OSError, pa.ArrowException, DataError, KeyError, OverflowError, ValueError) as error:
        raise ArtifactError(
            f"{path} can't be read", why=" ".join(str(error).split()), remedy="delete it and rerun statistics"
        ) from error


def _checked(column: np.ndarray) -> np.ndarray:
    if column.dtype.kind != "i" or (len(column) and column.min() < 0):
        raise ValueError("it has lengths or counts below 0, or none")
    return column
