"""Float32 weights that compute in the input's type, and convolutions written as sums of shifted products."""

import pytest
import torch
from tiny_models import TINY
from torch import nn
from torch.nn import functional as F

from raytrain.data.batch import SpeechBatch
from raytrain.model.canary import Canary
from raytrain.model.convolution import depthwise, depthwise_by_shifts
from raytrain.model.mixed import MixedLayerNorm, MixedLinear


def output_types(dtype: torch.dtype | None) -> tuple[dict[str, torch.dtype], Canary]:
    """The type of each module's output in a forward pass, and the model after backward."""
    torch.manual_seed(0)
    model, types = Canary(TINY).train(), {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, output, name=name: types.update({name: getattr(output, "dtype", None)})
        )
    batch = SpeechBatch.synthetic(2, 700, 12, vocab=TINY.vocab_size, device="cpu")
    output = model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths, dtype=dtype)
    output.logits.float().logsumexp(-1).sum().backward()
    return {name: kind for name, kind in types.items() if kind is not None}, model


def test_what_a_model_computes_in_bf16_stays_bf16_and_its_weights_and_gradients_float32():
    types, model = output_types(torch.bfloat16)
    computed = {name: kind for name, kind in types.items() if name.startswith(("encoder.", "transf_decoder._decoder"))}
    assert len(computed) > 35 and set(computed.values()) == {torch.bfloat16}
    assert types["log_softmax"] == torch.bfloat16 and types["spec_augment"] == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_without_a_type_a_model_computes_in_float32():
    assert set(output_types(None)[0].values()) == {torch.float32}


def test_a_norm_computes_in_float32_and_returns_what_it_gets():
    torch.manual_seed(0)
    norm, x = MixedLayerNorm(64), 30 + torch.randn(5, 64)
    nn.init.normal_(norm.weight)
    wanted = F.layer_norm(x.bfloat16().float(), (64,), norm.weight, norm.bias)
    assert torch.equal(norm(x.bfloat16()), wanted.bfloat16())
    assert torch.equal(norm(x), F.layer_norm(x, (64,), norm.weight, norm.bias))
    assert norm(x.double()).dtype == torch.float64  # a weight in float32 does not narrow it


def test_a_linear_layer_rounds_weights_once():
    layer, x = MixedLinear(48, 32), torch.randn(3, 48).bfloat16()
    wanted = F.linear(x, layer.weight.bfloat16(), layer.bias.bfloat16())
    assert torch.equal(layer(x), wanted)
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kernel", [1, 5, 9])
@pytest.mark.parametrize("frames", [1, 3, 20])
def test_depthwise_convolutions_are_sums_of_shifted_products(kernel, frames):
    torch.manual_seed(0)
    layer = nn.Conv1d(4, 4, kernel, padding=kernel // 2, groups=4).double()
    compare(layer, torch.randn(3, frames, 4).double(), depthwise, depthwise_by_shifts)


def compare(layer, x, convolution, by_shifts):
    outputs, gradients = [], []
    for function in (convolution, by_shifts):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        outputs.append(function(layer, inputs))
        outputs[-1].backward(torch.sin(torch.arange(outputs[-1].numel())).double().view_as(outputs[-1]))
        gradients.append((inputs.grad, *(parameter.grad for parameter in layer.parameters())))
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    for of_library, of_shifts in zip(*gradients, strict=True):
        assert torch.allclose(of_library, of_shifts, rtol=0, atol=1e-11)
