"""Streams: every row once per epoch, one bucket for all ranks, exact resume, errors that propagate."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from raytrain.data.corpora.reading import plan_chunks
from raytrain.data.corpora.types import Corpus
from raytrain.data.loader import BatchLoader, StepReader
from raytrain.data.quarantine import Quarantine
from raytrain.data.sequences import BlockEncoder
from raytrain.data.stream import StreamSampler, StreamState
from raytrain.data.text.tokenizer import train_tokenizer
from raytrain.errors import ManifestError
from raytrain.lengths import BucketSettings, LengthHistogram, make_plan

RATE = 16000
SHARDS, ROWS = 6, 25


@pytest.fixture(scope="module")
def tarred(tmp_path_factory):
    """A NeMo tarred corpus; every row's text is a unique number. One row is too long for any bucket."""
    import tarfile

    folder = tmp_path_factory.mktemp("tarred")
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        rows = []
        with tarfile.open(folder / f"audio_{shard}.tar", "w") as tar:
            for number in range(ROWS):
                name = f"s{shard}r{number}.wav"
                seconds = float(np.round(rng.uniform(0.2, 1.5), 2)) if (shard, number) != (0, 0) else 3.0
                soundfile.write(folder / name, rng.standard_normal(int(seconds * RATE)) * 0.1, RATE)
                tar.add(folder / name, name)
                (folder / name).unlink()
                rows.append({"audio_filepath": name, "duration": seconds, "text": f"row {shard * ROWS + number}"})
        (folder / f"manifest_{shard}.json").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def parts(tarred, tmp_path_factory):
    texts = [f"row {number}" for number in range(SHARDS * ROWS)]
    tokenizer = train_tokenizer({"en": texts}, 20)
    corpus = Corpus("tars", str(tarred / "manifest_{0..5}.json"), audio=str(tarred / "audio_{0..5}.tar"), language="en")
    chunks = plan_chunks([corpus])
    durations = np.arange(200, 1501, 10)
    histogram = LengthHistogram.from_lengths(durations, np.full(len(durations), 20))
    plan = make_plan(histogram, BucketSettings(3, 1, max_duration_ms=2000, tps_sigma=None), "", None)
    return chunks, BlockEncoder(tokenizer, "canary2"), plan, tokenizer


def sampler(parts, world_size=2, **options):
    chunks, encoder, plan, _ = parts
    sizes = [3, 2, 1][: len(plan.grid.buckets)]
    return StreamSampler(chunks, encoder, plan, sizes, world_size, seed=7, **{"buffer_size": 60, **options})


def texts_of(steps):
    return [[row.text for row in step.rows] for step in steps]


