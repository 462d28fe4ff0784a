"""Compiled blocks on `meta` tensors, for a trace of the memory of a training step.

What a compiled block keeps for backward is decided when its forward and backward are divided, so they are traced and
divided here as inductor does it (torch/_inductor/compile_fx.py), once for each kind of block with symbolic batch size
and lengths. Then the two graphs run operator by operator, on weights and inputs on `meta`, under `LiveBytes`. Results
that inductor fuses into the kernels that read them never exist on a device and are not counted.

    blocks = CompiledBlocks(blocks_of(model), examples, "selective", meter)
    with blocks.active():
        …   # blocks run as compiled ones
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from raytrain.model.checkpointing import compile_options
from raytrain.model.config import Checkpointing
from raytrain.training.memory.live_bytes import LiveBytes

Compiled = Callable[..., Any]


class CompiledBlocks:
    """Runs a model's blocks as compiled ones, divided for a mode of activation checkpointing.

    `examples` are a block of each kind in training mode, and inputs for it on `meta`. Their sizes are hints for the
    division: those of the first batch, where blocks are compiled. `device_like` makes operators those of a device.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        examples: Iterable[tuple[nn.Module, Sequence[Tensor]]],
        mode: Checkpointing,
        meter: LiveBytes | None = None,
        device_like: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._blocks = blocks
        self._by_kind: dict[type[nn.Module], TracedBlock] = {}
        for block, inputs in examples:
            with device_like():
                self._by_kind[type(block)] = TracedBlock(block, inputs, mode, meter)

    @contextmanager
    def active(self) -> Iterator[None]:
        """While it is active, the blocks' forward methods are replaced; hooks are called as before."""
        for block in self._blocks:
            block.forward = partial(self._by_kind[type(block)], block)
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward


def first_inputs(blocks: Sequence[nn.Module], run: Callable[[], object]) -> list[tuple[nn.Module, list[Tensor]]]:
    """The first block of each kind that `run` calls, and inputs like those it gets."""
    seen: dict[type[nn.Module], tuple[nn.Module, list[Tensor]]] = {}

    def note(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if type(block) not in seen:
            seen[type(block)] = block, [torch.empty_like(x).requires_grad_(x.requires_grad) for x in inputs]

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(note).remove)
        run()
    return list(seen.values())


class _Flat(nn.Module):
    """A block as a function of its parameters, buffers, sizes and inputs; it has none of them itself."""

    def __init__(self, block: nn.Module, num_sizes: int) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that it is no submodule
        self._names = [name for name, _ in (*block.named_parameters(), *block.named_buffers())]
        self._num_sizes = num_sizes

    def forward(self, *values: Any) -> tuple[Tensor, ...]:
        number = len(self._names)
        state = dict(zip(self._names, values[:number], strict=True))
        result = torch.func.functional_call(self._block[0], state, values[number + self._num_sizes :])
        return result if isinstance(result, tuple) else (result,)


class TracedBlock:
    """A function of a block, of the kind of the one given, and its inputs on `meta`, whose sizes may differ from those
    given. For backward it keeps what the compiled block keeps."""

    def __init__(
        self, block: nn.Module, inputs: Sequence[Tensor], mode: Checkpointing, meter: LiveBytes | None = None
    ) -> None:
        from torch._dynamo.source import ConstantSource
        from torch._functorch.aot_autograd import aot_module_simplified
        from torch._guards import TracingContext, tracing
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.virtualized import V
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        fake = FakeTensorMode(shape_env=ShapeEnv())
        state = [fake.from_tensor(_on_cpu(tensor), static_shapes=True) for tensor in _state(block)]
        symbolic = [
            fake.from_tensor(_on_cpu(tensor), source=ConstantSource(f"input_{number}"))
            for number, tensor in enumerate(inputs)
        ]
        sizes, self._places = _sizes(symbolic)
        with (
            V.set_fake_mode(fake),
            tracing(TracingContext(fake)),
            torch.compiler._compile_session_context(),
            _compiling(),
        ):
            self._run = aot_module_simplified(
                _Flat(block, len(sizes)),  # type: ignore[arg-type]  # any module without parameters will do
                [*state, *sizes, *symbolic],
                fw_compiler=partial(_GraphRunner.of, meter),
                bw_compiler=partial(_GraphRunner.of, meter),
                partition_fn=partial(_divided, compile_options(mode), list(range(len(list(block.parameters()))))),
                decompositions=select_decomp_table(),
                keep_inference_input_mutations=True,
            )

    def __call__(self, block: nn.Module, *inputs: Tensor) -> Any:
        sizes = [inputs[number].shape[dim] for number, dim in self._places]
        result = self._run(*_state(block), *sizes, *inputs)
        return result[0] if len(result) == 1 else tuple(result)


