"""How inductor divides a compiled block into forward and backward.

What forward keeps is a minimal cut, by bytes, through the graph of both (torch/_functorch/partitioners.py). By default
a value is not computed again if a matrix product in backward reads it, if it is used far from where it was made, at the
end of a long chain of cheap operators, or if it is random. Here shifted copies, which convolutions written as sums of
shifted products make in float32, are computed again in any case. For selective activation checkpointing only results
of dear operators are not, and the seeds of dropout, from which masks are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from raytrain.model import checkpointing
from raytrain.model.checkpointing import is_kept

_SHIFTED = (torch.ops.aten.constant_pad_nd.default,)
_PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)


class PlainPartition(CustomPartitionerFn):
    """Inductor's rules, but no padded copy is kept."""

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        for node in gm.graph.nodes:
            if node.target in _SHIFTED:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        return min_cut_rematerialization_partition(gm, joint_inputs, **options)

    def uuid(self) -> object:
        """Compiled code on disk is looked up by it, so it changes with the rules here."""
        return get_hash_for_files((__file__,), "plain")


class SelectivePartition(CustomPartitionerFn):
    """Keeps what is dear to compute; the rest is computed again in backward."""

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        for node in gm.graph.nodes:
            policy = _policy(node)
            if policy is not None:
                node.meta["recompute"] = policy
        with functorch_config.patch(
            ban_recompute_used_far_apart=False,
            ban_recompute_long_fusible_chains=False,
            ban_recompute_materialized_backward=False,
            ban_recompute_not_in_allowlist=False,
        ):
            return min_cut_rematerialization_partition(gm, joint_inputs, **options)

    def uuid(self) -> object:
        """Compiled code on disk is looked up by it, so it changes with the rules here and with the operators."""
        return get_hash_for_files((__file__, checkpointing.__file__))


def _policy(node: Node) -> CheckpointPolicy | None:
    """For what cheap operators are not: kept, or computed again nevertheless."""
    operator = node.target
    if not isinstance(operator, OpOverload):
        return None
    if is_kept(operator) or torch.Tag.nondeterministic_seeded in operator.tags:
        return CheckpointPolicy.MUST_SAVE
    if operator in _PRODUCTS and _grows_with_the_square(node):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return None


def _grows_with_the_square(product: Node) -> bool:
    """Attention's scores: a small sum for each pair of frames, whose number is symbolic."""
    left, right = (operand.meta["val"].shape for operand in product.args[-2:])  # type: ignore[union-attr]
    sizes = left[-2], right[-1]
    return isinstance(left[-1], int) and not any(isinstance(size, int) for size in sizes)


PLAIN, SELECTIVE = PlainPartition(), SelectivePartition()
