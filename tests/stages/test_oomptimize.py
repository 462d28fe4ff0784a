"""Batch-size search by probes: isolated processes, soak, and real Tune trials on a law."""

import os
import signal
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import tiny_config
from ray import cloudpickle
from tiny_models import TINY

from raytrain.cluster.placement import Placement
from raytrain.cluster.probing import probe_all
from raytrain.cluster.session import ray_session
from raytrain.errors import ConfigError, ProfileError
from raytrain.lengths import BatchProfile, BatchSizeSearch, ProbeSetting
from raytrain.lengths.profile import choose_profile, least_sizes
from raytrain.model.config import ModelConfig
from raytrain.stages.devices import find_devices, traced_device
from raytrain.stages.predicted_sizes import does_not_fit
from raytrain.training.memory.coordinator import ProbeJob
from raytrain.training.memory.isolated_meter import IsolatedMeter
from raytrain.training.memory.meter import Probe, search_batch_size, smallest_as_fast, soak
from raytrain.training.memory.step_meter import StepMeter
from raytrain.training.settings import TrainSettings

# Ray's workers and the isolated processes don't know this file by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
SMALL = TINY
EDGES = [(duration, tokens) for duration in (1000, 4000, 16000) for tokens in (10, 40)]


@dataclass
class Law:
    """A device whose steps need `base` + batch · (seconds + tokens / 10)² bytes, of `capacity`."""

    capacity: float
    base: float = 100.0
    at_limit: str = "out of memory"

    def largest(self, edges) -> int:
        return int((self.capacity - self.base) / self.slope(edges))

    def slope(self, edges) -> float:
        return (edges[0] / 1000 + edges[1] / 10) ** 2

    def measure(self, batch_size, edges, num_steps, *, fresh=True) -> Probe:
        need = self.base + batch_size * self.slope(edges)
        if need <= self.capacity:
            return Probe(batch_size, True, int(need), 1 + batch_size / 64)
        if self.at_limit == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.at_limit == "error":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Probe(batch_size, False, why=self.at_limit)


# --- separate processes


def isolated(**law):
    return IsolatedMeter(cloudpickled, cloudpickle.dumps(Law(**law)))


def cloudpickled(data: bytes):
    return cloudpickle.loads(data)


def test_what_kills_a_probe_is_an_answer():
    with isolated(capacity=500, at_limit="killed") as meter:
        search = search_batch_size(lambda size: meter.measure(size, (1000, 10), 1), BatchSizeSearch(100, 1000, 0.0))
        assert search.batch_size == 100
        failed = [probe for probe in search.probes if not probe.fits]
        assert failed and all("SIGKILL, perhaps by the host's out-of-memory killer" in probe.why for probe in failed)
        assert meter.measure(5, (1000, 10), 1).fits


def test_a_broken_device_is_left_behind_with_its_process():
    with isolated(capacity=500, at_limit="error") as meter:
        assert meter.measure(5, (1000, 10), 1).fits
        before = meter._process.pid
        probe = meter.measure(500, (1000, 10), 1)
        assert not probe.fits and probe.why.startswith("RuntimeError: CUDA error")
        assert meter.measure(5, (1000, 10), 1).fits and meter._process.pid != before
        pid = meter._process.pid
    assert not os.path.exists(f"/proc/{pid}")


def test_a_meter_that_can_not_be_made_is_an_error():
    with pytest.raises(TypeError, match="bytes-like"), IsolatedMeter(cloudpickled, 7) as meter:
        meter.measure(1, (1000, 10), 1)


def test_real_steps_on_this_processor():
    with IsolatedMeter(StepMeter, SMALL, TrainSettings(num_workers=2), None, "cpu") as meter:
        small, large = meter.measure(1, (1000, 12), 2), meter.measure(16, (8000, 40), 1)
        assert small.fits and large.fits
        assert large.peak_bytes > small.peak_bytes and large.step_seconds > small.step_seconds


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_step_that_ran_out_of_memory_in_backward_leaves_the_meter_whole(num_workers):
    meter = StepMeter(SMALL, TrainSettings(num_workers=num_workers), None, "cpu")
    first = next(meter._bare.parameters())
    before = [parameter.clone() for parameter in meter._bare.parameters()]

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    hook = first.register_hook(fail)
    probe = meter.measure(2, (1000, 12), 1)
    hook.remove()
    assert not probe.fits and probe.why.startswith("CUDA out of memory")
    for old, new in zip(before, meter._bare.parameters(), strict=True):
        torch.testing.assert_close(old, new)
    assert meter.measure(2, (1000, 12), 2).fits
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- after the search


