"""Relative-position attention: plain PyTorch is the formula, the kernels are plain PyTorch, the operator composes.

The kernels run here in Triton's interpreter (`interpreted_attention.py`) and compile for GPUs that are not here.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted_attention import CASES, NAMES
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raytrain.model import relative_attention as attention_module
from raytrain.model.relative_attention import kernel_fault, relative_attention
from raytrain.model.relative_attention_twin import kept, shift, unshift
from raytrain.training.memory.live_bytes import LiveBytes

FORWARD = torch.ops.raytrain.relative_attention.default
BACKWARD = torch.ops.raytrain.relative_attention_backward.default
SCRIPT = Path(__file__).with_name("interpreted_attention.py")


def inputs(time, heads=2, width=4, lengths=(None, 1), dtype=torch.float64, device="cpu", seed=0):
    """q_u, q_v, k, v, positions with gradients, and lengths (None for `time`)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(len(lengths), time, heads, width)] * 4 + [(2 * time - 1, heads, width)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    return tensors, torch.tensor([length or time for length in lengths], device=device)


def formula(q_u, q_v, k, v, positions, lengths):
    """Scores of all pairs, written out as in Dai et al. 2019."""
    time = q_u.shape[1]
    by_position = torch.matmul(q_v.transpose(1, 2), positions.permute(1, 2, 0))
    scores = shift(by_position) / math.sqrt(q_u.shape[-1])
    padding = torch.arange(time) >= lengths[:, None, None, None]
    mask = scores.masked_fill(padding, float("-inf"))
    heads_first = (x.transpose(1, 2) for x in (q_u, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def noise_of(tensors, seed=3):
    batch, time, heads, _ = tensors[0].shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-(2**31), 2**31, (2, batch, heads, time), generator=generator, dtype=torch.int32)
    return noise.to(tensors[0].device)


@pytest.mark.parametrize(("time", "lengths"), [(1, (1,)), (2, (1, 2)), (13, (13, 1, 8))])
def test_plain_pytorch_equals_the_formula(time, lengths):
    tensors, lengths_B = inputs(time, lengths=lengths)
    out, expected = relative_attention(*tensors, lengths_B, 0.0), formula(*tensors, lengths_B)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), tensors)
    for name, x, y in zip(NAMES[2:], gradients, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11, msg=name)


def test_gradients_with_dropout_are_those_of_the_output():
    tensors, lengths = inputs(5, lengths=(None, 2))
    noise = noise_of(tensors)
    assert torch.autograd.gradcheck(lambda *x: FORWARD(*x, lengths, noise, 0.4)[0], tensors, atol=1e-7)


def test_unshift_is_the_transpose_of_shift():
    x, y = torch.randn(1, 2, 6, 11, dtype=torch.float64), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close((shift(x) * y).sum(), (x * unshift(y)).sum())


