"""Predict the memory of a training step without the device: trace it on `meta` tensors.

Meta tensors have shapes and no data. Run the real step on them and note when each storage is made and when it is freed,
and the highest sum of live bytes is the step's peak. The peak is close to affine in the batch size, so two traces say
where to look for the largest batch that fits.

    tracer = StepTracer(model_config, settings, precision="bf16", world_size=8)
    tracer.trace(batch_size=16, max_duration_ms=4000, max_tokens=40).peak_bytes
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain.data.batch import SpeechBatch
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

_FIRST_SIZE = 8
_BLOCK_BYTES = 512  # the CUDA caching allocator's smallest unit
_aten = torch.ops.aten


def rounded(num_bytes: int) -> int:
    """What an allocation of `num_bytes` takes from the device."""
    return -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of all storages that operators made and nobody freed yet.

    `phase` and `place` (a module's path) name what is running; at the highest point `at_peak` holds the live bytes by
    the phase and place that made them. Results of operators that only compute are remembered by the shapes of what they
    were given, where `remember` is on: a model of equal layers asks the same question many times, and working out a
    shape costs more than all else here.
    """

    def __init__(self, remember: bool = True) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.phase, self.place = "activations", "loss"
        self.at_peak: dict[tuple[str, str], int] = {}
        self._at_new_peak = False
        self._remember = remember
        self._by_origin: Counter[tuple[str, str]] = Counter()
        self._storages: dict[int, tuple[int, tuple[str, str]]] = {}
        self._watchers: dict[int, weakref.ref] = {}
        self._layouts: dict[Any, Any] = {}

    def reset(self) -> None:
        """Forget all that is live, but not what operators make of which shapes."""
        self.live = self.peak = 0
        self.phase, self.place = "activations", "loss"
        self.at_peak, self._at_new_peak = {}, False
        for one in (self._by_origin, self._storages, self._watchers):
            one.clear()

    def watch(self, tensor: Tensor, phase: str | None = None, place: str | None = None) -> None:
        """Count a tensor's storage until it is freed; one that is known already counts once, as it did before unless
        `phase` says otherwise."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None:
            if phase is not None and known[1][0] != phase:
                self._by_origin[known[1]] -= known[0]
                self._storages[key] = (known[0], origin := (phase, place or known[1][1]))
                self._by_origin[origin] += known[0]
            return
        size, origin = rounded(storage.nbytes()), (phase or self.phase, place or self.place)
        self._storages[key] = (size, origin)
        self._watchers[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self.live += size
        self._by_origin[origin] += size
        if self.live > self.peak:
            self.peak, self._at_new_peak = self.live, True

    def _forget(self, key: int) -> None:
        if self._at_new_peak:
            # The highest point so far ends here.
            self.at_peak, self._at_new_peak = dict(self._by_origin), False
        size, origin = self._storages.pop(key)
        self._watchers.pop(key, None)
        self.live -= size
        self._by_origin[origin] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func) or _kind_of(func)
        if kind == "shares":
            return func(*args, **kwargs)  # no new storage
        if kind == "makes several" or not self._remember:
            result = func(*args, **kwargs)
        else:
            key = (func, _shape_of(args), _shape_of(tuple(kwargs.items())))
            layout = self._layouts.get(key)
            if layout is None:
                result = func(*args, **kwargs)
                self._layouts[key] = _layout(result)
            else:
                result = _like(layout)
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs a tenth of the time


_KINDS: dict[Any, str] = {}


def _kind_of(func: Any) -> str:
    """What an operator does with memory: `shares` (a view, or in place), `makes` new tensors, one or a fixed number of
    them, or `makes several` in a list."""
    schema = func._schema
    if any(argument.alias_info is not None for argument in (*schema.arguments, *schema.returns)):
        kind = "shares"
    else:
        plain = all(str(one.type) in ("Tensor", "Tensor?") for one in schema.returns)
        kind = "makes" if plain else "makes several"
    _KINDS[func] = kind
    return kind


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, value.shape, value.stride(), value.storage_offset())
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape_of, value))
    return (value.__class__, value)


def _layout(result: Any) -> Any:
    if isinstance(result, Tensor):
        return (tuple(result.shape), result.stride(), result.dtype)
    return None if result is None else tuple(map(_layout, result))


def _like(layout: Any) -> Any:
    if layout is None:
        return None
    if len(layout) == 3 and isinstance(layout[2], torch.dtype):
        return torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
    return tuple(map(_like, layout))


class DeviceLike(TorchFunctionMode):
    """Makes `meta` tensors take the way that a device's would: bf16 autocast, and on CUDA attention by the
    memory-efficient kernel, which takes a bias that has a gradient.

    Autocast knows no `meta` device. Its rule for CUDA is short: matrix products, convolutions and attention take bf16,
    with one bf16 copy of each float32 weight for the whole forward pass; normalisations, softmax and losses take
    float32; all others take what comes.
    """

    _LOWER = {
        torch.nn.functional.linear, torch.matmul, torch.bmm, torch.nn.functional.conv1d, torch.nn.functional.conv2d,
        torch.conv1d, torch.conv2d, Tensor.matmul, Tensor.__matmul__,
    }  # fmt: skip
    _FULL = {
        torch.nn.functional.layer_norm, torch.nn.functional.softmax, torch.nn.functional.log_softmax, torch.softmax,
        torch.log_softmax, Tensor.softmax, Tensor.log_softmax, torch.nn.functional.cross_entropy,
        torch.nn.functional.nll_loss, torch.nn.functional.ctc_loss, Tensor.pow, torch.pow, Tensor.sum, torch.sum,
    }  # fmt: skip

    def __init__(self, device_type: str, bf16: bool, on_backward: Callable[[], None]) -> None:
        super().__init__()
        self._bf16, self._on_backward = bf16, on_backward
        self._efficient_attention = device_type == "cuda"
        self._in_backward = False
        self._active = bf16
        self._copies: dict[int, Tensor] = {}

    def block_begins(self, *_: Any) -> None:
        """In backward a block is computed again, under its own autocast; there modes are off by default."""
        if self._in_backward:
            self.__enter__()

    def block_ends(self, *_: Any) -> None:
        """The end of what `block_begins` began."""
        if self._in_backward:
            self.__exit__(None, None, None)

    def end_autocast(self, *_: Any) -> None:
        """The forward pass has ended: its copies of weights live on only where backward needs them."""
        self._copies.clear()
        self._active = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self._efficient_attention:
            return self._attention(*args, **kwargs)
        if func is Tensor.backward:
            self._active, self._in_backward = self._bf16, True
            self._on_backward()
        if self._active:
            if func in self._LOWER:
                return func(*map(self._lower, args), **{name: self._lower(value) for name, value in kwargs.items()})
            if func in self._FULL:
                return func(*map(_full, args), **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self._in_backward or not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(torch.bfloat16)
        return self._copies[id(value)]

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        if self._active:
            query, key, value = map(self._lower, (query, key, value))
        bias = attn_mask
        if bias is not None:
            bias = torch.zeros_like(bias, dtype=query.dtype) if bias.dtype == torch.bool else bias.to(query.dtype)
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        found = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal)
        return found[0]


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step: what stays between steps (parameters, optimizer, reducer), the highest point, and what was
    live there.

    `at_peak` is bytes by (phase, place): parameters, gradients and optimizer; activations, which forward made and
    backward needs; and temporary, what backward makes on its way. The place is the module, as far as one made it.
    """

    resident_bytes: int
    peak_bytes: int
    at_peak: dict[tuple[str, str], int] = field(default_factory=dict)

    def by_phase(self) -> dict[str, int]:
        """Bytes at the peak by phase, the largest first."""
        return _summed(self.at_peak, 0)

    def by_module(self) -> dict[str, int]:
        """Bytes at the peak by module, the largest first."""
        return _summed(self.at_peak, 1)


