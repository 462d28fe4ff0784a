"""Long recordings: overlapping windows, whose token sequences are joined without repeats or gaps.

Neighboring windows share the overlap. Tokens that both windows decoded at about the same time are matched, and the text
switches from one window to the next after a match, near the middle of the overlap, at the end of a word if possible. So
a word cut in half by an edge is taken from the window that contains all of it. Edges are placed in quiet spots, so that
there are few such words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raytrain.errors import DataError

MAX_WINDOW_S = 40.0
_TOLERANCE_S = 0.8  # how much two estimates of one token's time may differ


@dataclass(frozen=True)
class TimedToken:
    """A decoded token: its id, where it was spoken, its log-probability, and whether a word begins with it."""

    id: int
    start_s: float
    end_s: float
    log_prob: float
    starts_word: bool

    def later(self, seconds: float) -> TimedToken:
        """The same token `seconds` later."""
        return replace(self, start_s=self.start_s + seconds, end_s=self.end_s + seconds)

    @property
    def middle_s(self) -> float:
        """Its time."""
        return (self.start_s + self.end_s) / 2


def windows(audio: np.ndarray, sample_rate: int, *, window_s: float, overlap_s: float) -> list[tuple[int, int]]:
    """Spans [start, end) in samples that cover `audio` (num_samples,), none longer than `window_s`.

    A recording of at most `window_s` is one span. Neighbors share about `overlap_s`, at least half of it, and begin and
    end where it is quiet: decoders stumble over half a word at an edge. All windows are about equally long, since a
    short last one would have little context. Raises `DataError` for invalid lengths.
    """
    check_window(window_s, overlap_s)
    window, overlap, size = round(window_s * sample_rate), round(overlap_s * sample_rate), len(audio)
    number = most_windows(size, window, overlap)
    if number == 1:
        return [(0, size)]
    loudness = _loudness(audio, sample_rate)
    slack = overlap // 2
    length = min(window - slack, -(-(size + (number - 1) * overlap) // number))
    spans = []
    start = 0
    while start + window < size:
        target = min(start + length, size)
        end = _quietest(loudness, target - slack, min(target + slack, start + window), sample_rate)
        spans.append((start, end))
        start = _quietest(loudness, end - overlap - slack, end - overlap + slack, sample_rate)
    return [*spans, (start, size)]


def most_windows(size: int, window: int, overlap: int) -> int:
    """Maximum number of windows of a recording of `size`; all in samples, or all in milliseconds."""
    step = window - overlap - 2 * (overlap // 2)  # progress per window for the worst choice of edges
    return max(0, -(-(size - window) // step)) + 1


def checked_overlap(window_s: float, overlap_s: float | None) -> float:
    """Seconds that neighboring windows share, also where none are given. Raises `DataError` as `check_window` does."""
    overlap_s = min(4.0, window_s / 4) if overlap_s is None else overlap_s
    check_window(window_s, overlap_s)
    return overlap_s


def check_window(window_s: float, overlap_s: float) -> None:
    """Raises `DataError` for an invalid window or overlap."""
    if not 1 <= window_s <= MAX_WINDOW_S:
        raise DataError(
            "a window has the wrong length",
            got=f"{window_s} s",
            allowed=f"1 to {MAX_WINDOW_S:g} s",
            remedy="set --window-seconds within these bounds",
        )
    if not 0.2 <= overlap_s <= window_s / 4:
        raise DataError(
            "the overlap has the wrong length",
            got=f"{overlap_s} s",
            allowed=f"0.2 to {window_s / 4:g} s",
            remedy="set --overlap-seconds within these bounds, or leave it out",
        )


def _loudness(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Mean power around every 10 ms, over 150 ms: a gap between words is at least about that long."""
    hop = sample_rate // 100
    frames = len(audio) // hop
    power = np.square(audio[: frames * hop].reshape(frames, hop), dtype=np.float64).mean(1)
    return np.convolve(power, np.ones(15) / 15, mode="same")


def _quietest(loudness: np.ndarray, low: int, high: int, sample_rate: int) -> int:
    """The sample in [low, high] where it is quietest."""
    hop = sample_rate // 100
    first, last = -(-low // hop), min(high // hop, len(loudness) - 1)
    return (first + int(np.argmin(loudness[first : last + 1]))) * hop


def join(left: list[TimedToken], right: list[TimedToken], start_s: float, end_s: float) -> list[TimedToken]:
    """Two windows' tokens as a single sequence; times count from the start of the recording.

    The overlap is [start_s, end_s): the right window begins at `start_s`, the left one ends at `end_s`.
    """
    middle = (start_s + end_s) / 2
    tail = _within(left, start_s - _TOLERANCE_S, None)
    head = _within(right, None, end_s + _TOLERANCE_S)
    if not tail or not head:  # one window has no token there, so nothing can repeat
        return left + right
    pairs = _matches([left[i] for i in tail], [right[j] for j in head])
    if not pairs:
        return _cut(left, right, middle)

    def cost(pair: tuple[int, int]) -> tuple[bool, float]:
        i, j = tail[pair[0]], head[pair[1]]
        whole = _word_ends(left, i) and _word_ends(right, j)
        return not whole, abs((left[i].middle_s + right[j].middle_s) / 2 - middle)

    i, j = min(pairs, key=cost)
    return left[: tail[i] + 1] + right[head[j] + 1 :]


def _within(tokens: list[TimedToken], start: float | None, end: float | None) -> list[int]:
    return [
        number
        for number, token in enumerate(tokens)
        if (start is None or token.middle_s >= start) and (end is None or token.middle_s <= end)
    ]


def _word_ends(tokens: list[TimedToken], number: int) -> bool:
    return number + 1 == len(tokens) or tokens[number + 1].starts_word


def _matches(left: list[TimedToken], right: list[TimedToken]) -> list[tuple[int, int]]:
    """Pairs of equal tokens at about the same time: the longest common subsequence, and among several the closest in
    time."""

    def gain(i: int, j: int) -> float:
        distance = abs(left[i].middle_s - right[j].middle_s)
        if left[i].id != right[j].id or distance > _TOLERANCE_S:
            return 0.0
        return 1.0 - 0.5 * distance / _TOLERANCE_S

    best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i in range(len(left) - 1, -1, -1):
        for j in range(len(right) - 1, -1, -1):
            taken = gain(i, j)
            through = best[i + 1][j + 1] + taken if taken else 0.0
            best[i][j] = max(through, best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        taken = gain(i, j)
        if taken and best[i][j] == best[i + 1][j + 1] + taken:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _cut(left: list[TimedToken], right: list[TimedToken], middle: float) -> list[TimedToken]:
    """Without common tokens: whole words before the middle from the left, and after it from the right."""
    return [token for word in group_words(left) if word[0].middle_s < middle for token in word] + [
        token for word in group_words(right) if word[0].middle_s >= middle for token in word
    ]


def group_words(tokens: Sequence[TimedToken]) -> list[list[TimedToken]]:
    """The tokens of each word, in order."""
    words: list[list[TimedToken]] = []
    for token in tokens:
        if token.starts_word or not words:
            words.append([])
        words[-1].append(token)
    return words
