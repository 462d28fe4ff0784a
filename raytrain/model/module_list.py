"""`nn.ModuleList` with the type of its layers, for the type checker; at run time it is `nn.ModuleList` itself.

self.layers: ModuleList[DecoderBlock] = ModuleList(DecoderBlock(config) for _ in range(4))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Generic, TypeVar

    Layer = TypeVar("Layer", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[Layer]):
        """Layers of one class."""

        def __init__(self, modules: Iterable[Layer]) -> None: ...

        def __iter__(self) -> Iterator[Layer]: ...
else:
    ModuleList = nn.ModuleList
