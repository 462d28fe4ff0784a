"""Activation checkpointing: gradients, statistics and memory of every mode, of eager and of compiled blocks."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny_models import TINY
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

from raytrain.data.batch import SpeechBatch
from raytrain.model import checkpointing
from raytrain.model.block import blocks_of
from raytrain.model.canary import Canary
from raytrain.model.checkpointing import compile_options, eager_part, run_block
from raytrain.model.decoder import DecoderBlock
from raytrain.model.encoder import ConformerBlock
from raytrain.training.memory.compiled_trace import CompiledBlocks, TracedBlock, fused_nodes
from raytrain.training.memory.live_bytes import LiveBytes
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.settings import CHECKPOINTING, TrainSettings
from raytrain.training.step import running_statistics

MODEL = replace(TINY, encoder_layers=2, encoder_width=64, encoder_heads=4, decoder_width=64, decoder_heads=4)
KINDS = {"encoder": ConformerBlock, "decoder": DecoderBlock}
MODES = ("none", "selective", "full")


def block_inputs(kind, batch, frames, tokens, device="cpu", dtype=torch.float32):
    def states(length):
        return torch.randn(batch, length, 64, device=device, dtype=dtype, requires_grad=True)

    if kind == "encoder":
        positions = torch.randn(2 * frames - 1, 64, device=device, dtype=dtype)
        return states(frames), positions, torch.full((batch,), frames, device=device)
    return states(tokens), states(frames), torch.ones(batch, 1, 1, frames, dtype=torch.bool, device=device)


def make_block(kind, device="cpu", dtype=torch.float32, dropout=0.1):
    torch.manual_seed(0)
    with torch.device(device):
        return KINDS[kind](replace(MODEL, dropout=dropout)).to(dtype).train()


@contextmanager
def saved_storages(block):
    """(bytes, shape, dtype) of what is saved for backward besides the block's weights."""
    weights = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *block.buffers())}
    storages, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = (storage.nbytes(), tuple(tensor.shape), str(tensor.dtype))
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


# --- eager


def gradients(mode, dropout):
    torch.manual_seed(0)
    model = Canary(replace(MODEL, dropout=dropout)).double().train()
    model.set_checkpointing(mode)
    batch = SpeechBatch.synthetic(2, 1500, 12, vocab=40, device="cpu")
    torch.manual_seed(1)
    inputs = (batch.audio.double(), batch.audio_lengths, batch.input_ids, batch.input_lengths)
    output = model(*inputs, dtype=torch.float64)
    output.logits.square().mean().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return named, running_statistics(model), output.logits


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_and_statistics_are_those_without_checkpointing(mode, dropout):
    wanted, chosen = gradients("none", dropout), gradients(mode, dropout)
    torch.testing.assert_close(chosen, wanted, rtol=1e-9, atol=1e-12)


def test_running_statistics_see_a_batch_once():
    block, inputs = make_block("encoder"), block_inputs("encoder", 2, 9, 0)
    run_block(block, "selective", *inputs).square().sum().backward()
    assert block.conv.batch_norm.num_batches_tracked == 1


def test_evaluation_keeps_nothing_and_computes_once():
    block, inputs = make_block("encoder").eval(), block_inputs("encoder", 2, 9, 0)
    torch.testing.assert_close(run_block(block, "full", *inputs), block(*inputs), rtol=0, atol=0)


@torch.library.custom_op("raytrain_test::noisy", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


noisy.register_autograd(lambda context, gradient: gradient)


class Noisy(torch.nn.Module):
    """Attention with dropout, whose result is kept, and dropout after it."""

    def forward(self, x):
        return torch.nn.functional.dropout(noisy(x.sin()), 0.5, True) ** 2


def test_dropout_after_a_kept_random_operator_has_the_mask_of_the_forward_pass(monkeypatch):
    monkeypatch.setattr(checkpointing, "_KEPT_CUSTOM", {"raytrain_test::noisy"})
    results = []
    for mode in ("none", "selective"):
        torch.manual_seed(0)
        x = torch.linspace(0, 1, 100).requires_grad_()
        run_block(Noisy(), mode, x).sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=0, atol=0)


# --- compiled


def without_code(graph, inputs, **_):
    """In place of inductor's code generation: the graph as it is."""

    def run(arguments):
        return torch.fx.Interpreter(graph).boxed_run(arguments)

    run._boxed_call = True
    return run


def compiled(block, mode):
    """A block compiled up to the code: dynamo, AOTAutograd, and inductor's division into forward and backward."""

    def backend(graph, inputs):
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, inner_compile=without_code, config_patches=compile_options(mode))

    return torch.compile(block, backend=backend, dynamic=True, fullgraph=True)


