"""Batches of similar lengths for decoding, each as large as memory allows at its longest utterance.

sorted_batches([900, 4000, 1000], [1, 1, 1], largest=lambda ms: 2)      # [[1, 2], [0]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def sorted_batches(
    durations_ms: Sequence[int],
    num_pieces: Sequence[int],
    largest: Callable[[int], int],
    most_padding_ms: float = float("inf"),
) -> list[list[int]]:
    """Indices of the utterances by batch, longest first; equal lengths keep their order.

    An utterance of duration `durations_ms[i]` counts as `num_pieces[i]` of that length. A batch holds at most
    `largest(its longest duration)` pieces, or one utterance that has more, and at most `most_padding_ms` of padding.
    """
    order = sorted(range(len(durations_ms)), key=lambda index: -durations_ms[index])
    batches: list[list[int]] = []
    longest = room = 0
    padding = 0.0
    for index in order:
        duration, pieces = durations_ms[index], num_pieces[index]
        padding += (longest - duration) * pieces
        if not batches or pieces > room or padding > most_padding_ms:
            batches.append([])
            longest, room, padding = duration, largest(duration), 0.0
        batches[-1].append(index)
        room -= pieces
    return batches