@pytest.mark.parametrize("concurrent", [False, True])
def test_every_row_once_per_epoch_and_all_ranks_in_one_bucket(parts, concurrent):
    steps_of_stream = sampler(parts, num_epochs=2, concurrent=concurrent)
    steps = list(steps_of_stream.steps(StreamState()))
    assert [step.is_last for step in steps] == [False] * (len(steps) - 1) + [True]
    for epoch in (0, 1):
        drawn = Counter(row.text for step in steps if step.plan.epoch == epoch for row in step.rows)
        assert set(drawn) == {f"row {number}" for number in range(1, SHARDS * ROWS)}
        # At the end a bucket may hold one row for two ranks.
        assert sum(drawn.values()) - len(drawn) <= 3
    assert steps_of_stream.rejected == {"too_long": 2}
    edges = [bucket.max_duration_ms for bucket in steps_of_stream.plan.grid.buckets]
    for step in steps:
        low = edges[step.plan.bucket - 1] if step.plan.bucket else 0
        assert all(low < row.duration_ms <= edges[step.plan.bucket] for row in step.rows)
        shares = [step.share(rank) for rank in range(2)]
        assert [row for share in shares for row in share.rows] == step.rows
        assert all(share.rows for share in shares)
        assert max(step.plan.sizes) <= steps_of_stream.batch_sizes[step.plan.bucket]
    orders = [[row.text for step in steps if step.plan.epoch == epoch for row in step.rows] for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_resume_is_exact_also_with_other_workers_and_batch_sizes(parts):
    whole = list(sampler(parts, num_epochs=2).steps(StreamState()))
    for cut in (1, 17, len(whole) - 3):
        state = StreamState.from_dict(json.loads(json.dumps(whole[cut - 1].state.to_dict())))
        assert texts_of(sampler(parts, num_epochs=2).steps(state)) == texts_of(whole[cut:])
    # Half an epoch with 2 ranks, some steps with 3, the rest with 1: every row still appears once.
    first = whole[:10]
    seen = [text for texts in texts_of(first) for text in texts]
    middle = list(sampler(parts, 3, num_epochs=1).steps(first[-1].state))[:4]
    seen += [text for texts in texts_of(middle) for text in texts]
    last = list(sampler(parts, 1, num_epochs=1).steps(middle[-1].state))
    seen += [text for texts in texts_of(last) for text in texts]
    assert set(seen) == {f"row {number}" for number in range(1, SHARDS * ROWS)}
    assert len(seen) - len(set(seen)) <= 3
    assert len(last[-1].state.segments) == 3


def test_weights_repeat_a_corpus(parts):
    chunks, *rest = parts
    steps_of_stream = StreamSampler(chunks, *rest[:2], [3, 2, 1], 1, seed=7, repeats={"tars": 2.5}, num_epochs=1)
    drawn = sum(len(step.rows) for step in steps_of_stream.steps(StreamState()))
    assert 2 * SHARDS * ROWS - 2 <= drawn <= 3 * SHARDS * ROWS


def test_audio_is_read_from_the_tar_and_a_lost_member_replaced(parts, tarred, tmp_path):
    chunks, encoder, plan, tokenizer = parts
    lost = tmp_path / "manifest.json"
    rows = (tarred / "manifest_1.json").read_text().replace("s1r3.wav", "gone.wav")
    lost.write_text(rows)
    corpus = Corpus("tars", str(lost), audio=str(tarred / "audio_1.tar"), language="en")
    steps_of_stream = StreamSampler(plan_chunks([corpus]), encoder, plan, [3, 3, 3], 1, seed=7, num_epochs=1)
    edges = [(bucket.max_duration_ms, bucket.max_tokens) for bucket in plan.grid.buckets]
    quarantine = Quarantine(None)
    reader = StepReader(edges, sample_rate=RATE, pad_id=tokenizer.pad_id, quarantine=quarantine)
    num_read, replaced = 0, 0
    with BatchLoader((step.share(0) for step in steps_of_stream.steps(StreamState())), reader) as loader:
        for loaded in loader:
            num_read += len(loaded.batch)
            replaced += loaded.num_replaced
            assert loaded.batch.audio_lengths.max() <= edges[loaded.plan.bucket][0] * RATE // 1000
            assert float(loaded.batch.audio.abs().max()) > 0
    assert num_read == ROWS and replaced == 1
    (note,) = quarantine.take_news()
    assert note["audio_path"].endswith("audio_1.tar/gone.wav")


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_broken_corpus_is_raised_and_does_not_hang(parts, tarred, tmp_path, concurrent):
    _, encoder, plan, _ = parts
    manifest = tmp_path / "manifest.json"
    manifest.write_text((tarred / "manifest_0.json").read_text())
    corpus = Corpus("tars", str(manifest), audio=str(tarred / "audio_0.tar"), language="en")
    chunks = plan_chunks([corpus])
    manifest.unlink()
    steps_of_stream = StreamSampler(chunks, encoder, plan, [3, 2, 1], 1, seed=7, concurrent=concurrent)
    with pytest.raises(Exception, match="manifest.json"):
        list(steps_of_stream.steps(StreamState()))


def test_no_fitting_row_is_an_error(parts, tarred):
    chunks, encoder, _, _ = parts
    histogram = LengthHistogram.from_lengths(np.array([100]), np.array([20]))
    plan = make_plan(histogram, BucketSettings(1, 1, max_duration_ms=150, tps_sigma=None), "", None)
    steps_of_stream = StreamSampler(chunks, encoder, plan, [3], 1, seed=7)
    with pytest.raises(ManifestError, match="no row that fits"):
        next(steps_of_stream.steps(StreamState()))
