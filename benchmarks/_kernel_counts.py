"""Kernels, bytes and operations of PyTorch's operators on `meta` tensors, as CUDA would run them without a compiler.

An operator reads each input once and writes each output once, of an expanded or sliced tensor the elements that are
there. `_LAUNCHES` has the operators that are several kernels in PyTorch 2.13 (aten/src/ATen/native/cuda), with the
bytes that pass between these. Copies that libraries make inside of an operator (layouts for cuDNN) don't show here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Options = dict[str, Any]
_SPARSE_READS = {"embedding", "index", "gather", "nll_loss_forward", "nll_loss_backward", "index_select"}
_OVERWRITES = {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "bernoulli_"}
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
_RELABELS = {"_unsafe_view", "_reshape_alias", "transpose_", "squeeze_", "unsqueeze_", "t_", "as_strided_", "detach_"}
_FREE = _ALLOCATES | _RELABELS | {"resize_", "set_", "record_stream", "sym_size", "sym_stride"}
_FEW_PRODUCTS = 64  # for each output: a convolution of fewer is bound by memory
# Kernels of an operator, and how often more than once its first output is written and read.
_LAUNCHES: dict[str, tuple[int, int]] = {
    "native_layer_norm_backward": (2, 0),  # of the input, and of weight and bias
    "native_batch_norm": (3, 0),  # statistics, running statistics, output
    "native_batch_norm_backward": (2, 0),
    "_scaled_dot_product_efficient_attention_backward": (2, 0),
    "_scaled_dot_product_flash_attention_backward": (3, 0),
    "relative_attention_backward": (3, 0),  # of queries, keys and positions
    "constant_pad_nd": (2, 1),  # filled, then the inner part is copied
    "slice_backward": (2, 1),
    "select_backward": (2, 1),
    "masked_fill": (2, 2),  # a clone, filled in place
    "embedding_dense_backward": (5, 1),  # zeros, indices sorted, summed
    "nll_loss_backward": (2, 0),
}
# torch's multi_tensor_apply: tensors and blocks of one launch by the number of lists, elements of a block.
_MOST_TENSORS, _MOST_BLOCKS, _CHUNK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536


@dataclass
class Cost:
    """What operators take: kernels, bytes read and written, operations of matrix products."""

    kernels: int = 0
    num_bytes: int = 0
    flops: int = 0
    calls: int = 0

    def add(self, cost: Cost) -> None:
        """Add another's numbers."""
        self.kernels += cost.kernels
        self.num_bytes += cost.num_bytes
        self.flops += cost.flops
        self.calls += cost.calls


@dataclass(frozen=True)
class Origin:
    """Where operators come from: part of the step, forward or backward; and what: a matrix product or not, name."""

    part: str
    phase: str
    is_product: bool
    operator: str


Costs = dict[Origin, Cost]


def summed(costs: Costs, select: Callable[[Origin], bool] = lambda origin: True) -> Cost:
    """The sum over selected origins."""
    total = Cost()
    for origin, cost in costs.items():
        if select(origin):
            total.add(cost)
    return total


class KernelCounter(TorchDispatchMode):
    """While active, counts operators. `parts` says which part of the step is running; by default it is one part."""

    def __init__(self, parts: Callable[[], tuple[str, str]] = lambda: ("all", "forward")) -> None:
        super().__init__()
        self._parts = parts
        self._lists: defaultdict[Origin, list[int]] = defaultdict(list)
        self.costs: Costs = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: Options | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _FREE or _is_view(func):
            return result
        cost = cost_of_call(func, args, kwargs, result)
        if cost.kernels:
            part, phase = self._parts()
            origin = Origin(part, phase, is_product(func, args), name)
            self.costs.setdefault(origin, Cost()).add(cost)
            self._lists[origin].append(max((tensor.numel() for tensor in _tensors((args, kwargs))), default=0))
        return result

    def join_lists(self, part: str, names: dict[str, int]) -> None:
        """Operators of a part that take a tensor each, on `meta`, take lists on CUDA: `names` to numbers of lists."""
        for origin, cost in self.costs.items():
            if origin.part == part and origin.operator in names:
                cost.kernels = list_launches(self._lists[origin], names[origin.operator])


def cost_of_call(func: OpOverload, args: tuple[Any, ...], kwargs: Options, result: object) -> Cost:
    """Kernels, bytes and operations of a call that returned `result`."""
    name = func.overloadpacket.__name__
    inputs, outputs = _read(func, args, kwargs), _written(func, args, kwargs, result)
    moved = sum(map(touched_bytes, outputs))
    if not moved:
        return Cost()
    first = touched_bytes(outputs[0])
    if name in _SPARSE_READS:
        moved += sum(map(touched_bytes, inputs[1:])) + min(first, touched_bytes(inputs[0]))
    else:
        moved += sum(map(touched_bytes, inputs))
    kernels, passes = _LAUNCHES.get(name, (1, 0))
    if name == "convolution" and args[2] is not None and not _is_depthwise(args[0], args[1], args[8]):
        kernels, passes = 2, 2  # cuDNN adds no bias
    if name == "convolution_backward":
        kernels = sum(args[10])
    if name.startswith("_foreach_") or name.startswith("_fused_"):
        lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
        kernels = list_launches([tensor.numel() for tensor in lists[0]], min(5, len(lists)))
    return Cost(kernels, moved + passes * first, _flops(func, args, kwargs, result), 1)


