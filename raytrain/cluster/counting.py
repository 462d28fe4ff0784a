"""Counting lengths and sampling texts on Ray Data: workers process chunks, and partial counts are returned in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from raytrain.cluster.mapping import map_on_workers
from raytrain.cluster.placement import Placement
from raytrain.config import Config
from raytrain.data.corpora.reading import read_blocks
from raytrain.data.corpora.types import Chunk
from raytrain.data.counts import Counts, count_chunk
from raytrain.data.probe import AudioListing, plan_samples
from raytrain.data.sentences import SentenceSample
from raytrain.data.sequences import BlockEncoder
from raytrain.data.text.tokenizer import CanaryTokenizer


def count_all(chunks: list[Chunk], tokenizer: CanaryTokenizer, config: Config) -> Iterator[tuple[int, Counts]]:
    """Partial counts from Ray Data: (number of chunks, their counts)."""
    import ray

    prompt_format, by_words = config.model.prompt_format, config.tokenizer.by_words
    tokenizer_ref = ray.put(tokenizer)
    sample = config.data.audio_sample
    sample_sizes = plan_samples(chunks, sample)

    def count(chunks: list[Chunk]) -> tuple[int, Counts]:
        encoder = BlockEncoder(ray.get(tokenizer_ref), prompt_format, by_words=by_words)
        total, listing = Counts(), AudioListing(sample > 0)
        for chunk in chunks:
            total.add(count_chunk(chunk, encoder, listing, sample_sizes.get(chunk.index, 0)))
        return len(chunks), total

    yield from map_on_workers(chunks, count, 8, Placement.data(config.cluster))


def sample_all(chunks: list[Chunk], config: Config) -> Iterator[tuple[int, SentenceSample, Counts]]:
    """Partial samples of sentences from Ray Data: (number of chunks, sample, row counts including unusable rows)."""
    most = config.tokenizer.max_sentences

    def sample(chunks: list[Chunk]) -> tuple[int, SentenceSample, Counts]:
        sentences, counts = SentenceSample(most), Counts()
        for chunk in chunks:
            for block in read_blocks(replace(chunk, first_line=1)):
                counts.count_rows(chunk, block)
                sentences.add_block(block)
        return len(chunks), sentences, counts

    yield from map_on_workers(chunks, sample, 8, Placement.data(config.cluster))
