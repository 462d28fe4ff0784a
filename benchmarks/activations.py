"""What each choice of `train.activation_checkpointing` saves and costs, traced without a GPU.

For each model, bucket and choice: the predicted largest batch on a device of 80 GiB in bf16; and for a fixed batch the
floating-point operations relative to `none`, and for eager blocks the bytes that other operators than products read and
write. For compiled blocks there are no bytes: operators in their graphs are not kernels, and those that share a kernel
would count its inputs again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks._models import config_of
from benchmarks._record import record
from raytrain.model.config import Checkpointing
from raytrain.training.memory.prediction import predict_batch_size
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import TrainSettings

GIB = 2**30
_BUCKETS = ((5000, 30), (20000, 90), (40000, 170))
_CHOICES: tuple[tuple[bool, Checkpointing], ...] = (
    (False, "none"),
    (False, "selective"),
    (False, "full"),
    (True, "none"),
    (True, "selective"),
    (True, "full"),
)
_WORK_BATCH, _LARGEST = 8, 8192


class Work(TorchDispatchMode):
    """Operations of products, and bytes that all other operators read and write, while a tracer that remembers no
    shapes runs inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.num_bytes = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs or {}, out_val=result)
        elif func._schema.is_mutable or not any(returned.alias_info for returned in func._schema.returns):
            self.num_bytes += sum(map(_size, (*_tensors(args), *_tensors(result))))
        return result


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


def _work(tracer: StepTracer, edges: tuple[int, int]) -> Work:
    with Work() as counted:
        tracer.trace(_WORK_BATCH, *edges)
    return counted


def rows_of(name: str, gib: float) -> list[dict[str, Any]]:
    """A row for each choice and bucket."""
    rows: list[dict[str, Any]] = []
    plain: dict[tuple[bool, int], Work] = {}
    for compiled, mode in _CHOICES:
        tracer, counting = _tracer(name, mode, compiled), _tracer(name, mode, compiled, remember=False)
        for edges in _BUCKETS:
            predicted = predict_batch_size(tracer, *edges, int(gib * GIB), _LARGEST)
            counted = _work(counting, edges)
            base = plain.setdefault((compiled, edges[0]), counted)
            row: dict[str, Any] = {"model": name, "compiled": compiled, "mode": mode, "seconds": edges[0] // 1000}
            row |= {"batch": predicted.batch_size, "flops": round(counted.flops / base.flops, 4)}
            if not compiled:
                row["other_bytes"] = round(counted.num_bytes / base.num_bytes, 4)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
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
