"""Counts of kernels and bytes are those counted by hand, and compiled blocks take less than eager ones."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_models import TINY
from torch import nn

from benchmarks._kernel_counts import Cost, KernelCounter, Origin, StepParts, list_launches, summed, touched_bytes
from benchmarks.step_cost import CountedStep, columns_of, measure, seconds_of, table

CONFIG = replace(TINY, encoder_layers=2, decoder_layers=3)


@pytest.fixture(scope="module")
def step() -> CountedStep:
    return CountedStep(CONFIG, 4, 3.0, 12)


def test_two_operators_take_what_is_counted_by_hand():
    x, weight = torch.empty(6, 4, device="meta"), torch.empty(4, 5, dtype=torch.bfloat16, device="meta")
    with KernelCounter() as counter:
        (x.t().t().bfloat16() @ weight).view(-1)
    cast, product = Origin("all", "forward", False, "_to_copy"), Origin("all", "forward", True, "mm")
    assert counter.costs == {
        cast: Cost(1, 6 * 4 * (4 + 2), 0, 1),
        product: Cost(1, (6 * 4 + 4 * 5 + 6 * 5) * 2, 2 * 6 * 4 * 5, 1),
    }


def test_operators_in_place_read_and_write_and_broadcast_inputs_are_read_once():
    x, row = torch.empty(8, 16, device="meta"), torch.empty(16, device="meta")
    with KernelCounter() as counter:
        x.add_(row.expand(8, 16))
        x.zero_()
        x[:, :4].masked_fill(x[:, :4] > 0, 0)
    bytes_by_name = {origin.operator: cost.num_bytes for origin, cost in counter.costs.items()}
    assert bytes_by_name["add_"] == (2 * 8 * 16 + 16) * 4 and bytes_by_name["zero_"] == 8 * 16 * 4
    # As CUDA does it: a clone, which a second kernel reads and writes, and the mask of a byte per element.
    assert bytes_by_name["masked_fill"] == 8 * 4 * (4 + 4 + 1 + 4 + 4)
    assert touched_bytes(row.expand(8, 16)) == 64 and touched_bytes(torch.empty(0, device="meta")) == 0


def test_lists_of_tensors_are_launched_as_multi_tensor_apply_does():
    assert list_launches([10] * 110, 1) == 1 and list_launches([10] * 111, 1) == 2
    assert list_launches([65536 * 320], 4) == 1 and list_launches([65536 * 320 + 1], 4) == 2
    assert list_launches([10] * 37, 4) == 2 and list_launches([], 4) == 0


def test_backward_belongs_to_the_part_that_ran_forward():
    with torch.device("meta"):
        first, second = nn.Linear(4, 8), nn.Linear(8, 16)
        x = torch.empty(3, 4)
    model = nn.Sequential(first, nn.ReLU(), second)
    parts = StepParts([(model, "rest"), (first, "first"), (second, "second")])
    with KernelCounter(parts) as counter:
        model(x).sum().backward()
    parts.remove()
    flops = {(origin.part, origin.phase): cost.flops for origin, cost in counter.costs.items() if origin.is_product}
    assert flops == {
        ("first", "forward"): 2 * 3 * 4 * 8,
        ("second", "forward"): 2 * 3 * 8 * 16,
        ("first", "backward"): 2 * 3 * 4 * 8,  # the input has no gradient
        ("second", "backward"): 2 * 2 * 3 * 8 * 16,
    }
    names = {(origin.part, origin.phase) for origin in counter.costs if origin.operator == "threshold_backward"}
    assert names == {("rest", "backward")}
    assert ("loss", "forward") in {(origin.part, origin.phase) for origin in counter.costs}


def test_a_step_is_counted_in_all_of_its_parts(step: CountedStep):
    def of(part: str, phase: str) -> Cost:
        return summed(step.costs, lambda origin: (origin.part, origin.phase) == (part, phase))

    for part in ("encoder block", "decoder block", "subsampling", "rest of the model"):
        forward, backward = of(part, "forward"), of(part, "backward")
        assert min(forward.kernels, backward.kernels, forward.num_bytes, backward.num_bytes) > 0
        assert backward.flops >= forward.flops > 0
    assert of("features", "forward").kernels > 0 and of("loss", "backward").kernels > 0
    assert of("features", "backward") == Cost()
    twice = CountedStep(replace(CONFIG, encoder_layers=4), 4, 3.0, 12)
    layers = summed(twice.costs, lambda origin: origin.part == "encoder block")
    assert layers == _times(summed(step.costs, lambda origin: origin.part == "encoder block"), 2)


def _times(cost: Cost, number: int) -> Cost:
    return Cost(*(value * number for value in vars(cost).values()))


def test_the_optimizer_reads_and_writes_weights_gradients_and_moments(step: CountedStep):
    from raytrain.model.canary import Canary

    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in Canary(CONFIG).parameters())
    update = {origin.operator: cost for origin, cost in step.costs.items() if origin.part == "update"}
    assert update["fused AdamW"].num_bytes == 7 * 4 * number
    assert update["linalg_vector_norm"].num_bytes >= 4 * number and update["linalg_vector_norm"].kernels < 10


def test_time_is_bound_by_arithmetic_or_memory():
    assert seconds_of(Cost(flops=784 * 10**12), Cost()) == pytest.approx(1)
    assert seconds_of(Cost(), Cost(num_bytes=35 * 10**11)) == pytest.approx(1)
    assert seconds_of(Cost(kernels=500_000), Cost()) == pytest.approx(1)


def test_tables_show_two_results_and_their_ratio():
    before, eager, compiled = {"kernels": 4000, "peak": 3.0}, {"kernels": 3000}, {"kernels": 1000}
    lines = list(table({"before": before, "eager": eager, "compiled": compiled}))
    assert lines[0].split() == ["before", "eager", "compiled", "ratio"]
    assert lines[1].split() == ["kernels", "4,000", "3,000", "1,000", "0.25"]
    assert lines[2].split() == ["peak", "3.0", "-", "-"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the shim of a CUDA device needs a C++ compiler")
def test_compiled_blocks_take_fewer_kernels_and_bytes_than_eager_ones():
    batch, tokens, width = 24, 50, CONFIG.decoder_width
    result = {"commit": "now"} | measure(CONFIG, batch, 9.0, tokens + 1, planned=["decoder block"])
    assert json.loads(json.dumps(result)) == result
    for phase in ("forward", "backward"):
        entry = result["a_block"][f"decoder block, {phase}"]
        eager, compiled = entry["eager"]["rest"], entry["compiled"]["rest"]
        assert 0 < compiled["kernels"] < eager["kernels"] and 0 < compiled["gib"] < eager["gib"]
    kernels = result["compiled_kernels"]["decoder block"]["forward"]
    products = [kernel["name"] for kernel in kernels if kernel["extern"]]
    assert products.count("addmm") == 10 and sum("attention" in name for name in products) == 2
    # The first norm is a kernel that reads states in bf16, weight and bias in float32, and writes bf16 and statistics.
    norm = next(kernel for kernel in kernels if "rsqrt" in kernel["name"])
    assert norm["bytes"] == batch * tokens * (2 * width * 2 + 2 * 4) + 2 * width * 4
    columns = columns_of(result)
    assert list(columns) == ["eager (now)", "compiled (now)"]
    assert (
        columns["compiled (now)"]["kernels"]
        == result["steps"]["compiled"]["kernels"]
        < columns["eager (now)"]["kernels"]
    )