@pytest.fixture(scope="module")
def interpreted():
    """Differences from plain PyTorch, by case and tensor."""
    root = str(SCRIPT.parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_plain_pytorch_in_the_interpreter(interpreted, name):
    tolerance = 2e-6 if CASES[name][2] == torch.float32 else 2e-3
    assert set(interpreted[name]) == set(NAMES)
    assert {part: value for part, value in interpreted[name].items() if not value <= tolerance} == {}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_pytorchs_rules(dtype, dropout):
    tensors, lengths = inputs(6, dtype=dtype)
    noise = noise_of(tensors) if dropout else None
    torch.library.opcheck(FORWARD, (*tensors, lengths, noise, dropout))
    with torch.no_grad():
        out, lse = FORWARD(*tensors, lengths, noise, dropout)
    detached = [x.detach() for x in tensors]
    torch.library.opcheck(BACKWARD, (torch.ones_like(out), *detached, lengths, noise, out, lse, dropout))


def test_a_compiled_function_is_the_same_at_several_sizes():
    def loss(q, bias, k, v, positions, lengths):
        return relative_attention(q + bias, q - bias, k, v, positions, lengths, 0.0).square().sum()

    compiled = torch.compile(loss, dynamic=True, fullgraph=True)
    compilations = torch._dynamo.utils.counters["stats"]
    before = compilations["unique_graphs"]
    for time, lengths in ((6, (None, 2)), (9, (None, 4, 1))):
        # Sizes that are equal in the first call are assumed to be so later.
        tensors, lengths_B = inputs(time, heads=5, width=8, lengths=lengths, dtype=torch.float32)
        wanted = torch.autograd.grad(loss(*tensors[:1], 0.1 * tensors[1], *tensors[2:], lengths_B), tensors)
        got = torch.autograd.grad(compiled(*tensors[:1], 0.1 * tensors[1], *tensors[2:], lengths_B), tensors)
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert compilations["unique_graphs"] == before + 1


def test_a_compiled_function_draws_random_words_and_drops():
    tensors, lengths = inputs(40, lengths=(None,), dtype=torch.float32)
    tensors[3] = torch.ones_like(tensors[3])
    compiled = torch.compile(relative_attention, dynamic=True, fullgraph=True)
    first, second = (compiled(*tensors, lengths, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    assert abs(float(first.detach().mean()) - 1) < 0.1


def test_memory_grows_with_time_and_not_with_its_square():
    def peak(time):
        tensors, lengths = inputs(time, heads=8, width=128, lengths=(None,) * 4, dtype=torch.bfloat16, device="meta")
        meter = LiveBytes()
        with meter:
            out = relative_attention(*tensors, lengths, 0.1)
            assert out.shape == tensors[0].shape and out.dtype == torch.bfloat16
            out.backward(torch.empty_like(out))
        assert all(x.grad.shape == x.shape for x in tensors)
        return meter.peak

    assert peak(16000) - peak(8000) < 1.05 * 2 * (peak(8000) - peak(4000))
    assert peak(1000) < 100 * 2**20 < 4 * 8 * 1000**2 * 2 * 2


def test_a_recomputed_block_drops_the_same_weights():
    tensors, lengths = inputs(20, dtype=torch.float64)
    gradients = []
    for run in (relative_attention, lambda *x: checkpoint(relative_attention, *x, use_reentrant=False)):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(run(*tensors, lengths, 0.5).square().sum(), tensors))
    for x, y in zip(*gradients, strict=True):
        assert torch.equal(x, y)


def test_dropout_keeps_its_share_of_each_row_and_column_independently():
    time, heads = 512, 4
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-(2**31), 2**31, (2, 2, heads, time), generator=generator, dtype=torch.int32)
    cut = round(0.1 * 2**24)
    keep = kept(noise, time, cut).double()
    assert abs(float(keep.mean()) - 0.9) < 5 * 0.3 / math.sqrt(keep.numel())
    for sums in (keep.sum(-1), keep.sum(-2)):  # binomial: variance n·p·(1-p)
        assert abs(float(sums.var()) / (time * 0.09) - 1) < 0.15
    centred = (keep - 0.9) / 0.3
    limit = 5 / math.sqrt(centred[0].numel())
    for shift_by in (1, 2, 7, 64):  # neighbours in a row, rows, heads and utterances
        for axis in (-1, -2):
            assert abs(float((centred * centred.roll(shift_by, axis)).mean())) < limit
    assert abs(float((centred[:, 0] * centred[:, 1]).mean())) < limit
    assert abs(float((centred[0] * centred[1]).mean())) < limit


def test_rows_with_the_same_first_word_drop_different_weights():
    words = torch.tensor([[7, 7, 8], [-1958041121, 90125311, 1203987640]], dtype=torch.int32).view(2, 1, 1, 3)
    first, second, shifted = kept(words, 4096, 2**23)[0, 0].double()
    assert abs(float((first == second).double().mean()) - 0.5) < 0.05
    assert abs(float((first[1:] == shifted[:-1]).double().mean()) - 0.5) < 0.05


def test_a_device_without_kernels_says_why():
    assert "channels, not 24" in kernel_fault(torch.device("cuda", 0), 24, torch.bfloat16, True)
    assert "not torch.float64" in kernel_fault(torch.device("cuda", 0), 64, torch.float64, True)
    if not torch.cuda.is_available():
        assert "failed on cuda:0" in kernel_fault(torch.device("cuda", 0), 64, torch.bfloat16, True)


def test_wrong_shapes_and_mixed_dtypes_are_refused():
    tensors, lengths = inputs(6)
    with pytest.raises(ValueError, match="expected"):
        relative_attention(*tensors[:4], tensors[4][:6], lengths, 0.0)
    with pytest.raises(TypeError, match="same dtype"):
        relative_attention(*tensors[:4], tensors[4].float(), lengths, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_kernels_equal_plain_pytorch_on_a_gpu(width, dtype, dropout):
    assert kernel_fault(torch.device("cuda", 0), width, dtype, dropout > 0) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "time", "heads", "width"), [(3, 64, 8, 128), (1, 1000, 4, 64), (40, 31, 2, 128)])
def test_the_operator_on_a_gpu_equals_plain_pytorch(batch, time, heads, width, monkeypatch):
    lengths = tuple(max(1, time - 7 * index) for index in range(batch))
    tensors, lengths_B = inputs(time, heads, width, lengths, torch.bfloat16, "cuda")
    noise, weight = noise_of(tensors), torch.randn(batch, time, heads, width, device="cuda")
    results = []
    for uses_kernels in (True, False):
        monkeypatch.setattr(attention_module, "_uses_kernels", lambda q, drops, answer=uses_kernels: answer)
        precise = tensors if uses_kernels else [x.detach().float().requires_grad_() for x in tensors]
        out = FORWARD(*precise, lengths_B, noise, 0.1)[0]
        results.append([out, *torch.autograd.grad((out * weight).sum(), precise)])
    for x, y in zip(*results, strict=True):
        assert float((x.float() - y).norm() / y.norm()) < 2e-2
