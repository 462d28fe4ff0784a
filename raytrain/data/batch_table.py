"""A batch and its metadata as an Arrow table of one row, which Ray Data moves between processes without a copy."""

from __future__ import annotations

import numpy as np
import orjson
import pyarrow as pa
import torch

from raytrain.data.batch import SpeechBatch


def pack_batch(batch: SpeechBatch, note: bytes) -> pa.Table:
    """A table of one row: the tensors as bytes, their shapes, and the metadata."""
    tensors = batch.tensors()
    columns = {
        f"tensor_{number}": pa.array([tensor.numpy().tobytes()], pa.large_binary())
        for number, tensor in enumerate(tensors)
    }
    shapes = orjson.dumps([list(tensor.shape) for tensor in tensors])
    return pa.table({**columns, "shapes": pa.array([shapes], pa.binary()), "note": pa.array([note], pa.large_binary())})


def unpack_batch(table: pa.Table) -> tuple[SpeechBatch, bytes]:
    """The inverse of `pack_batch`."""
    tensors = []
    for number, shape in enumerate(orjson.loads(table["shapes"][0].as_py())):
        kind = np.float32 if number == 0 else np.int64
        values = np.frombuffer(table[f"tensor_{number}"][0].as_buffer(), kind)
        tensors.append(torch.from_numpy(values.copy()).view(shape))  # the object store's memory is read-only
    return SpeechBatch(*tensors), table["note"][0].as_py()