def _summed(at_peak: dict[tuple[str, str], int], part: int) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for origin, size in at_peak.items():
        sums[origin[part]] += size
    return dict(sums.most_common())


class _Resident:
    """Stands for the optimizer on meta: its states are there, and its fused kernel needs nothing beside them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self.states = [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]
        self.steps = [torch.empty((), device="meta") for _ in parameters]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        pass


class StepTracer:
    """Traces training steps of one model as a `device_type` (cuda or cpu) would run them. `precision` is fp32 or bf16.

    With several workers DDP's reducer holds all gradients in its buckets between steps too, and a parameter's own
    gradient lives only until it is copied there (`gradient_as_bucket_view`).
    """

    def __init__(
        self, config: ModelConfig, settings: TrainSettings, *, precision: str = "fp32", world_size: int = 1,
        device_type: str = "cuda", remember: bool = True,
    ) -> None:  # fmt: skip
        self._config, self._settings, self._precision = config, settings, precision
        self._device_type = device_type
        with torch.device("meta"):
            self._model = Canary(config).train()
        self._model.encoder.checkpoint_blocks = settings.activation_checkpointing
        self._parameters = {name: one for name, one in self._model.named_parameters() if one.requires_grad}
        self._optimizer = _Resident(list(self._parameters.values()))
        averaged = settings.average_decay is not None
        self._average = [torch.empty_like(one) for one in self._parameters.values()] if averaged else []
        self._meter = LiveBytes(remember)
        self._reducer = None
        if world_size > 1:
            self._reducer = torch.empty(sum(one.numel() for one in self._parameters.values()), device="meta")
        offset = 0
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(self._gradient_hook(_area(name), offset))
            offset += parameter.numel()

    def _gradient_hook(self, area: str, offset: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self._reducer is not None:
                parameter.grad = self._reducer[offset : offset + parameter.numel()].view_as(parameter)
            elif parameter.grad is not None:
                self._meter.watch(parameter.grad, "gradients", area)

        return hook

    def trace(self, batch_size: int, max_duration_ms: int, max_tokens: int) -> StepMemory:
        """Bytes of a step of `batch_size` utterances at a bucket's upper edges."""
        meter, model = self._meter, self._model
        meter.reset()
        with torch.device("meta"):
            batch = SpeechBatch.synthetic(
                batch_size, max_duration_ms, max_tokens, vocab=self._config.vocab_size, device="meta",
                sample_rate=self._config.sample_rate,
            )  # fmt: skip
        for name, parameter in model.named_parameters():
            meter.watch(parameter, "parameters", _area(name))
        for name, buffer in model.named_buffers():
            meter.watch(buffer, "parameters", _area(name))
        for tensor in (*self._optimizer.states, *self._optimizer.steps):
            meter.watch(tensor, "optimizer", "optimizer")
        if self._reducer is not None:
            meter.watch(self._reducer, "gradients", "reducer")
        for tensor in self._average:
            meter.watch(tensor, "optimizer", "average")
        resident = meter.live
        for tensor in batch.tensors():
            meter.watch(tensor, "activations", "batch")

        def backward_begins() -> None:
            meter.phase, meter.place = "temporary", "backward"

        device_like = DeviceLike(self._device_type, self._precision == "bf16", backward_begins)
        # Thousands of objects come and go in a trace, without cycles; looking for some takes a fifth of its time.
        collects = gc.isenabled()
        gc.disable()
        hooks = [model.register_forward_hook(device_like.end_autocast)]
        for block in model.encoder.layers:
            hooks.append(block.register_forward_pre_hook(device_like.block_begins))
            # Recomputation stops with an exception as soon as it has what backward needs.
            hooks.append(block.register_forward_hook(device_like.block_ends, always_call=True))
        try:
            with _places(model, meter), meter, device_like:
                train_step(
                    model, [batch] * min(2, self._settings.accumulate), self._optimizer,  # type: ignore[arg-type]
                    self._settings,
                    precision=self._precision, label_smoothing=self._config.label_smoothing,
                )  # fmt: skip
        finally:
            for hook in hooks:
                hook.remove()
            if collects:
                gc.enable()
        self._optimizer.zero_grad()
        return StepMemory(resident, meter.peak, {origin: size for origin, size in meter.at_peak.items() if size})


