"""Long recordings: windows cover everything, and joining neither repeats nor loses a word."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.decoding.alignment import spans
from raytrain.decoding.longform import TimedToken, join, windows
from raytrain.errors import DataError

RATE = 1000


@settings(max_examples=60, deadline=None)
@given(st.floats(0.5, 300), st.floats(4, 40), st.floats(0.05, 0.25), st.integers(0, 99))
def test_windows_cover_the_recording_and_share_the_overlap(duration, window, part, seed):
    audio = np.random.default_rng(seed).standard_normal(int(duration * RATE)).astype(np.float32)
    overlap = max(window * part, 0.2)
    cut = windows(audio, RATE, window_s=window, overlap_s=overlap)
    assert cut[0][0] == 0 and cut[-1][1] == len(audio)
    assert all(end - start <= round(window * RATE) for start, end in cut)
    for (start, end), (later, last) in zip(cut, cut[1:], strict=False):
        assert start < later and end < last
        assert overlap / 2 * RATE - 20 <= end - later <= overlap * 1.5 * RATE + 20


def test_windows_end_and_begin_where_it_is_quiet():
    audio = np.ones(60 * RATE, np.float32)
    quiet = [range(int(second * RATE) - 200, int(second * RATE) + 200) for second in np.arange(0.9, 60, 1.1)]
    for gap in quiet:
        audio[gap.start : gap.stop] = 0
    edges = {edge for pair in windows(audio, RATE, window_s=10, overlap_s=2.5) for edge in pair} - {0, len(audio)}
    assert len(edges) >= 8 and all(any(edge in gap for gap in quiet) for edge in edges)


@pytest.mark.parametrize(("window", "overlap"), [(41, 4), (0.5, 0.2), (10, 3), (10, 0.1)])
def test_senseless_windows_are_refused(window, overlap):
    with pytest.raises(DataError, match="allowed"):
        windows(np.zeros(RATE, np.float32), RATE, window_s=window, overlap_s=overlap)


def speak(seed: int, seconds: float) -> list[TimedToken]:
    """Words of one to three tokens from a tiny vocabulary, so that neighbors are often equal."""
    random, tokens, now = np.random.default_rng(seed), [], 0.3
    while now < seconds - 1:
        for part in range(random.integers(1, 4)):
            tokens.append(TimedToken(int(random.integers(5)) + 10 * min(part, 1), now, now + 0.16, -0.1, part == 0))
            now += 0.16
        now += float(random.uniform(0.1, 0.5))
    return tokens


def window_tokens(tokens, start, end, random, garbage):
    """What a window decodes: whole words in it, estimated times, and nonsense for the words its edges cut."""
    words, tokens_found = {}, []
    number = -1
    for token in tokens:
        number += token.starts_word
        words.setdefault(number, []).append(token)
    for word in words.values():
        first, last = word[0].start_s, word[-1].end_s
        if last <= start or first >= end:
            continue
        shift = float(random.uniform(-0.15, 0.15))
        if first >= start and last <= end:
            tokens_found += [token.later(shift) for token in word]
        elif garbage:
            tokens_found.append(TimedToken(99, max(first, start), min(last, end), -2.0, True))
    return tokens_found


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_joining_neither_repeats_nor_loses_words(seed, garbage):
    random, spoken = np.random.default_rng(seed), speak(seed, 40)
    edges = [(0, 12), (9, 21), (18, 31), (28, 40)]
    merged = window_tokens(spoken, *edges[0], random, garbage)
    for (_, end), (start, stop) in zip(edges, edges[1:], strict=False):
        merged = join(merged, window_tokens(spoken, start, stop, random, garbage), start, end)
    assert [token.id for token in merged] == [token.id for token in spoken]


def test_windows_with_nothing_in_common_switch_in_the_middle():
    left = [TimedToken(1, 0, 1, 0, True), TimedToken(2, 4.2, 4.4, 0, True), TimedToken(3, 5.2, 5.6, 0, True)]
    right = [TimedToken(7, 4.1, 4.4, 0, True), TimedToken(8, 5.3, 5.5, 0, True), TimedToken(9, 8, 9, 0, True)]
    assert [token.id for token in join(left, right, 4, 6)] == [1, 2, 8, 9]
    # A window that decoded nothing, or ended early, removes nothing from the other.
    assert join([], right, 4, 6) == right and join(left, [], 4, 6) == left
    assert [token.id for token in join(left[:1], right, 4, 6)] == [1, 7, 8, 9]


def test_spans_follow_the_weights():
    weights = np.full((3, 20), 1e-4)
    weights[0, 2:5] = weights[1, 9:11] = weights[2, 15:18] = 0.3
    assert spans(weights) == [(2, 5), (9, 11), (15, 18)]
    crowded = spans(np.ones((7, 3)))
    assert len(crowded) == 7 and all(0 <= start < end <= 3 for start, end in crowded)
