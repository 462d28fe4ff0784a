"""A batch in as few parts as fit into the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from raytrain.errors import first_line

Result = TypeVar("Result")


def in_halves(
    size: int,
    limit: int,
    run: Callable[[slice], Result],
    on_out_of_memory: Callable[[int], object],
    too_large: Callable[[slice, str], Result],
) -> Iterator[tuple[slice, Result]]:
    """Consecutive parts of a batch of `size` with what `run` makes of each, at most `limit` utterances at a time.

    Where the device runs out of memory, `on_out_of_memory` gets the part's size and halves are tried; for an utterance
    that does not fit alone `too_large` answers, or raises, and gets the reason.
    """
    start = 0
    while start < size:
        part = slice(start, min(start + limit, size))
        # What did not fit is freed only after the except block has ended, which holds it.
        try:
            yield part, run(part)
            start = part.stop
            continue
        except torch.OutOfMemoryError as error:
            why = first_line(error)
        number = part.stop - start
        on_out_of_memory(number)
        torch.cuda.empty_cache()
        if number == 1:
            yield part, too_large(part, why)
            start = part.stop
        limit = -(-number // 2)