def test_a_smaller_batch_is_taken_only_where_it_is_as_fast():
    def meter(seconds):
        return lambda size: Probe(size, True, None, seconds(size))

    best, probes = smallest_as_fast(meter(lambda size: size), Probe(64, True, None, 64.0))
    assert best.batch_size == 1 and len(probes) == 6
    best, probes = smallest_as_fast(meter(lambda size: max(size, 30)), Probe(64, True, None, 64.0))
    assert best.batch_size == 32 and len(probes) == 2
    best, _ = smallest_as_fast(meter(lambda size: 10 + size), Probe(64, True, None, 74.0))
    assert best.batch_size == 64
    # Larger batches can be slower.
    best, _ = smallest_as_fast(meter(lambda size: size * (2 if size > 16 else 1)), Probe(64, True, None, 128.0))
    assert best.batch_size == 1


def test_a_soak_visits_every_bucket_and_lowers_what_fails():
    class Fragmented(Law):
        def measure(self, batch_size, edges, num_steps, *, fresh=True):
            self.steps = getattr(self, "steps", 0) + 1
            assert not fresh
            # After some steps the largest bucket no longer has all the memory.
            lost = 1000 if self.steps > 8 and edges == EDGES[-1] else 0
            return Law(self.capacity - lost).measure(batch_size, edges, num_steps)

    law = Fragmented(10_000)
    sizes = [law.largest(edges) for edges in EDGES]
    steps = list(soak(law, EDGES, sizes, num_steps=20, seed=1))
    final = list(sizes)
    for step in steps:
        if step.lowered_to is not None:
            final[step.bucket] = step.lowered_to
    assert final[:-1] == sizes[:-1] and final[-1] < sizes[-1]
    last = steps[-24:]
    assert all(step.probe.fits for step in last)
    assert {step.bucket for step in last} == set(range(len(EDGES)))
    assert all(step.probe.batch_size == final[step.bucket] for step in last)


def test_a_soak_ends_where_nothing_fits():
    steps = list(soak(Law(100.5), EDGES, [2] * len(EDGES), 10, seed=1))
    assert steps[-1].lowered_to == 0


# --- profiles


def profile(name: str, gib: float, sizes, confirmed: bool) -> BatchProfile:
    setting = ProbeSetting("m", "adamw", "bf16", False, name, gib, 0.9, 2, "2.13.0")
    peaks = (1.0,) * len(sizes)
    return BatchProfile("p", setting, tuple(sizes), peaks, (2,) * len(sizes), measured_gib=peaks if confirmed else None)


def test_training_takes_the_profile_of_its_gpu():
    a100 = profile("NVIDIA A100-SXM4-80GB", 79.2, [10, 5], True)
    h200 = profile("NVIDIA H200", 139.8, [18, 9], True)
    small, large = profile("traced", 24, [3, 1], False), profile("traced", 80, [9, 4], False)
    candidates = [h200, a100, small, large]
    assert choose_profile(candidates, "NVIDIA A100-SXM4-80GB", 79.2) is a100
    assert choose_profile(candidates, "NVIDIA H100 80GB HBM3", 79.1) is large
    assert choose_profile(candidates, "NVIDIA L4", 24.0) is small
    assert choose_profile(candidates, None, 0) is h200
    with pytest.raises(ProfileError, match="no batch profile for NVIDIA L4.*NVIDIA H200"):
        choose_profile([h200], "NVIDIA L4", 22.0)
    assert least_sizes([a100, replace(h200, batch_sizes=(8, 9))]) == (8, 5)
    assert BatchProfile.from_body(h200.to_body()) == h200


# --- trials


@pytest.fixture(scope="module")
def ray_here(local_ray):
    from raytrain.config import ClusterSection

    with ray_session(ClusterSection()):
        yield


