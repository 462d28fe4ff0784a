"""Gradients are exchanged in float32 or bf16: by DDP and FSDP2, with what memory, and what the exchange costs."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from rank_processes import on_ranks
from tiny_models import TINY

from benchmarks.reduction import Network, Part, buckets, parts_of, simulate
from raytrain.data.batch import SpeechBatch
from raytrain.model.canary import Canary
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.optim import make_optimizer
from raytrain.training.parallel import average_in_bf16, parallel_model
from raytrain.training.settings import TrainSettings
from raytrain.training.sharded import whole
from raytrain.training.step import train_step

MODEL = replace(TINY, dropout=0.0)
DEEP = replace(TINY, encoder_layers=6, encoder_width=128)


def averages(rank: int) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    gradients = torch.randn(1000)
    gradients[0] = 1e30
    wanted = gradients.clone()
    dist.all_reduce(wanted)
    return [average_in_bf16(gradients).wait(), gradients, wanted / dist.get_world_size()]


def test_a_mean_in_bf16_is_the_mean_of_rounded_numbers_in_place():
    results = on_ranks(averages, num_ranks=3)
    for returned, gradients, wanted in results:
        assert torch.equal(returned, gradients) and torch.equal(gradients, results[0][1])
        assert torch.equal(gradients.bfloat16().float(), gradients)
        # Each of three numbers and each of two sums is rounded to 8 bits.
        error = (gradients - wanted)[1:].norm() / wanted[1:].norm()
        assert 1e-4 < error < 2**-8
        assert float(gradients[0]) == pytest.approx(1e30, rel=2**-7)


def gradients_of(rank: int, shard: bool, reduce_in: str, accumulate: int) -> tuple[torch.Tensor, ...]:
    """All gradients and weights of a rank after a step, then the flag of a step that one rank's NaN spoils, and the
    weights after it."""
    settings = TrainSettings(num_workers=2, shard=shard, reduce_in=reduce_in, clip_norm=1e6)
    torch.manual_seed(0)
    model = Canary(MODEL).train()
    wrapped = parallel_model(model, settings, dist.get_world_size(), torch.device("cpu"))
    optimizer = make_optimizer(model, settings)
    torch.manual_seed(1 + rank)
    batches = [SpeechBatch.synthetic(2, 1200, 14, vocab=40, device="cpu") for _ in range(accumulate)]
    for _ in range(2):  # DDP orders its buckets anew after the first
        train_step(wrapped, batches, optimizer, settings, precision="fp32")
    gradients = torch.cat([whole(parameter.grad).flatten() for parameter in model.parameters()])
    weights = torch.cat([whole(parameter.detach()).flatten() for parameter in model.parameters()])
    if rank == 1:
        batches[-1].audio[0, 100] = float("nan")
    skipped = train_step(wrapped, batches, optimizer, settings, precision="fp32").skipped
    after = torch.cat([whole(parameter.detach()).flatten() for parameter in model.parameters()])
    return gradients, weights, skipped, after


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_agree_on_gradients_that_are_near_those_of_float32(accumulate):
    exact = on_ranks(gradients_of, False, "fp32", accumulate)[0][0]
    for shard, reduce_in in ((False, "bf16"), (True, "bf16"), (True, "fp32")):
        ranks = on_ranks(gradients_of, shard, reduce_in, accumulate)
        gradients, weights, _, _ = ranks[0]
        error = float((gradients - exact).norm() / exact.norm())
        assert 1e-4 < error < 2**-6 if reduce_in == "bf16" else error < 1e-3
        for rank_gradients, rank_weights, skipped, after in ranks:
            assert torch.equal(rank_gradients, gradients) and torch.equal(rank_weights, weights)
            assert float(skipped) == 1 and torch.equal(after, weights)


def peaks(**settings) -> tuple[int, int]:
    """Predicted resident and peak bytes of a step at whose end all gradients are there."""
    memory = StepTracer(DEEP, TrainSettings(num_workers=4, **settings), world_size=4).trace(1, 500, 12)
    return memory.resident_bytes, memory.peak_bytes


def test_the_rounded_copies_are_predicted():
    numbers = sum(parameter.numel() for parameter in Canary(DEEP).parameters())
    (resident, peak), (resident_bf16, peak_bf16) = peaks(), peaks(reduce_in="bf16")
    assert resident == resident_bf16 and 0 < peak_bf16 - peak <= 2 * numbers + 512
    sharded, sharded_bf16 = peaks(shard=True), peaks(shard=True, reduce_in="bf16")
    assert sharded[0] == sharded_bf16[0] and sharded_bf16[1] <= sharded[1]


def test_micro_batches_before_the_last_keep_gradients_besides_the_buckets():
    numbers = sum(parameter.numel() for parameter in Canary(DEEP).parameters())
    resident, peak = peaks(accumulate=2)
    assert peak - resident > 4 * numbers


def test_all_reduce_takes_what_its_slowest_link_takes():
    fast = Network(nvlink=100.0, link=10.0, nvlink_hop=0.0, link_hop=0.0)
    assert fast.all_reduce_seconds(800, 8) == pytest.approx(2 * 7 / 8 * 800 / 100)
    assert fast.all_reduce_seconds(800, 16) == fast.all_reduce_seconds(800, 8)  # NVLink takes longer than the link
    assert fast.all_reduce_seconds(8000, 512) == pytest.approx(2 * 63 / 64 * 1000 / 10)
    slow = Network(nvlink=1e30, link=1e30, nvlink_hop=0.0, link_hop=1.0)
    assert slow.all_reduce_seconds(1, 512) == 2 * 6 and slow.all_reduce_seconds(1, 8) < 1e-20  # a tree of 64 nodes


def test_buckets_are_filled_in_the_order_of_backward_and_reduced_one_after_another():
    parts = [Part(1600, 0.25), Part(1600, 0.75)]
    filled = list(buckets(parts, 4.0, 4 * 800))
    assert [numbers for numbers, _ in filled] == [800] * 4
    assert [ready for _, ready in filled] == pytest.approx([0.5, 1, 2.5, 4])
    network = Network(nvlink=1400.0, nvlink_hop=0.0)  # 4 s for each bucket
    figures = simulate(parts, 6.0 + 0.010, 8, network, bf16=False, bucket_mib=3200 / 2**20)
    assert figures["exchange_ms"] == pytest.approx(16000, rel=1e-3)
    assert figures["waiting_ms"] == pytest.approx(1000 * (0.5 + 16 - 4), rel=1e-3)
    assert figures["waiting_share"] == pytest.approx(12.5 / 18.5, rel=1e-2)


def test_the_parts_of_a_model_are_all_of_its_weights():
    parts = parts_of("canary-tiny")
    assert sum(part.share for part in parts) == pytest.approx(1) and len(parts) == 6 + 3 + 2
    assert sum(part.numbers for part in parts) > 5e6