@contextmanager
def _compiling() -> Iterator[None]:
    """While it is active, `torch.compiler.is_compiling()`: what is written differently for a compiler is so here."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _state(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _sizes(inputs: Sequence[Tensor]) -> tuple[list[torch.SymInt], list[tuple[int, int]]]:
    """The symbolic sizes among those of the inputs, each once, and where: number of the input and dimension. Given as
    inputs, as torch.compile does, they don't tie the graph to the tensors that they are sizes of."""
    places: dict[str, tuple[torch.SymInt, tuple[int, int]]] = {}
    for number, tensor in enumerate(inputs):
        for dim, size in enumerate(tensor.shape):
            if isinstance(size, torch.SymInt):
                places.setdefault(str(size), (size, (number, dim)))
    return [size for size, _ in places.values()], [place for _, place in places.values()]


def _on_cpu(tensor: Tensor) -> Tensor:
    """An uninitialized tensor on the CPU, where inductor's rules apply (it replaces values on `meta`); its pages are
    never touched."""
    return torch.empty_like(tensor, device="cpu").requires_grad_(tensor.requires_grad)


def _divided(
    options_of_inductor: dict[str, Any],
    static: list[int],
    graph: fx.GraphModule,
    inputs: Sequence[object],
    **options: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward of a joint graph, by inductor's rules. Parameters (inputs `static`) exist anyway."""
    from torch._inductor import config
    from torch._inductor.compile_fx import partition_fn

    with config.patch(options_of_inductor):
        return partition_fn(graph, inputs, **options | {"static_lifetime_input_indices": static})


class _GraphRunner:
    """Runs a graph on `meta`, and frees each value after its last use."""

    def __init__(self, graph: fx.GraphModule, meter: LiveBytes | None) -> None:
        self._meter = meter
        nodes = list(graph.graph.nodes)
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self._output = nodes[-1]
        self._calls = [node for node in nodes if node.op == "call_function"]
        self._attributes = {node: getattr(graph, node.target) for node in nodes if node.op == "get_attr"}
        self._fused = fused_nodes(graph.graph)
        self._last_uses = _last_uses(nodes)
        for node in self._calls:
            if node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default  # as inductor: results may have another layout on `meta`
            node.args = fx.node.map_aggregate(node.args, _to_meta)
            node.kwargs = fx.node.map_aggregate(node.kwargs, _to_meta)

    @classmethod
    def of(cls, meter: LiveBytes | None, graph: fx.GraphModule, _: object) -> Compiled:
        """As a compiler of AOTAutograd."""
        run = partial(cls(graph, meter))
        run._boxed_call = True  # type: ignore[attr-defined]  # the list of inputs is emptied
        return run

    def __call__(self, inputs: list[Any]) -> Any:
        values: dict[fx.Node, Any] = {**self._attributes, **dict(zip(self._inputs, inputs, strict=True))}
        inputs.clear()
        for node in self._inputs:
            if not node.users:
                del values[node]
        for node in self._calls:
            if self._meter is not None:
                self._meter.counts = node not in self._fused
            values[node] = node.target(*_filled(node.args, values), **_filled(node.kwargs, values))
            for ended in self._last_uses.get(node, ()):
                del values[ended]
        if self._meter is not None:
            self._meter.counts = True
        return _filled(self._output.args[0], values)


def _filled(value: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, (tuple, list)):
        return [_filled(part, values) for part in value]
    if isinstance(value, dict):
        return {key: _filled(part, values) for key, part in value.items()}
    return value


def _to_meta(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) else value


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The values that end after each node."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if node.op == "call_function" and value.op != "get_attr":
            ends.setdefault(node, []).append(value)
    return ends


# Elementwise in inductor (torch/_inductor/lowering.py), though the list of AOTAutograd lacks them.
_ALSO_ELEMENTWISE = {
    "select_scatter",
    "slice_scatter",
    "constant_pad_nd",
    "glu",
    "inductor_random",
    "inductor_lookup_seed",
}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "var_mean", "var", "prod", "argmax", "any"}


def fused_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Elementwise calls whose results are read by elementwise calls and reductions alone, which compute them anew in
    their kernels."""
    from torch._functorch.partitioners import get_default_op_list

    kinds = get_default_op_list()

    def is_in_kernels(node: fx.Node) -> bool:
        return kinds.is_fusible(node) or _name_of(node.target) in _ALSO_ELEMENTWISE

    def is_read_in_kernels(node: fx.Node) -> bool:
        return all(is_read_in_kernels(user) if kinds.is_view(user) else is_in_kernels(user) for user in node.users)

    return {
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node.target is not operator.getitem
        and is_in_kernels(node)
        and not kinds.is_view(node)
        and _name_of(node.target) not in _REDUCTIONS
        and is_read_in_kernels(node)
    }


def _name_of(target: Any) -> str:
    return target.overloadpacket.__name__ if isinstance(target, OpOverload) else ""
