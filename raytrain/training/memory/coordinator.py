"""Coordinates probing: the work of finding all batch sizes of a device, distributed over one process per GPU.

A coordinator holds the searches and hands out tasks; a prober holds a meter and executes them. Searching comes first,
then timing of smaller batches, for each bucket as soon as its search has ended, and last the soak, by the first prober
that asks.

    coordinator = ProbeCoordinator(job)
    run_prober("gpu 0", coordinator.take, coordinator.tell, meter)
    coordinator.outcome().batch_sizes
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from raytrain.lengths.bucket_searches import BucketSearches
from raytrain.model.config import ModelConfig
from raytrain.storage.artifacts import content_id
from raytrain.training.memory.meter import Edges, Meter, Probe, SoakStep, smallest_as_fast, soak
from raytrain.training.settings import TrainSettings

WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class ProbeJob:
    """What to find batch sizes for. `needs` are the predicted bytes of each bucket's step as (base, per utterance),
    `times` whether smaller batches are timed, `throughput` whether the smallest batch that is as fast is the answer."""

    model: ModelConfig
    train: TrainSettings
    device_name: str
    budget_bytes: int
    edges: tuple[Edges, ...]
    needs: tuple[tuple[float, float], ...]
    max_size: int
    tolerance: float
    steps_per_probe: int
    soak_steps: int
    seed: int
    times: bool = True
    throughput: bool = False

    @property
    def id(self) -> str:
        """Identifies the job: outcomes of an equal job can be reused."""
        return content_id(asdict(self))


@dataclass(frozen=True)
class Task:
    """`kind` is search (one probe of `size`), time (of `size` and smaller ones), soak, wait (ask again), or end."""

    kind: str
    bucket: int = -1
    size: int = 0
    best: Probe | None = None
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A task's outcome: its probes in order, for timing the smallest batch that is as fast, for the soak the sizes that
    passed and each bucket's measured peak in bytes. `seconds` it took, `step_seconds` of them in steps."""

    task: Task
    probes: tuple[Probe, ...] = ()
    smallest_as_fast: int | None = None
    sizes: tuple[int, ...] = ()
    peaks: dict[int, int] = field(default_factory=dict)
    why: str | None = None
    seconds: float = 0.0
    step_seconds: float = 0.0


@dataclass
class BucketOutcome:
    """One bucket: its search's probes, the timed ones, and the answers of both."""

    probes: list[Probe] = field(default_factory=list)
    timed: list[Probe] = field(default_factory=list)
    batch_size: int | None = None
    smallest_as_fast: int | None = None

    def seconds_at(self, size: int) -> float | None:
        """The fastest step of this size, None if it was not timed."""
        times = [probe.step_seconds for probe in (*self.probes, *self.timed) if probe.batch_size == size]
        return min((round(seconds, 4) for seconds in times if seconds is not None), default=None)


@dataclass(frozen=True)
class ProbeOutcome:
    """The end of a job: batch sizes after the soak, measured peak bytes by bucket, each bucket's probes, seconds by
    part (summed over processes, which overlap), and how often processes were started. `failed` is the bucket in which
    not even one utterance fits, and why."""

    batch_sizes: tuple[int, ...]
    peaks: dict[int, int]
    buckets: tuple[BucketOutcome, ...]
    seconds: dict[str, float]
    num_starts: int
    failed: tuple[int, str | None] | None = None


