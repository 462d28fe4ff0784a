"""A batch survives the round trip through an Arrow table."""

import numpy as np
import torch

from raytrain.data.batch import SpeechBatch
from raytrain.data.batch_table import pack_batch, unpack_batch


def test_a_packed_batch_comes_back_with_its_note():
    audios = [np.arange(5, dtype=np.float32), np.ones(3, np.float32)]
    batch = SpeechBatch.collate(audios, [[1, 2, 3], [4]], [2, 1], pad_id=0)
    table = pack_batch(batch, b"note")
    assert table.num_rows == 1
    unpacked, note = unpack_batch(table)
    assert note == b"note"
    for tensor, expected in zip(unpacked.tensors(), batch.tensors(), strict=True):
        assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype
        tensor += 1  # it is writable
