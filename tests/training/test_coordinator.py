"""The coordinator of probes, and probers that execute its tasks; without Ray, on simulated devices."""

import json
import threading
from dataclasses import dataclass, field, replace

import pytest

from raytrain.model.config import ModelConfig
from raytrain.training.memory.coordinator import (
    ProbeCoordinator,
    ProbeJob,
    answers_from_json,
    answers_to_json,
    run_prober,
)
from raytrain.training.memory.meter import Probe
from raytrain.training.settings import TrainSettings

EDGES = tuple((duration, tokens) for duration in (1000, 4000, 16000) for tokens in (10, 40))
BASE = 100.0


def slope(edges) -> float:
    return (edges[0] / 1000 + edges[1] / 10) ** 2


@dataclass
class LawMeter:
    """A device whose steps need BASE + batch · slope bytes, of `capacity`; `measured` are the batches that it ran."""

    capacity: float
    measured: list = field(default_factory=list)
    closed: bool = False

    def measure(self, batch_size, edges, num_steps, *, fresh=True) -> Probe:
        self.measured.append((tuple(edges), batch_size, fresh))
        need = BASE + batch_size * slope(edges)
        if need > self.capacity:
            return Probe(batch_size, False, why="out of memory")
        return Probe(batch_size, True, int(need), 1 + batch_size / 64)

    def largest(self, edges) -> int:
        return int((self.capacity - BASE) / slope(edges))


def job(capacity: float, **settings) -> ProbeJob:
    values = {
        "model": ModelConfig(),
        "train": TrainSettings(),
        "device_name": "law",
        "budget_bytes": int(capacity),
        "edges": EDGES,
        "needs": tuple((BASE, slope(edges)) for edges in EDGES),
        "max_size": 50_000,
        "tolerance": 0.05,
        "steps_per_probe": 1,
        "soak_steps": 12,
        "seed": 1,
    }
    return ProbeJob(**{**values, **settings})


def work(coordinator: ProbeCoordinator, asked: ProbeJob, meter: LawMeter, prober: str = "gpu 0") -> None:
    run_prober(prober, coordinator.take, coordinator.tell, meter, asked, coordinator.soaked)


@pytest.mark.parametrize("off", [1.0, 1.08, 0.93])
def test_a_prober_searches_times_and_soaks(off):
    meter, asked = LawMeter(90_000.0), job(90_000.0)
    asked = replace(asked, needs=tuple((BASE, slope(edges) * off) for edges in EDGES))
    coordinator = ProbeCoordinator(asked)
    assert coordinator.progress() == ("probing buckets", 0, 6) and coordinator.outcome() is None
    work(coordinator, asked, meter)
    outcome = coordinator.outcome()
    for edges, size, bucket in zip(EDGES, outcome.batch_sizes, outcome.buckets, strict=True):
        assert 0.93 * meter.largest(edges) <= size <= meter.largest(edges)
        assert bucket.batch_size == size and bucket.seconds_at(size) == round(1 + size / 64, 4)
        assert bucket.smallest_as_fast <= size
    assert set(outcome.peaks) == set(range(6)) and max(outcome.peaks.values()) <= 90_000
    assert coordinator.progress()[0] == "soaking" and outcome.seconds["steps"] > 0
    assert sum(len(bucket.probes) for bucket in outcome.buckets) <= 1.5 * len(EDGES)
    assert len([1 for _, _, fresh in meter.measured if not fresh]) == 12


def test_throughput_takes_the_smallest_that_is_as_fast():
    meter, asked = LawMeter(90_000.0), job(90_000.0, throughput=True)
    meter.measure, plain = (lambda *a, **k: replace(plain(*a, **k), step_seconds=a[0] / 10)), meter.measure
    coordinator = ProbeCoordinator(asked)
    work(coordinator, asked, meter)
    assert coordinator.outcome().batch_sizes == (1,) * 6


def test_several_probers_share_the_work_and_one_soaks():
    meters, asked = [LawMeter(90_000.0) for _ in range(3)], job(90_000.0)
    coordinator = ProbeCoordinator(asked)
    lock = threading.Lock()

    def locked(function):
        def call(*arguments):
            with lock:  # an actor answers one call at a time
                return function(*arguments)

        return call

    def prober(number):
        run_prober(f"gpu {number}", locked(coordinator.take), locked(coordinator.tell), meters[number], asked)

    threads = [threading.Thread(target=prober, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert coordinator.outcome() is not None
    assert sum(any(not fresh for _, _, fresh in meter.measured) for meter in meters) == 1
    assert all(
        size <= meters[0].largest(edges) for edges, size in zip(EDGES, coordinator.outcome().batch_sizes, strict=True)
    )


def test_the_task_of_a_dead_prober_is_handed_out_again():
    meter, asked = LawMeter(90_000.0), job(90_000.0)
    coordinator = ProbeCoordinator(asked)
    lost = coordinator.take("gpu 0")
    second = coordinator.take("gpu 1")
    assert lost.bucket != second.bucket
    assert coordinator.take("gpu 0") == lost  # it was restarted, and asks as a new prober
    threads = [threading.Thread(target=work, args=(coordinator, asked, meter, f"gpu {number}")) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert coordinator.outcome() is not None


def test_a_stopped_job_resumes_with_its_answers():
    meter, asked = LawMeter(90_000.0), job(90_000.0)
    whole = ProbeCoordinator(asked)
    work(whole, asked, meter)
    answers = whole.take_news()
    assert whole.take_news() == [] and answers_from_json(json.loads(json.dumps(answers_to_json(answers)))) == answers
    for done in (1, 4, len(answers) - 1):
        again, rest = LawMeter(90_000.0), ProbeCoordinator(asked, answers[:done])
        work(rest, asked, again)
        assert rest.outcome().batch_sizes == whole.outcome().batch_sizes
        searched = [entry for entry in again.measured if entry[2]]
        assert len(searched) == sum(len(answer.probes) for answer in answers[done:] if answer.task.kind != "soak")


def test_a_bucket_where_not_even_one_fits_ends_the_work_with_its_reason():
    meter, asked = LawMeter(200.0), job(200.0)
    coordinator = ProbeCoordinator(asked)
    work(coordinator, asked, meter)
    number, why = coordinator.outcome().failed
    assert meter.largest(EDGES[number]) == 0 and why == "out of memory"


def test_a_soak_that_fails_lowers_what_failed():
    class Fragmented(LawMeter):
        def measure(self, batch_size, edges, num_steps, *, fresh=True):
            if not fresh and tuple(edges) == EDGES[-1] and batch_size > 10:
                return Probe(batch_size, False, why="fragmented")
            return super().measure(batch_size, edges, num_steps, fresh=fresh)

    meter, asked = Fragmented(90_000.0), job(90_000.0)
    coordinator = ProbeCoordinator(asked)
    work(coordinator, asked, meter)
    outcome = coordinator.outcome()
    assert outcome.batch_sizes[-1] == 10 and outcome.buckets[-1].batch_size > 10


def test_jobs_that_differ_have_other_ids():
    asked = job(90_000.0)
    assert asked.id == job(90_000.0).id
    for different in (job(91_000.0), replace(asked, train=TrainSettings(shard=True)), replace(asked, seed=2)):
        assert different.id != asked.id