@pytest.mark.parametrize(
    ("kind", "mode", "dtype"),
    [
        ("encoder", "none", torch.bfloat16),
        ("encoder", "selective", torch.float32),
        ("decoder", "none", torch.float32),
        ("decoder", "selective", torch.bfloat16),
    ],
)
def test_a_traced_block_saves_what_the_compiled_block_saves(kind, mode, dtype):
    block = make_block(kind, dtype=dtype)
    run = compiled(block, mode)
    run(*block_inputs(kind, 13, 50, 23, dtype=dtype))
    with saved_storages(block) as wanted:
        run(*block_inputs(kind, 6, 40, 17, dtype=dtype))
    on_meta = make_block(kind, "meta", dtype)
    traced = TracedBlock(on_meta, block_inputs(kind, 13, 50, 23, "meta", dtype), mode)
    with saved_storages(on_meta) as predicted:
        traced(on_meta, *block_inputs(kind, 6, 40, 17, "meta", dtype))
    assert sorted(predicted.values()) == sorted(wanted.values())


@pytest.mark.parametrize("kind", KINDS)
def test_selective_division_changes_no_gradient(kind):
    results = []
    for mode in (None, "selective"):
        block = make_block(kind, dtype=torch.float64, dropout=0.0)
        run = block if mode is None else compiled(block, mode)
        torch.manual_seed(1)
        inputs = block_inputs(kind, 3, 11, 5, dtype=torch.float64)
        run(*inputs).square().sum().backward()
        results.append([tensor.grad for tensor in (inputs[0], *block.parameters())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_generated_code_of_a_selective_block_has_the_gradients_and_masks_of_its_forward_pass():
    """Dropout's masks are computed again from their seeds: the function is linear in the output layer's bias."""
    block = make_block("decoder", dropout=0.5)
    run = torch.compile(block.third_sub_layer, dynamic=True, fullgraph=True, options=compile_options("selective"))
    x = torch.randn(3, 7, 64)
    torch.manual_seed(2)
    y = run(x)
    (slope,) = torch.autograd.grad(y.sum(), block.third_sub_layer.dense_out.bias)
    torch.testing.assert_close(slope, (y != 0).sum((0, 1)) * 2.0)


# --- the tracer


SHAPES = ((8, 6000, 40), (1, 700, 9))


def traces(mode, is_compiled, shapes):
    settings = TrainSettings(num_workers=1, activation_checkpointing=mode)
    tracer = StepTracer(replace(MODEL, encoder_layers=6), settings, compiled=is_compiled)
    return [tracer.trace(*shape) for shape in shapes]


def test_each_mode_takes_less_memory_than_the_one_before():
    none, selective, full = (traces(mode, False, SHAPES[:1])[0].peak_bytes for mode in MODES)
    assert full < 0.9 * selective < 0.8 * none
    compiled_selective = traces("selective", True, SHAPES)
    assert compiled_selective[0].peak_bytes < 0.8 * none
    # Blocks are divided for one batch, whichever comes first.
    assert traces("selective", True, SHAPES[::-1]) == compiled_selective[::-1]


def test_blocks_run_as_before_after_a_trace_and_fused_results_are_not_counted():
    with torch.device("meta"):
        model = Canary(MODEL).train()
    block, meter = model.transf_decoder._decoder.layers[0], LiveBytes()
    kind = block_inputs("decoder", 5, 21, 9, "meta")
    blocks = CompiledBlocks([block], [(block, kind)], "none", meter)
    with blocks.active():
        assert "forward" in vars(block)
    assert "forward" not in vars(block) and block in blocks_of(model)
    graph = torch.fx.symbolic_trace(lambda x: torch.ops.aten.mm.default(torch.ops.aten.sin.default(x), x)).graph
    assert fused_nodes(graph) == set()  # a product reads it from memory
    graph = torch.fx.symbolic_trace(lambda x: torch.ops.aten.cos.default(torch.ops.aten.sin.default(x))).graph
    assert [node.name for node in fused_nodes(graph)] == ["sin_default"]


# --- settings


def test_compiled_selective_blocks_need_no_checkpoint_of_their_own():
    assert eager_part("selective", compiled=True) == "none" and eager_part("full", compiled=True) == "full"
    assert compile_options("none") == compile_options("full") != compile_options("selective")
    assert compile_options("selective") == compile_options("selective") != {}


def test_truth_values_are_read_and_recorded_as_in_earlier_versions():
    assert [CHECKPOINTING.chosen(value) for value in (True, False, "selective")] == ["full", "none", "selective"]
    assert [CHECKPOINTING.earlier(mode) for mode in MODES] == [False, "selective", True]
