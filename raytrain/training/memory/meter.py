"""The result of probing a batch size, and algorithms on many probes: nothing here needs torch or a device.

A meter runs training steps of one batch size at a bucket's upper edges and measures them. `search_batch_size`,
`smallest_as_fast` and `soak` use it; they work with any meter, including one in another process (`IsolatedMeter`).
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from raytrain.lengths.bucket_searches import BucketSearches
from raytrain.lengths.search import BatchSizeSearch

Edges = tuple[int, int]  # max_duration_ms, max_tokens


@dataclass(frozen=True)
class Probe:
    """The outcome of one batch size: peak bytes if the device reports them, seconds of the fastest step, and why it
    does not fit."""

    batch_size: int
    fits: bool
    peak_bytes: int | None = None
    step_seconds: float | None = None
    why: str | None = None


class Meter(Protocol):
    """Runs training steps on a device with a memory budget."""

    def measure(self, batch_size: int, edges: Edges, num_steps: int, *, fresh: bool = True) -> Probe:
        """`num_steps` steps of a batch at a bucket's upper edges; `fresh` empties the allocator's cache first."""
        ...


def joint_probe(probes: Sequence[Probe]) -> Probe:
    """The combined result of ranks that ran the same steps together: the batch fits if it fits on all; the highest
    peak, and the seconds of the slowest."""
    failed = next((probe for probe in probes if not probe.fits), None)
    if failed is not None:
        return failed
    peaks = [probe.peak_bytes for probe in probes if probe.peak_bytes is not None]
    seconds = [probe.step_seconds for probe in probes if probe.step_seconds is not None]
    return Probe(probes[0].batch_size, True, max(peaks, default=None), max(seconds, default=None))


@dataclass(frozen=True)
class ProbeGroup:
    """A group of processes that probe together: this process's `rank` of `world_size`, and their rendezvous,
    `tcp://host:port` of the first or another `init_method` of `torch.distributed`."""

    rank: int
    world_size: int
    init_method: str
    timeout_s: float = 600.0

    def join(self, device_type: str) -> None:
        """Join the group, with NCCL on GPUs and gloo on CPUs, unless this process already has one."""
        import torch.distributed as dist

        from raytrain.training.parallel import backend_of

        if dist.is_initialized():
            return
        dist.init_process_group(
            backend_of(device_type),
            init_method=self.init_method,
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=self.timeout_s),
        )


@dataclass(frozen=True)
class BucketSize:
    """The answer for one bucket: the largest batch that fits, None if not even 1 does; its probe, None if other
    buckets' probes implied it; and all probes that were run, in order."""

    batch_size: int | None
    best: Probe | None
    probes: tuple[Probe, ...]


def search_batch_size(measure: Callable[[int], Probe], search: BatchSizeSearch) -> BucketSize:
    """Run one bucket's search to its end."""
    probes: list[Probe] = []
    while (size := search.next()) is not None:
        probe = measure(size)
        probes.append(probe)
        search.report(size, probe.fits)
    return _bucket_size(search.result, probes)


def search_buckets(measure: Callable[[int, int], Probe], searches: BucketSearches) -> tuple[BucketSize, ...]:
    """Run all buckets' searches to their ends in this process; `measure` takes a bucket's number and a size."""
    probes: list[list[Probe]] = [[] for _ in range(searches.num_buckets)]
    while (ask := searches.next()) is not None:
        bucket, size = ask
        probe = measure(bucket, size)
        probes[bucket].append(probe)
        searches.report(bucket, size, probe.fits, probe.peak_bytes)
    return tuple(_bucket_size(searches.result(bucket), ran) for bucket, ran in enumerate(probes))


def _bucket_size(size: int | None, probes: Sequence[Probe]) -> BucketSize:
    best = next((probe for probe in probes if probe.fits and probe.batch_size == size), None)
    return BucketSize(size, best, tuple(probes))


_AS_FAST = 1.03  # seconds per utterance within this factor are equal; timings repeat to about 2 %


def smallest_as_fast(measure: Callable[[int], Probe], best: Probe) -> tuple[Probe, list[Probe]]:
    """The smallest halving of `best` whose step is as fast per utterance as any, and the probes that this took.

    Halves while that costs at most 3 % against the fastest so far, since a larger batch can be slower too.
    """
    probes = [best]
    while (size := probes[-1].batch_size // 2) >= 1:
        probes.append(measure(size))
        if not probes[-1].fits or _per_utterance(probes[-1]) > _AS_FAST * min(map(_per_utterance, probes)):
            break
    limit = _AS_FAST * min(map(_per_utterance, probes))
    as_fast = [probe for probe in probes if _per_utterance(probe) <= limit]
    return min(as_fast, key=lambda probe: probe.batch_size), probes[1:]


def _per_utterance(probe: Probe) -> float:
    return float("inf") if probe.step_seconds is None else probe.step_seconds / probe.batch_size


@dataclass(frozen=True)
class SoakStep:
    """One soaked step; `lowered_to` where it failed, 0 where not even 1 fits."""

    bucket: int
    probe: Probe
    lowered_to: int | None = None


def soak(meter: Meter, edges: Sequence[Edges], sizes: Sequence[int], num_steps: int, seed: int) -> Iterator[SoakStep]:
    """At least `num_steps` shuffled steps over all buckets at their sizes, as training mixes them; yields each.

    The allocator's cache is kept from step to step. A bucket that fails is lowered by a twentieth, at least by 1, and
    the soak starts again, until one passes.
    """
    rng, current = random.Random(seed), list(sizes)
    while True:
        order = [
            bucket for _ in range(-(-num_steps // len(edges))) for bucket in rng.sample(range(len(edges)), len(edges))
        ]
        for bucket in order:
            probe = meter.measure(current[bucket], edges[bucket], 1, fresh=False)
            if not probe.fits:
                current[bucket] = min(current[bucket] - 1, int(current[bucket] * 0.95))
                yield SoakStep(bucket, probe, current[bucket])
                if current[bucket] < 1:
                    return
                break
            yield SoakStep(bucket, probe)
        else:
            return
