"""What each choice of `train.activation_checkpointing` saves and costs, traced without a GPU.

For each model, bucket and choice: the predicted largest batch on a device of 80 GiB in bf16; and for a fixed batch the
floating-point operations and the bytes that other kernels than products read and write, relative to `none`. A compiled
block's elementwise operators read what the kernels before them wrote; two kernels that inductor fuses side by side
count twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks._models import config_of
from benchmarks._record import record
from raytrain.model.checkpointing import Checkpointing
from raytrain.training.memory.live_bytes import LiveBytes
from raytrain.training.memory.prediction import predict_batch_size
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings

GIB = 2**30
_BUCKETS = ((5000, 30), (20000, 90), (40000, 170))
_CHOICES: tuple[tuple[bool, Checkpointing], ...] = (
    (False, "none"),
    (False, "selective"),
    (True, "none"),
    (True, "selective"),
    (True, "full"),
)
_WORK_BATCH, _LARGEST = 8, 8192


class Work(TorchDispatchMode):
    """Operations of products, and bytes of all other operators, while a tracer without memory runs inside of it."""

    def __init__(self, meter: LiveBytes) -> None:
        super().__init__()
        self._meter = meter
        self.flops = self.num_bytes = 0
        # What a result that exists in no memory is computed from: bytes by storage.
        self._sources: dict[int, tuple[Tensor, dict[int, int]]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs or {}, out_val=result)
        elif not any(argument.alias_info for argument in func._schema.returns) or func._schema.is_mutable:
            self._elementwise(list(_tensors(args)), list(_tensors(result)))
        return result

    def _elementwise(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        sources: dict[int, int] = {}
        for tensor in inputs:
            key = tensor.untyped_storage()._cdata
            sources |= self._sources[key][1] if key in self._sources else {key: _size(tensor)}
        for tensor in outputs:
            key = tensor.untyped_storage()._cdata
            if self._meter.counts:
                self._sources.pop(key, None)
            else:
                self._sources[key] = tensor, sources  # the tensor, so that its key is not used again
        if self._meter.counts:
            self.num_bytes += sum(sources.values()) + sum(map(_size, outputs))


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, each counted once where it is expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tracer(name: str, mode: Checkpointing, compiled: bool, remember: bool = True) -> StepTracer:
    settings = TrainSettings(num_workers=1, activation_checkpointing=mode)
    return StepTracer(config_of(name), settings, precision="bf16", compiled=compiled, remember=remember)


def work(name: str, edges: tuple[int, int], mode: Checkpointing, compiled: bool) -> Work:
    """Of a step of 8 utterances."""
    tracer = _tracer(name, mode, compiled, remember=False)
    with Work(tracer._meter) as counted:
        tracer.trace(_WORK_BATCH, *edges)
    return counted


def rows_of(name: str, gib: float) -> list[dict[str, Any]]:
    """A row for each bucket and choice."""
    rows: list[dict[str, Any]] = []
    tracers = {choice: _tracer(name, choice[1], choice[0]) for choice in _CHOICES}
    for edges in _BUCKETS:
        base: dict[bool, Work] = {}
        for compiled, mode in _CHOICES:
            predicted = predict_batch_size(tracers[compiled, mode], *edges, int(gib * GIB), _LARGEST)
            counted = work(name, edges, mode, compiled)
            plain = base.setdefault(compiled, counted)
            rows.append(
                {
                    "model": name,
                    "seconds": edges[0] // 1000,
                    "compiled": compiled,
                    "mode": mode,
                    "batch": predicted.batch_size,
                    "flops": round(counted.flops / plain.flops, 4),
                    "other_bytes": round(counted.num_bytes / plain.num_bytes, 4),
                    "other_gb_per_utterance": round(counted.num_bytes / _WORK_BATCH / 1e9, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["canary-1b-flash", "canary-1b"])
    parser.add_argument("--gib", type=float, default=80.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in rows_of(name, arguments.gib)]
    record("activations", {"gib": arguments.gib, "rows": rows}, as_json=arguments.json)


if __name__ == "__main__":
    main()