def is_product(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether a call is bound by arithmetic: matrix products, attention, and convolutions of many inputs."""
    name = func.overloadpacket.__name__
    if name in ("convolution", "convolution_backward"):
        weight = args[1] if name == "convolution" else args[2]
        return math.prod(weight.shape[1:]) >= _FEW_PRODUCTS
    return is_product_name(name)


def launches(name: str) -> int:
    """Kernels of an operator, by its name."""
    return _LAUNCHES.get(name, (1, 0))[0]


def is_product_name(name: str) -> bool:
    """As `is_product`, by the name of an operator other than a convolution."""
    return name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul") or "attention" in name


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements."""
    number = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    if tensor.numel() == 0:
        return 0
    return min(number * tensor.element_size(), tensor.untyped_storage().nbytes())


def list_launches(sizes: Iterable[int], lists: int) -> int:
    """Kernels that `multi_tensor_apply` launches for tensors of these sizes, in so many lists."""
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        for chunk in range(-(-size // _CHUNK)):
            blocks += 1
            is_last = chunk == -(-size // _CHUNK) - 1
            if blocks == _MOST_BLOCKS or tensors == _MOST_TENSORS[lists] and is_last:
                launches, blocks, tensors = launches + 1, 0, 0 if is_last else 1
    return launches + (blocks > 0)


def _is_view(func: OpOverload) -> bool:
    aliases = [argument.alias_info for argument in (*func._schema.arguments, *func._schema.returns)]
    return any(alias is not None for alias in aliases) and not any(alias and alias.is_write for alias in aliases)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _named(func: OpOverload, args: tuple[Any, ...], kwargs: Options) -> Iterator[tuple[Any, object]]:
    """Arguments as in the schema, and their values."""
    for number, argument in enumerate(func._schema.arguments):
        yield argument, args[number] if number < len(args) else kwargs.get(argument.name)


def _read(func: OpOverload, args: tuple[Any, ...], kwargs: Options) -> list[Tensor]:
    overwrites = func.overloadpacket.__name__ in _OVERWRITES
    reads: list[Tensor] = []
    for argument, value in _named(func, args, kwargs):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if not (is_written and (overwrites or argument.is_out)):
            reads += _tensors(value)
    return reads


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: Options, result: object) -> list[Tensor]:
    written = {id(tensor): tensor for tensor in _tensors(result)}
    for argument, value in _named(func, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {id(tensor): tensor for tensor in _tensors(value)}
    return list(written.values())


def _is_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    return groups == x.shape[1] and weight.shape[1] == 1


def _flops(func: OpOverload, args: tuple[Any, ...], kwargs: Options, result: object) -> int:
    if not is_product(func, args):
        return 0
    if (formula := flop_registry.get(func.overloadpacket)) is not None:
        return int(formula(*args, **kwargs, out_val=result))
    return _attention_flops(func.overloadpacket.__name__, args)


def _attention_flops(name: str, args: tuple[Any, ...]) -> int:
    """Of an attention operator with relative positions and (B, T, H, K) queries: scores by content and by position, and
    the weighted sum; for backward each of them again for its two inputs, and the scores once more."""
    queries = args[1] if name.endswith("backward") else args[0]
    batch, time, heads, width = queries.shape
    product = 2 * batch * heads * time * time * width
    return product * (3 + 2 + 3 if name.endswith("backward") else 3)


class StepParts:
    """Which part of a training step is running, by hooks on the model's modules.

    In backward it is the part that made the node of the graph: autograd numbers its nodes, and a module's forward pass
    makes those between two numbers.
    """

    def __init__(self, parts: Iterable[tuple[nn.Module, str]], rest: str = "rest of the model") -> None:
        self._rest = rest
        self._stack: list[str] = []
        self._ranges: list[tuple[int, int, str]] = []
        self._ended = False
        self._hooks: list[Any] = []
        for module, part in parts:
            self._hooks.append(module.register_forward_pre_hook(self._enter(part)))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        self._starts: list[int] = []

    def _enter(self, part: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            self._stack.append(part)
            self._starts.append(torch.autograd._get_sequence_nr())

        return enter

    def _leave(self, *_: object) -> None:
        part, start = self._stack.pop(), self._starts.pop()
        if torch._C._current_autograd_node() is None:
            self._ranges.append((start, torch.autograd._get_sequence_nr(), part))

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __call__(self) -> tuple[str, str]:
        node = torch._C._current_autograd_node()
        if node is None:
            part = self._stack[-1] if self._stack else ("update" if self._ended or not self._ranges else "loss")
            return part, "forward"
        self._ended = True
        if self._stack:
            return self._stack[-1], "backward"  # computed again
        number = node._sequence_nr()
        inner = [r for r in self._ranges if r[0] <= number < r[1]]
        return (min(inner, key=lambda r: r[1] - r[0])[2] if inner else "loss"), "backward"


def by_operator(costs: Costs) -> dict[str, Cost]:
    """Sums by operator, those that move most bytes first."""
    sums: defaultdict[str, Cost] = defaultdict(Cost)
    for origin, cost in costs.items():
        sums[origin.operator].add(cost)
    order = Counter({name: cost.num_bytes for name, cost in sums.items()}).most_common()
    return {name: sums[name] for name, _ in order}