class ProbeCoordinator:
    """Hands out a job's tasks. `answers` are those of an earlier process that was stopped, in their order."""

    def __init__(self, job: ProbeJob, answers: Sequence[Answer] = ()) -> None:
        self._job = job
        self._searches = BucketSearches(list(job.edges), list(job.needs), job.budget_bytes, job.max_size, job.tolerance)
        self._buckets = [BucketOutcome() for _ in job.edges]
        self._untimed = set(range(len(job.edges))) if job.times else set()
        self._in_flight: dict[str, Task] = {}
        self._soaked: Answer | None = None
        self._soak_step = 0
        self._failed: tuple[int, str | None] | None = None
        self._news: list[Answer] = []
        self._seconds: dict[str, float] = {}
        self._num_starts = 0
        self._created = time.monotonic()
        for answer in answers:
            self._learn(answer)

    # --- for probers

    def take(self, prober: str) -> Task:
        """The next task of a prober, which is idle now: a task that it had before it died is handed out again."""
        lost = self._in_flight.pop(prober, None)
        if lost is not None:
            self._give_back(lost)
        task = self._next_task()
        if task.kind not in ("wait", "end"):
            self._in_flight[prober] = task
        return task

    def tell(self, prober: str, answer: Answer) -> None:
        """The end of a prober's task."""
        self._in_flight.pop(prober, None)
        self._news.append(answer)
        self._learn(answer)

    def soaked(self, step: int) -> None:
        """How many soak steps have passed."""
        self._soak_step = step

    def started(self, seconds: dict[str, float]) -> None:
        """A prober's process has started; the seconds of each part of its start."""
        self._count("start", time.monotonic() - self._created)
        self._created = time.monotonic()
        for part, spent in seconds.items():
            self._count(f"start: {part}", spent)

    def ended(self, num_starts: int) -> None:
        """A prober has ended, after so many starts of its processes."""
        self._num_starts += num_starts

    # --- for the driver

    def progress(self) -> tuple[str, int, int]:
        """(current activity, amount done, total amount)."""
        number = len(self._job.edges)
        done = sum(self._searches.ended(bucket) for bucket in range(number))
        if done < number:
            return "probing buckets", done, number
        if self._untimed:
            return "timing smaller batches", number - len(self._untimed), number
        steps = max(self._job.soak_steps, number)
        return "soaking", self._soak_step if self._soaked is None else steps, steps

    def take_news(self) -> list[Answer]:
        """Answers since the last call, to be kept for a process that starts after this one was stopped."""
        news, self._news = self._news, []
        return news

    def outcome(self) -> ProbeOutcome | None:
        """The final result, None while work remains."""
        if self._failed is not None:
            return ProbeOutcome((), {}, tuple(self._buckets), self._seconds, self._num_starts, self._failed)
        if self._soaked is None:
            return None
        soaked = self._soaked
        return ProbeOutcome(soaked.sizes, soaked.peaks, tuple(self._buckets), self._seconds, self._num_starts)

    # --- internals

    def _next_task(self) -> Task:
        if self._failed is not None or self._soaked is not None:
            return Task("end")
        if (probe := self._searches.next()) is not None:
            return Task("search", *probe)
        in_flight = [task.kind for task in self._in_flight.values()]
        timed = {task.bucket for task in self._in_flight.values() if task.kind == "time"}
        ready = [bucket for bucket in sorted(self._untimed - timed) if self._searches.ended(bucket)]
        if ready:
            return self._timing(ready[0])
        if "soak" in in_flight:
            return Task("end")  # only one process runs the soak, and nothing comes after it
        if in_flight or self._untimed:
            return Task("wait")
        return Task("soak", sizes=tuple(self._size(bucket) for bucket in self._buckets))

    def _timing(self, bucket: int) -> Task:
        size = self._searches.result(bucket) or 0
        best = next((probe for probe in self._buckets[bucket].probes if probe.fits and probe.batch_size == size), None)
        return Task("time", bucket, size, best)

    def _size(self, outcome: BucketOutcome) -> int:
        fast = outcome.smallest_as_fast if self._job.throughput else None
        return fast or outcome.batch_size or 0

    def _give_back(self, task: Task) -> None:
        if task.kind == "search":
            self._searches.release(task.bucket)

    def _learn(self, answer: Answer) -> None:
        task = answer.task
        self._count(task.kind, answer.seconds)
        self._count("steps", answer.step_seconds)
        if task.kind == "search":
            self._learn_search(task.bucket, answer.probes[0])
        elif task.kind == "time":
            outcome = self._buckets[task.bucket]
            outcome.timed += answer.probes
            outcome.smallest_as_fast = answer.smallest_as_fast
            self._untimed.discard(task.bucket)
        elif min(answer.sizes) < 1:
            self._failed = (answer.sizes.index(min(answer.sizes)), answer.why)
        else:
            self._soaked = answer

    def _learn_search(self, bucket: int, probe: Probe) -> None:
        self._buckets[bucket].probes.append(probe)
        self._searches.report(bucket, probe.batch_size, probe.fits, probe.peak_bytes)
        for number, outcome in enumerate(self._buckets):
            if self._searches.ended(number):
                outcome.batch_size = self._searches.result(number)
                if outcome.batch_size is None and self._failed is None:
                    self._failed = (number, self._why_none_fits(number, bucket))

    def _why_none_fits(self, number: int, bucket: int) -> str | None:
        """The reason from a failed probe of one utterance, of this bucket or of the smaller one that implied it."""
        probes = (*self._buckets[number].probes, *self._buckets[bucket].probes)
        return next((probe.why for probe in probes if probe.batch_size == 1 and not probe.fits), None)

    def _count(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds


def run_prober(
    prober: str,
    take: Callable[[str], Task],
    tell: Callable[[str, Answer], None],
    meter: Meter,
    job: ProbeJob,
    soaked: Callable[[int], None] = lambda step: None,
) -> None:
    """Execute a coordinator's tasks until there are none left. Raises what the meter raises."""
    while (task := take(prober)).kind != "end":
        if task.kind == "wait":
            time.sleep(WAIT_SECONDS)
            continue
        began = time.monotonic()
        answer = _WORK[task.kind](task, meter, job, soaked)
        tell(prober, replace(answer, seconds=time.monotonic() - began))


def _search(task: Task, meter: Meter, job: ProbeJob, _: object) -> Answer:
    probe = meter.measure(task.size, job.edges[task.bucket], job.steps_per_probe)
    return Answer(task, (probe,), step_seconds=_step_seconds((probe,), job.steps_per_probe))


def _time(task: Task, meter: Meter, job: ProbeJob, _: object) -> Answer:
    def measure(size: int) -> Probe:
        return meter.measure(size, job.edges[task.bucket], job.steps_per_probe)

    best, probes = task.best, []
    if best is None:
        best = measure(task.size)
        probes.append(best)
    fastest = None
    if best.fits:
        smallest, smaller = smallest_as_fast(measure, best)
        probes += smaller
        fastest = smallest.batch_size
    return Answer(task, tuple(probes), fastest, step_seconds=_step_seconds(probes, job.steps_per_probe))


def _soak(task: Task, meter: Meter, job: ProbeJob, soaked: Callable[[int], None]) -> Answer:
    sizes, why = list(task.sizes), None
    peaks: dict[int, int] = {}
    passed, spent, reported = 0, 0.0, time.monotonic()
    for step in soak(meter, job.edges, sizes, job.soak_steps, job.seed):
        spent += step.probe.step_seconds or 0.0
        passed = _take_in(step, sizes, peaks, passed)
        why = step.probe.why or why
        if time.monotonic() - reported > WAIT_SECONDS:
            soaked(passed)
            reported = time.monotonic()
    return Answer(task, sizes=tuple(sizes), peaks=peaks, why=why, step_seconds=spent)


def _take_in(step: SoakStep, sizes: list[int], peaks: dict[int, int], passed: int) -> int:
    """Record one soaked step; returns how many have passed in a row."""
    if step.lowered_to is not None:
        sizes[step.bucket] = step.lowered_to
        peaks.pop(step.bucket, None)
        return 0
    if step.probe.peak_bytes is not None:
        peaks[step.bucket] = step.probe.peak_bytes
    return passed + 1


_Work = Callable[[Task, Meter, ProbeJob, Callable[[int], None]], Answer]
_WORK: dict[str, _Work] = {
    "search": _search,
    "time": _time,
    "soak": _soak,
}


def _step_seconds(probes: Sequence[Probe], steps: int) -> float:
    """A lower bound on the time of steps: each probe reports its fastest step."""
    return sum(steps * (probe.step_seconds or 0.0) for probe in probes)


def answers_to_json(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Plain values of answers, for a file."""
    return [asdict(answer) | {"peaks": [list(pair) for pair in answer.peaks.items()]} for answer in answers]


@dataclass(frozen=True)
class AnswerNote:
    """An answer as stored in a file, with peaks as (bucket, bytes)."""

    task: Task
    probes: list[Probe]
    smallest_as_fast: int | None
    sizes: list[int]
    peaks: list[tuple[int, int]]
    why: str | None
    seconds: float
    step_seconds: float

    def __post_init__(self) -> None:
        if self.task.kind not in _WORK:
            raise ValueError("it does not answer a task")


def answers_from_json(values: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """The inverse of `answers_to_json`."""
    return [_answer(value) for value in values]


def _answer(value: Mapping[str, Any]) -> Answer:
    task = dict(value["task"])
    best = Probe(**task["best"]) if task["best"] else None
    return Answer(
        **{
            **value,
            "task": Task(**{**task, "best": best, "sizes": tuple(task["sizes"])}),
            "probes": tuple(Probe(**probe) for probe in value["probes"]),
            "sizes": tuple(value["sizes"]),
            "peaks": {bucket: peak for bucket, peak in value["peaks"]},
        }
    )