def _area(name: str) -> str:
    """A module's or parameter's name without what comes after the second part: encoder.layers, log_softmax.mlp, …"""
    return ".".join(part for part in name.split(".")[:2] if part not in ("weight", "bias"))


@contextmanager
def _places(model: Canary, meter: LiveBytes) -> Iterator[None]:
    """Name the modules of the first two levels while they run."""
    handles: list[Any] = []
    before: list[str] = []

    def enter(area: str) -> None:
        before.append(meter.place)
        meter.place = area

    def leave(*_: Any) -> None:
        meter.place = before.pop()

    for name, module in model.named_modules():
        # A list of layers is never called itself.
        if name and (name.count(".") < 2 or name.split(".")[2].isdigit() and name.count(".") == 2):
            area = _area(name)
            handles.append(module.register_forward_pre_hook(lambda *_, area=area: enter(area)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class MemoryLine:
    """Peak bytes as an affine function of the batch size: `base_bytes + batch_size · slope_bytes`."""

    base_bytes: float
    slope_bytes: float

    @classmethod
    def through(cls, small: int, small_peak: int, large: int, large_peak: int) -> MemoryLine:
        """The line through two traced points; `small` and `large` are batch sizes."""
        slope = (large_peak - small_peak) / (large - small)
        return cls(base_bytes=small_peak - small * slope, slope_bytes=slope)

    def largest_batch(self, budget_bytes: int) -> int:
        """The largest batch size on the line within the budget, at least 1."""
        return max(1, int((budget_bytes - self.base_bytes) // max(self.slope_bytes, 1.0)))


@dataclass(frozen=True)
class Prediction:
    """The largest batch that fits a budget by the tracer, None where not even 1 does; `peak_bytes` at that size (or at
    1), the `line` near it, the step of the largest size traced, that size, and how many traces it took."""

    batch_size: int | None
    peak_bytes: int
    line: MemoryLine
    step: StepMemory
    traced_size: int
    num_traces: int


@dataclass
class Neighbours:
    """What other buckets' predictions suggest for the next: bytes per utterance are close to a polynomial in its edges
    (frames, frames² of attention, tokens, frames·tokens), which a few buckets determine."""

    edges: list[tuple[int, int]] = field(default_factory=list)
    lines: list[MemoryLine] = field(default_factory=list)

    def add(self, max_duration_ms: int, max_tokens: int, line: MemoryLine) -> None:
        """One bucket's line."""
        self.edges.append((max_duration_ms, max_tokens))
        self.lines.append(line)

    def guess(self, max_duration_ms: int, max_tokens: int) -> MemoryLine | None:
        """The line to expect for a bucket; None before the first is known."""
        if not self.lines:
            return None
        base = self.lines[-1].base_bytes
        if len(self.lines) < _UNKNOWNS:
            return MemoryLine(base, self.lines[-1].slope_bytes * max_duration_ms / self.edges[-1][0])
        slopes = np.array([line.slope_bytes for line in self.lines])
        terms = np.array([_terms(*edges) for edges in self.edges])
        # Relative errors count, since the largest size that fits goes with 1 / slope.
        weights = np.linalg.lstsq(terms / slopes[:, None], np.ones(len(slopes)), rcond=None)[0]
        slope = float(np.dot(weights, _terms(max_duration_ms, max_tokens)))
        return MemoryLine(base, slope if slope > 0 else float(slopes[-1]))


_UNKNOWNS = 5


def _terms(max_duration_ms: int, max_tokens: int) -> tuple[float, ...]:
    seconds, tokens = max_duration_ms / 1000, max_tokens / 10
    return (1.0, seconds, seconds * seconds, tokens, seconds * tokens)


_CLOSE = 0.02  # where two lines through traced sizes differ by less, another trace teaches nothing


def predict_batch_size(
    tracer: StepTracer, max_duration_ms: int, max_tokens: int, budget_bytes: int, max_size: int,
    guess: MemoryLine | None = None,
) -> Prediction:  # fmt: skip
    """The largest batch of one bucket that fits `budget_bytes`, by one to three traces as a rule; `guess` is what a
    neighbouring bucket suggests.

    A step's peak is the highest of several moments (the end of forward, the update, …), each affine in the batch size,
    so it is convex: a line through two sizes lies below it beyond them, hence the answer is at most what the line says;
    and above it between them, hence what the line says there is safe.
    """
    known: dict[int, StepMemory] = {}

    def trace(size: int) -> None:
        known[size] = tracer.trace(size, max_duration_ms, max_tokens)

    def line(sizes: list[int]) -> MemoryLine:
        """Through the two of `sizes` next to the answer, or from where a step without utterances should be."""
        if len(sizes) > 1:
            small, large = sizes[:2]
            return MemoryLine.through(small, known[small].peak_bytes, large, known[large].peak_bytes)
        memory = known[sizes[0]]
        base = guess.base_bytes if guess is not None else memory.resident_bytes
        return MemoryLine(base, (memory.peak_bytes - base) / sizes[0])

    def answer(size: int | None, near: MemoryLine) -> Prediction:
        traced = max(known)
        at = size or 1
        peak = known[at].peak_bytes if at in known else round(near.base_bytes + at * near.slope_bytes)
        return Prediction(size, peak, near, known[traced], traced, len(known))

    trace(min(max_size, guess.largest_batch(budget_bytes) if guess is not None else _FIRST_SIZE))
    while True:
        fits = sorted((size for size in known if known[size].peak_bytes <= budget_bytes), reverse=True)
        fails = sorted(size for size in known if known[size].peak_bytes > budget_bytes)
        if not fits:
            if fails[0] == 1:
                return answer(None, line(fails))
            trace(min(fails[0] - 1, line(fails).largest_batch(budget_bytes)))
            continue
        low = fits[0]
        near = line([low, fails[0]] if fails else fits)
        size = min(max_size, near.largest_batch(budget_bytes))
        if fails and (size <= low or fails[0] <= low * (1 + 5 * _CLOSE)):
            return answer(max(low, min(size, fails[0] - 1)), near)
        if size <= low * (1 + _CLOSE):
            return answer(low, near)
        trace(size)
