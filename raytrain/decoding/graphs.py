"""Decoder steps as CUDA graphs: steps of fixed shape, captured once and replayed for every token.

A decoder step is about 15 small kernels per layer, and launching each takes the host longer than the GPU needs to run
it. A graph launches them all at once, if their shapes and addresses are fixed: rows, positions and frames are rounded
up to powers of two, masks hide the padding, and the position is a number on the device. A text that outgrows its
positions moves to the graph of the next size, and a batch that has shrunk to half moves to one of fewer rows.

    programs = programs_for(model, states)                       # None where graphs can't be used
    if programs and programs.have_room(rows, frames, max_tokens):
        steps = StaticSteps(programs, eager)                     # continues from the eager steps, after the prompt

`RAYTRAIN_CUDA_GRAPHS=0` turns them off. Programs are kept for the next batch, up to `MAX_BYTES` of keys and values;
they are dropped when weights change. Only inference mode uses them: during training, validation would hold memory that
the batch-size search did not account for. On a CPU the same step runs without a graph, for tests.

Shapes: R rows, U positions, T frames, each the size of a program.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from raytrain.decoding.steps import EagerSteps, NextToken
from raytrain.model.canary import Canary
from raytrain.model.decoder import LayerCache

VARIABLE = "RAYTRAIN_CUDA_GRAPHS"
MAX_BYTES = 4 << 30
_LEAST_POSITIONS = _LEAST_FRAMES = 64


def size_class(number: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (number - 1).bit_length())


class Program:
    """One step of R rows, U positions and T frames, in tensors with fixed addresses."""

    def __init__(self, programs: Programs, rows: int, positions: int, frames: int) -> None:
        device, dtype = programs.device, programs.dtype
        self.rows, self.positions, self.frames = rows, positions, frames
        self._next_token = programs.next_token
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        # Empty rows attend to a frame: no row may be masked whole.
        self.mask = torch.zeros(rows, 1, 1, frames, dtype=torch.bool, device=device)
        self.mask[..., 0] = True
        heads = programs.next_token.decoder.heads
        width = programs.width // heads
        # Zeros here and in `load`, not uninitialized memory: masked values must still be finite.
        self.cache = [
            LayerCache(
                torch.zeros(2, rows, heads, positions, width, device=device, dtype=dtype),
                torch.zeros(rows, heads, frames, width, device=device, dtype=dtype),
                torch.zeros(rows, heads, frames, width, device=device, dtype=dtype),
                maps,
            )
            for maps in programs.maps
        ]
        self.run: Callable[[], None] = self._step
        if device.type == "cuda":
            self.run = _captured(self._step, programs)

    def _step(self) -> None:
        chosen, log_probs = self._next_token.best(self.tokens[:, None], self.cache, self.position, self.mask)
        self.tokens.copy_(chosen)
        self.log_probs.copy_(log_probs)
        self.position += 1

    def load(self, tokens: Tensor, cache: list[LayerCache], mask: Tensor | None, filled: int) -> None:
        """Copy the state of `len(tokens)` rows, which has `filled` positions."""
        rows, frames = len(tokens), cache[0].cross_keys.shape[2]
        self.tokens[:rows] = tokens
        self.position.fill_(filled)
        self.mask[:rows] = False
        self.mask[:rows, :, :, :frames] = True if mask is None else mask
        for target, source in zip(self.cache, cache, strict=True):
            target.self_keys_values[:, :rows, :, :filled] = source.self_keys_values[:, :, :, :filled]
            target.self_keys_values[:, :rows, :, filled:] = 0
            pairs = ((target.cross_keys, source.cross_keys), (target.cross_values, source.cross_values))
            for target_part, source_part in pairs:
                target_part[:rows, :, :frames] = source_part
                target_part[:rows, :, frames:] = 0


def _captured(step: Callable[[], None], programs: Programs) -> Callable[[], None]:
    """A graph of `step`. The step runs before, since kernels and libraries initialize on their first run."""
    side = torch.cuda.Stream(programs.device)
    side.wait_stream(torch.cuda.current_stream(programs.device))
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream(programs.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Graphs run one at a time, so they can share memory for intermediate results.
    with torch.cuda.graph(graph, pool=programs.pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Programs:
    """A model's programs by size, the least recently used are evicted for new ones."""

    def __init__(self, model: Canary, states: Tensor) -> None:
        self.next_token, self.width = NextToken.of(model), states.shape[2]
        self.device, self.dtype = states.device, states.dtype
        self.maps = [layer.maps() for layer in self.next_token.decoder._decoder.layers]
        self.fingerprint = _fingerprint(model, states)
        self.pool = torch.cuda.graph_pool_handle() if states.is_cuda else None
        self._held: OrderedDict[tuple[int, int, int], Program] = OrderedDict()

    def num_bytes(self, rows: int, positions: int, frames: int) -> int:
        """Keys and values of a program."""
        return 2 * len(self.maps) * rows * (positions + frames) * self.width * self.dtype.itemsize

    def have_room(self, rows: int, frames: int, max_tokens: int) -> bool:
        """Whether such a batch may use programs: a growing text needs two at a time."""
        sizes = size_class(rows), size_class(max_tokens, _LEAST_POSITIONS), size_class(frames, _LEAST_FRAMES)
        return 2 * self.num_bytes(*sizes) <= MAX_BYTES

    def get(self, rows: int, positions: int, frames: int) -> Program:
        """The program for these sizes, rounded up."""
        key = size_class(rows), size_class(positions, _LEAST_POSITIONS), size_class(frames, _LEAST_FRAMES)
        if key not in self._held:
            new = self.num_bytes(*key)
            while self._held and new + sum(self.num_bytes(*held) for held in self._held) > MAX_BYTES:
                self._held.popitem(last=False)
            self._held[key] = Program(self, *key)
        self._held.move_to_end(key)
        return self._held[key]