def law_config(corpus, tmp_path, **section):
    return tiny_config(
        corpus, tmp_path, oomptimize={"max_batch_size": 500, "tolerance": 0.0, "soak_steps": 12, **section}
    )


class LawProcess:
    """A law as the probing process that trials start; `log` is a file with a line for each probe."""

    def __init__(self, law: Law, log=None, broken=None) -> None:
        self.law, self.log, self.broken = law, log, broken
        self.seconds, self.num_starts = {}, 0

    def start(self) -> None:
        self.num_starts += 1
        self.seconds = {"process": 0.5}

    def kill(self) -> None:
        self.close()

    def close(self) -> None:
        pass

    def measure(self, batch_size, edges, num_steps, *, fresh=True) -> Probe:
        if self.broken is not None and tuple(edges) == EDGES[3] and self.broken.exists():
            raise ValueError("the power went out")
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{edges[0]} {edges[1]} {batch_size}\n")
        return self.law.measure(batch_size, edges, num_steps)


def probe_job(law: Law, wrong: float = 1.0, **settings) -> ProbeJob:
    values = {
        "model": ModelConfig(),
        "train": TrainSettings(),
        "device_name": "law",
        "budget_bytes": int(law.capacity),
        "edges": tuple(EDGES),
        "needs": tuple((law.base, law.slope(edges) / wrong) for edges in EDGES),
        "max_size": 500,
        "tolerance": 0.0,
        "steps_per_probe": 1,
        "soak_steps": 12,
        "seed": 1,
    }
    return ProbeJob(**{**values, **settings})


def probe(job, tmp_path, make, processes=1, shown=None):
    """The outcome of a job on this Ray, which has no GPU: trials take a processor each."""
    shown = [] if shown is None else shown
    return probe_all(
        job,
        [Placement()] * processes,
        tmp_path / "batch_probes.json",
        Placement(),
        lambda *what: shown.append(what),
        make_meter=make,
        gpus=0.0,
    )


def test_trials_find_what_brute_force_finds(ray_here, tmp_path):
    law, shown = Law(31000.0), []
    outcome = probe(probe_job(law, wrong=1.3), tmp_path, lambda job, group: LawProcess(law), 2, shown)
    assert outcome.batch_sizes == tuple(min(law.largest(edges), 500) for edges in EDGES)
    assert shown[-1] == ("soaking", 12, 12) and outcome.num_starts == 2
    assert sum(len(bucket.probes) for bucket in outcome.buckets) <= 4 * len(EDGES)
    assert set(outcome.peaks) == set(range(6)) and outcome.seconds["start: process"] == 1.0


def test_a_stopped_search_resumes_with_what_it_knew(ray_here, tmp_path):
    law, log, broken = Law(9000.0), tmp_path / "log", tmp_path / "broken"
    broken.touch()

    def make(job, group):
        return LawProcess(law, log, broken)

    with pytest.raises(ProfileError, match="a process that probes batch sizes failed.*the power went out"):
        probe(probe_job(law, times=False), tmp_path, make)
    before = log.read_text().splitlines()
    broken.unlink()
    outcome = probe(probe_job(law, times=False), tmp_path, make)
    assert outcome.batch_sizes == tuple(min(law.largest(edges), 500) for edges in EDGES)
    after = log.read_text().splitlines()[len(before) : -12]  # the soak is last
    assert len(before) >= 2 and not set(before) & set(after)


def test_a_bucket_where_not_even_one_fits_says_why(ray_here, corpus, tmp_path):
    law = Law(200.0)
    number, why = probe(probe_job(law), tmp_path, lambda job, group: LawProcess(law)).failed
    config, device = law_config(corpus, tmp_path), traced_device(200)
    error = does_not_fit(number, EDGES[number], 200, device, config, why=why)
    assert "batch size 1 needs" in str(error) and "out of memory" in str(error)
    assert "activation_checkpointing" in str(error)


def test_throughput_needs_a_gpu(ray_here, corpus, tmp_path):
    with pytest.raises(ConfigError, match="needs a GPU"):
        find_devices(law_config(corpus, tmp_path, objective="throughput", device_memory="1GiB"))
