"""Live bytes of a step on `meta` tensors, and the operators that a device would run.

Meta tensors have shapes and no data. `LiveBytes` notes when each storage is made and when it is freed; `DeviceLike`
makes the step use the operators that CUDA or a CPU uses, since they determine what backward keeps.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_MIB = 2**20
_BLOCK_BYTES = 512
_LARGE_BYTES, _SEGMENT_BYTES, _GAP_BYTES = 10 * _MIB, 2 * _MIB, _MIB // 4
_aten = torch.ops.aten
T = TypeVar("T")
Types = tuple[type, ...]
Options = dict[str, Any]  # of an operator


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of a tensor, from which an equal tensor can be made."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


# What an operator returns, and the layouts of it: for one tensor, none, or several.
Results: TypeAlias = "Tensor | None | Iterable[Results]"
Layouts: TypeAlias = "_Layout | None | tuple[Layouts, ...]"


def rounded(num_bytes: int) -> int:
    """The size of a storage of `num_bytes`, rounded up to 512 bytes."""
    return -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def cuda_block(num_bytes: int) -> int:
    """What PyTorch's caching allocator counts as allocated for `num_bytes`, on average.

    Above 10 MiB it takes segments in units of 2 MiB and splits a block only where more than 1 MiB would remain
    (c10/cuda/CUDACachingAllocator: `kMinLargeAlloc`, `kRoundLarge`, `kSmallSize`). Remainders below 2 MiB are about
    equally likely, so half of the blocks keep theirs, of half a MiB on average. Using the mean, not each size's
    remainder, keeps a step's bytes affine in the batch size. Most weights fill their segments and have no remainder.
    """
    has_gap = num_bytes > _LARGE_BYTES and num_bytes % _SEGMENT_BYTES
    return rounded(num_bytes) + (_GAP_BYTES if has_gap else 0)


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of all storages that operators allocated and that are still alive.

    `phase` and `area` (a module's path) say what is running; `at_peak` holds the live bytes at the peak by the phase
    and area that allocated them. With `remember`, results of purely computing operators are cached by the shapes of
    their arguments: a model of equal layers repeats the same calls, and shape inference is the most expensive part
    here. `block` gives the device bytes for a storage of so many bytes.
    """

    def __init__(self, remember: bool = True, block: Callable[[int], int] = rounded) -> None:
        super().__init__()
        self._block = block
        self.live = self.peak = 0
        self.counts = True  # whether what operators allocate is counted
        self.phase, self.area = "activations", "loss"
        self.at_peak: dict[tuple[str, str], int] = {}
        self._at_new_peak = False
        self._remember = remember
        self._by_origin: Counter[tuple[str, str]] = Counter()
        self._storages: dict[int, tuple[int, tuple[str, str]]] = {}
        self._watchers: dict[int, weakref.ref[UntypedStorage]] = {}
        self._layouts: dict[tuple[Hashable, ...], Layouts] = {}

    def reset(self) -> None:
        """Forget all live storages, but not the cached shapes of operators."""
        self.live = self.peak = 0
        self.phase, self.area = "activations", "loss"
        self.at_peak, self._at_new_peak = {}, False
        for notes in (self._by_origin, self._storages, self._watchers):
            notes.clear()

    def watch(self, tensor: Tensor, phase: str | None = None, area: str | None = None) -> None:
        """Count a tensor's storage until it is freed; a storage that is already watched counts once, under its old
        phase unless `phase` is given."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        watched = self._storages.get(key)
        if watched is not None:
            size, origin = watched
            if phase is not None and origin[0] != phase:
                self._by_origin[origin] -= size
                self._storages[key] = (size, origin := (phase, area or origin[1]))
                self._by_origin[origin] += size
            return
        size, origin = self._block(storage.nbytes()), (phase or self.phase, area or self.area)
        self._storages[key] = (size, origin)
        self._watchers[key] = weakref.ref(storage, partial(self._forget, key))
        self.live += size
        self._by_origin[origin] += size
        if self.live > self.peak:
            self.peak, self._at_new_peak = self.live, True

    def _forget(self, key: int, _: weakref.ref[UntypedStorage]) -> None:
        if self._at_new_peak:
            # The peak so far ends here.
            self.at_peak, self._at_new_peak = dict(self._by_origin), False
        size, origin = self._storages.pop(key)
        self._watchers.pop(key, None)
        self.live -= size
        self._by_origin[origin] -= size

    def __torch_dispatch__(
        self, func: OpOverload, types: Types, args: tuple[Any, ...] = (), kwargs: Options | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _KINDS.get(func) or _kind_of(func)
        if kind == "shares":
            return func(*args, **kwargs)  # no new storage
        if kind == "makes several" or not self._remember:
            result = func(*args, **kwargs)
        else:
            key = (func, _shape_of(args), _shape_of(tuple(kwargs.items())))
            layouts = self._layouts.get(key)
            if layouts is None:
                result = func(*args, **kwargs)
                self._layouts[key] = _layouts_of(result)
            else:
                result = _like(layouts)
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor) and self.counts:
                self.watch(leaf)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs a tenth of the time


_KINDS: dict[OpOverload, str] = {}


def _kind_of(func: OpOverload) -> str:
    """An operator's use of memory: `shares` (a view, or in place), `makes` new tensors, one or a fixed number of them,
    or `makes several` in a list."""
    schema = func._schema
    if any(argument.alias_info is not None for argument in (*schema.arguments, *schema.returns)):
        kind = "shares"
    else:
        plain = all(str(result.type) in ("Tensor", "Tensor?") for result in schema.returns)
        kind = "makes" if plain else "makes several"
    _KINDS[func] = kind
    return kind


def _shape_of(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return (value.dtype, value.shape, value.stride(), value.storage_offset())
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape_of, value))
    return (value.__class__, value)


def _layouts_of(results: Results) -> Layouts:
    if isinstance(results, Tensor):
        return _Layout(tuple(results.shape), results.stride(), results.dtype)
    return None if results is None else tuple(map(_layouts_of, results))


def _like(layouts: Layouts) -> Results:
    if layouts is None:
        return None
    if isinstance(layouts, _Layout):
        return torch.empty_strided(layouts.shape, layouts.stride, dtype=layouts.dtype, device="meta")
    return tuple(map(_like, layouts))


class DeviceLike(TorchFunctionMode):
    """Makes `meta` tensors take the same path as a device's: on CUDA attention by the memory-efficient kernel, which
    takes a bias that has a gradient, and dropout by the fused kernel, which keeps a mask of one byte per element
    (elsewhere dropout multiplies by a mask of the input's type)."""

    def __init__(self, device_type: str, on_backward: Callable[[], None]) -> None:
        super().__init__()
        self._on_backward = on_backward
        self._efficient_attention = self._fused_dropout = device_type == "cuda"
        self._in_backward = False

    def block_begins(self, *_: Any) -> None:
        """In backward a block is recomputed; there modes are off by default."""
        if self._in_backward:
            self.__enter__()

    def block_ends(self, *_: Any) -> None:
        """The end of the block that `block_begins` started."""
        if self._in_backward:
            self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Types, args: tuple[Any, ...] = (), kwargs: Options | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._efficient_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout and self._fused_dropout:
            return torch.native_dropout(args[0], kwargs["p"], kwargs["training"])[0]
        if func is Tensor.backward:
            self._in_backward = True
            self._on_backward()
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        bias = attn_mask
        if bias is not None:
            bias = torch.zeros_like(bias, dtype=query.dtype) if bias.dtype == torch.bool else bias.to(query.dtype)
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return self._mixed(query, key, value, bias, dropout_p, is_causal)

    def _mixed(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout_p: float, is_causal: bool
    ) -> Tensor:
        return _aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal)[0]
