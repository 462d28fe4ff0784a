"""How inductor divides a compiled block into forward and backward, for selective activation checkpointing.

Forward's results that backward needs are a minimal cut through the graph of both (torch/_functorch/partitioners.py).
By default a value is not computed again if a matrix product in backward reads it, since it must then be written to
memory anyway, if it is used far from where it was made, or at the end of a long chain of cheap operators. Without these
rules the cut goes through results of matrix products, attention and convolutions, and through what is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.fx import GraphModule
from torch.utils.checkpoint import CheckpointPolicy

# Products without weights: attention's scores, which grow with the square of the frames and take few operations.
_CHEAP_PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)


class SelectivePartition(CustomPartitionerFn):
    """Keeps what is dear to compute; the rest is computed again in backward."""

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[GraphModule, GraphModule]:
        for operator in _CHEAP_PRODUCTS:
            for node in gm.graph.find_nodes(op="call_function", target=operator):
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        with functorch_config.patch(
            ban_recompute_used_far_apart=False,
            ban_recompute_long_fusible_chains=False,
            ban_recompute_materialized_backward=False,
        ):
            return min_cut_rematerialization_partition(gm, joint_inputs, **options)

    def uuid(self) -> object:
        """Compiled code on disk is looked up by it: raised where the division changes."""
        return "raytrain selective 1"


SELECTIVE = SelectivePartition()