class StaticSteps:
    """`EagerSteps` in a program's shapes, from their position on."""

    def __init__(self, programs: Programs, eager: EagerSteps) -> None:
        self.programs, self.position, self.rows = programs, eager.position, len(eager.inputs)
        frames = eager.cache[0].cross_keys.shape[2]
        self.program = programs.get(self.rows, self.position + 1, frames)
        self.program.load(eager.inputs[:, 0], eager.cache, eager.mask, self.position)

    def step(self) -> tuple[Tensor, Tensor]:
        """See `Steps.step`."""
        if self.position == self.program.positions:
            self._move(list(range(self.rows)))
        self.program.run()
        self.position += 1
        return self.program.tokens[: self.rows].clone(), self.program.log_probs[: self.rows].clone()

    def keep(self, slots: list[int]) -> list[int]:
        """See `Steps.keep`: keeps all rows if fewer would need an equally large program."""
        if size_class(len(slots)) == self.program.rows:
            return list(range(self.rows))
        self._move(slots)
        return slots

    def _move(self, slots: list[int]) -> None:
        old, rows = self.program, torch.tensor(slots, device=self.programs.device)
        self.program, self.rows = self.programs.get(len(slots), self.position + 1, old.frames), len(slots)
        cache = [layer.select(rows, self.position) for layer in old.cache]
        self.program.load(old.tokens[rows], cache, old.mask[rows], self.position)


_KEPT = threading.local()  # a program holds one batch at a time


def programs_for(model: Canary, states: Tensor) -> Programs | None:
    """The model's programs; None off CUDA, outside inference mode, under autocast, and if they are turned off."""
    usable = states.is_cuda and torch.is_inference_mode_enabled() and os.environ.get(VARIABLE, "1") != "0"
    return kept_programs(model, states) if usable and not torch.is_autocast_enabled("cuda") else None


def kept_programs(model: Canary, states: Tensor) -> Programs:
    """This thread's programs for the model's current weights."""
    if not hasattr(_KEPT, "by_model"):
        _KEPT.by_model = weakref.WeakKeyDictionary()
    by_model: weakref.WeakKeyDictionary[Canary, Programs] = _KEPT.by_model
    programs = by_model.get(model)
    if programs is None or programs.fingerprint != _fingerprint(model, states):
        programs = by_model[model] = Programs(model, states)
    return programs


def _fingerprint(model: Canary, states: Tensor) -> tuple[object, ...]:
    """A key that changes with any weight that a graph reads, written in place or replaced."""
    parts = (model.transf_decoder, model.log_softmax)
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    versions = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    return (states.dtype, states.device, *versions)
