"""Long recordings: windows that overlap, and their token sequences joined without repeats or gaps.

Two neighbouring windows both hear the overlap. Tokens that both decoded at about the same time are matched, and
the text changes over from one to the other after a match, near the middle of the overlap, at the end of a word
where there is one. So a word that an edge cut in half is taken from the window that heard it whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from raytrain.errors import DataError

MAX_WINDOW_S = 40.0
_TOLERANCE_S = 0.8  # how far two estimates of one token's time may differ


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


def windows(num_samples: int, sample_rate: int, *, window_s: float, overlap_s: float) -> list[tuple[int, int]]:
    """Spans [start, end) in samples of at most `window_s`, all of one length, neighbours sharing ≥ `overlap_s`.

    A recording of at most `window_s` is one span. Raises `DataError` for lengths that make no sense.
    """
    if not 1 <= window_s <= MAX_WINDOW_S:
        raise DataError("a window has the wrong length", got=f"{window_s} s", allowed=f"1 to {MAX_WINDOW_S:g} s")
    if not 0 <= overlap_s <= window_s / 2:
        raise DataError("windows overlap too much", got=f"{overlap_s} s", allowed=f"0 to {window_s / 2:g} s")
    window, overlap = round(window_s * sample_rate), round(overlap_s * sample_rate)
    if num_samples <= window:
        return [(0, num_samples)]
    number = -(-(num_samples - overlap) // (window - overlap))
    # Windows of equal length: a short last one would give the decoder little context.
    size = -(-(num_samples + (number - 1) * overlap) // number)
    starts = [round(i * (num_samples - size) / (number - 1)) for i in range(number)]
    return [(start, start + size) for start in starts]


def join(left: list[TimedToken], right: list[TimedToken], start_s: float, end_s: float) -> list[TimedToken]:
    """Two windows' tokens as one sequence; times count from the start of the recording.

    The overlap is [start_s, end_s): the right window begins at `start_s`, the left one ends at `end_s`.
    """
    middle = (start_s + end_s) / 2
    tail = _within(left, start_s - _TOLERANCE_S, None)
    head = _within(right, None, end_s + _TOLERANCE_S)
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
    """Pairs of equal tokens at about one time: the longest common subsequence, and of those the closest in time."""

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
    """Nothing in common: whole words before the middle from the left, those after it from the right."""
    return [token for word in _words(left) if word[0].middle_s < middle for token in word] + [
        token for word in _words(right) if word[0].middle_s >= middle for token in word
    ]


def _words(tokens: list[TimedToken]) -> list[list[TimedToken]]:
    words: list[list[TimedToken]] = []
    for token in tokens:
        if token.starts_word or not words:
            words.append([])
        words[-1].append(token)
    return words
