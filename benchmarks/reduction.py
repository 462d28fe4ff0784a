"""The share of a training step that GPUs wait for the exchange of gradients, computed for clusters of any size; and
what rounding them to bf16 changes, measured on two processes.

    python -m benchmarks.reduction                  # docs/scale.md quotes its table
    python -m benchmarks.reduction --gpus 8 1024 --bucket-mib 25 100 --no-accuracy --json

Nothing here was timed on a cluster. The step time is measured (0.42 s, one H200) or the goal (0.21 s); the backward
pass is divided among blocks by their multiply-adds, DDP's buckets are filled in its order, and each is reduced when
its last gradient is there and the bucket before has been. An all-reduce is a ring or a tree, whichever is faster:
inside a node a reduce-scatter and an all-gather over NVLink, between nodes one all-reduce by each GPU of its eighth.
Bandwidths are reduced to what NCCL reaches of them, latencies per hop are those of its Simple protocol
(nccl/src/graph/tuning.cc, `hwLat`). Left out: kernels of NCCL that take multiprocessors from the backward pass,
congestion, and ranks that wait for the slowest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from benchmarks._models import config_of
from benchmarks._record import record
from benchmarks._reduction_accuracy import accuracy
from raytrain.model.block import blocks_of
from raytrain.model.canary import Canary
from raytrain.training.memory.ranks import area_of
from raytrain.training.parallel import BUCKET_MIB

GPUS_PER_NODE = 8
MODELS = ("canary-1b-flash", "canary-1b")
STEP_SECONDS = (0.42, 0.21)
_FRAMES, _TOKENS = 250, 90  # of an utterance of 20 s
_OPTIMIZER_SECONDS = 0.010
_SUBSAMPLING = 15 / 140  # of the encoder's forward pass, measured on an H200
_MIB = 2**20


@dataclass(frozen=True)
class Network:
    """Bytes per second in each direction, and seconds per hop, between the GPUs of a node and between nodes (of one
    GPU)."""

    nvlink: float = 0.8 * 450e9
    link: float = 0.9 * 50e9
    nvlink_hop: float = 3.4e-6
    link_hop: float = 14e-6
    memory: float = 4e12

    def all_reduce_seconds(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-reduce of so many bytes on each GPU."""
        inside = min(num_gpus, GPUS_PER_NODE)
        nodes = -(-num_gpus // GPUS_PER_NODE)
        in_node = 2 * (inside - 1) / inside * num_bytes / self.nvlink
        between = 2 * (nodes - 1) / nodes * num_bytes / inside / self.link
        hops_inside = 2 * (inside - 1) * self.nvlink_hop
        ring, tree = 2 * (nodes - 1), 2 * math.ceil(math.log2(nodes)) if nodes > 1 else 0
        # Both parts are pipelined in chunks; a tree reaches 0.9 of a ring's bandwidth.
        by_ring = max(in_node, between) + hops_inside + ring * self.link_hop
        by_tree = max(in_node, between / 0.9) + hops_inside + tree * self.link_hop
        return min(by_ring, by_tree)

    def rounding_seconds(self, num_elements: float) -> float:
        """Seconds to round float32 numbers to bf16 and to widen them again."""
        return 12 * num_elements / self.memory


@dataclass(frozen=True)
class Part:
    """A part of the model that backward completes as a unit: its trained numbers, and its share of the time."""

    numbers: int
    share: float


def parts_of(model_name: str) -> list[Part]:
    """The model's parts in the order of backward. Time is proportional to multiply-adds of weights."""
    with torch.device("meta"):
        model = Canary(config_of(model_name))
    blocks = {
        id(parameter): number for number, block in enumerate(blocks_of(model)) for parameter in block.parameters()
    }
    num_encoder = len(model.encoder.layers)
    numbers = [0] * len(blocks_of(model))
    rest = {"encoder": 0, "decoder": 0}
    for name, parameter in model.named_parameters():
        if id(parameter) in blocks:
            numbers[blocks[id(parameter)]] += parameter.numel()
        else:
            rest["encoder" if area_of(name).startswith("encoder") else "decoder"] += parameter.numel()
    encoder, decoder = numbers[:num_encoder], numbers[num_encoder:]
    work = [_FRAMES * size for size in encoder]
    subsampling = sum(work) * _SUBSAMPLING / (1 - _SUBSAMPLING)
    # Head and embedding share a weight, whose gradient is complete when the embedding's is.
    order = [(size, _TOKENS * size) for size in reversed(decoder)] + [(rest["decoder"], _TOKENS * rest["decoder"])]
    order += list(zip(reversed(encoder), reversed(work), strict=True)) + [(rest["encoder"], subsampling)]
    total = sum(units for _, units in order)
    return [Part(size, units / total) for size, units in order]


def buckets(parts: Sequence[Part], backward: float, bucket_bytes: float) -> Iterator[tuple[float, float]]:
    """DDP's buckets: numbers, and the second of the backward pass at which the last gradient is there.

    A block's gradients come evenly over its time; a bucket takes whole sixteenths of a block, about a weight each.
    """
    time, filled = 0.0, 0.0
    for part in parts:
        for _ in range(16):
            time += part.share * backward / 16
            filled += part.numbers / 16
            if 4 * filled >= bucket_bytes:
                yield filled, time
                filled = 0.0
    if filled:
        yield filled, time


def simulate(
    parts: Sequence[Part], step: float, num_gpus: int, network: Network, *, bf16: bool, bucket_mib: float
) -> dict[str, float]:
    """Milliseconds of the exchange, those of it after the end of backward, and the latter's share of the step."""
    backward = (step - _OPTIMIZER_SECONDS) * 2 / 3
    busy, end = 0.0, 0.0
    for numbers, ready in buckets(parts, backward, bucket_mib * _MIB):
        seconds = network.all_reduce_seconds(numbers * (2 if bf16 else 4), num_gpus)
        seconds += network.rounding_seconds(numbers) if bf16 else 0.0
        busy += seconds
        end = max(end, ready) + seconds
    waiting = max(0.0, end - backward)
    return {
        "exchange_ms": round(1000 * busy, 1),
        "waiting_ms": round(1000 * waiting, 1),
        "waiting_share": round(waiting / (step + waiting), 4),
    }


def table(gpus: Sequence[int], bucket_mib: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each model, step time, link, size of cluster, bucket and type."""
    links = {"400 Gb/s per GPU": Network(), "400 Gb/s per node": Network(link=0.9 * 50e9 / GPUS_PER_NODE)}
    rows = []
    for name in MODELS:
        parts = parts_of(name)
        for step, (link, network), count, size, bf16 in product(
            STEP_SECONDS, links.items(), gpus, bucket_mib, (False, True)
        ):
            figures = simulate(parts, step, count, network, bf16=bf16, bucket_mib=size)
            labels = {"model": name, "step_seconds": step, "link": link, "gpus": count, "bucket_mib": size}
            rows.append({**labels, "reduce_in": "bf16" if bf16 else "fp32", **figures})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--bucket-mib", type=float, nargs="+", default=[1, 25, BUCKET_MIB, 400])
    parser.add_argument("--no-accuracy", action="store_true", help="do not train on two processes")
    parser.add_argument("--steps", type=int, default=200, help="steps of the training that shows bf16's accuracy")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "parameters": {name: sum(part.numbers for part in parts_of(name)) for name in MODELS},
        "network": asdict(Network()),
        "rows": table(arguments.gpus, arguments.bucket_mib),
    }
    if not arguments.no_accuracy:
        result["accuracy"] = accuracy(arguments.steps)
    record("reduction", result, as_json=arguments.json)


if __name__ == "__main__":
    main()
