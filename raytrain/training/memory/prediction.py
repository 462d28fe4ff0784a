"""The largest batch that fits a budget, found by tracing one to three batch sizes.

    tracer = StepTracer(model_config, settings)
    predict_batch_size(tracer, max_duration_ms=4000, max_tokens=40, budget_bytes=60 << 30, max_size=4096).batch_size

A step's peak is the highest of several moments (the end of forward, the update, …), each affine in the batch size, so
it is convex: outside of two sizes, the line through them lies below the peak, so the line's answer is an upper bound;
between them it lies above, so the line's answer is safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from raytrain.training.memory.surface import MemoryLine
from raytrain.training.memory.tracer import StepMemory

_FIRST_SIZE = 8
_CLOSE = 0.02  # where two lines through traced sizes differ by less, another trace adds nothing


class Tracer(Protocol):
    """Predicts the memory of a batch without a device."""

    def trace(self, batch_size: int, max_duration_ms: int, max_tokens: int) -> StepMemory:
        """Bytes of `batch_size` utterances at a bucket's upper edges."""


@dataclass(frozen=True)
class Prediction:
    """The largest batch that fits a budget by the tracer, None if not even 1 does; `peak_bytes` at that size (or at 1),
    the `line` near it, the step of the largest size traced, that size, and how many traces it took."""

    batch_size: int | None
    peak_bytes: int
    line: MemoryLine
    step: StepMemory
    traced_size: int
    num_traces: int


class _TracedSizes:
    """The batch sizes of one bucket that were traced, and which of them fit the budget."""

    def __init__(
        self, tracer: Tracer, edges: tuple[int, int], budget_bytes: int, max_size: int, guess: MemoryLine | None
    ) -> None:
        self._tracer, self._edges, self._guess = tracer, edges, guess
        self._budget, self._max_size = budget_bytes, max_size
        self._steps: dict[int, StepMemory] = {}

    def trace(self, size: int) -> None:
        self._steps[size] = self._tracer.trace(size, *self._edges)

    def trace_first(self) -> None:
        guess = self._guess
        self.trace(min(self._max_size, guess.largest_batch(self._budget) if guess is not None else _FIRST_SIZE))

    def fits(self) -> list[int]:
        """Sizes within the budget, the largest first."""
        return sorted((size for size, step in self._steps.items() if step.peak_bytes <= self._budget), reverse=True)

    def fails(self) -> list[int]:
        """Sizes above the budget, the smallest first."""
        return sorted(size for size, step in self._steps.items() if step.peak_bytes > self._budget)

    def line(self, sizes: list[int]) -> MemoryLine:
        """The line through the two of `sizes` nearest to the answer, or from the estimate for a step without
        utterances."""
        if len(sizes) > 1:
            small, large = sizes[:2]
            return MemoryLine.through(small, self._steps[small].peak_bytes, large, self._steps[large].peak_bytes)
        step = self._steps[sizes[0]]
        base = self._guess.base_bytes if self._guess is not None else step.resident_bytes
        return MemoryLine(base, (step.peak_bytes - base) / sizes[0])

    def predict(self) -> Prediction | None:
        """The answer, or None after another trace."""
        fits, fails = self.fits(), self.fails()
        if not fits:
            line = self.line(fails)
            if fails[0] == 1:
                return self._prediction(None, line)
            self.trace(min(fails[0] - 1, line.largest_batch(self._budget)))
            return None
        low = fits[0]
        line = self.line([low, fails[0]] if fails else fits)
        size = min(self._max_size, line.largest_batch(self._budget))
        if fails and (size <= low or fails[0] <= low * (1 + 5 * _CLOSE)):
            return self._prediction(max(low, min(size, fails[0] - 1)), line)
        if size <= low * (1 + _CLOSE):
            return self._prediction(low, line)
        self.trace(size)
        return None

    def _prediction(self, size: int | None, line: MemoryLine) -> Prediction:
        largest, step = max(self._steps), self._steps.get(size or 1)
        peak = step.peak_bytes if step is not None else line.at(size or 1)
        return Prediction(size, peak, line, self._steps[largest], largest, len(self._steps))


def predict_batch_size(
    tracer: Tracer,
    max_duration_ms: int,
    max_tokens: int,
    budget_bytes: int,
    max_size: int,
    guess: MemoryLine | None = None,
) -> Prediction:
    """The largest batch of one bucket that fits `budget_bytes`; `guess` comes from a neighboring bucket."""
    sizes = _TracedSizes(tracer, (max_duration_ms, max_tokens), budget_bytes, max_size, guess)
    sizes.trace_first()
    while (prediction := sizes.predict()) is None:
        pass
    return prediction
