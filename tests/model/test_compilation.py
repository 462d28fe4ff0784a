"""Compiled blocks, by the CPU's compiler: few compilations, equal results, and a plain pass where compiling fails."""

import random
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from tiny_models import TINY
from torch import Tensor

from raytrain.data.batch import SpeechBatch
from raytrain.model.block import Block
from raytrain.model.canary import Canary
from raytrain.model.compilation import CompilationWarning, compile_blocks, is_compiled
from raytrain.training.acceleration import accelerate, compiles
from raytrain.training.memory.step_meter import StepMeter
from raytrain.training.optim import make_optimizer
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the CPU's compiler needs g++")

# Widths that no batch's frames or tokens equal, so that shapes are told apart as those of real models are.
MODEL = replace(TINY, encoder_layers=2, encoder_width=96, decoder_width=96, mel_bins=16, dropout=0.0, vocab_size=60)
NO_COMPILER = {"cpp.cxx": ("/no/compiler",), "force_disable_caches": True}


def made(config=MODEL) -> Canary:
    torch.manual_seed(0)
    return Canary(config).train()


def outputs_of(model: Canary, batch: SpeechBatch) -> dict[str, Tensor]:
    """Logits, gradients and running statistics of a training pass."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(batch.audio, batch.audio_lengths, batch.input_ids, batch.input_lengths)
    output.logits.logsumexp(-1).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": output.logits.detach(), **gradients, **dict(model.named_buffers())}


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Code for one number at a time, which takes 0.6 of the time to compile."""
    from torch._inductor import config

    with config.patch({"cpp.simdlen": 1}):
        yield


@pytest.fixture(scope="module")
def compiled(quick_compiler):
    """A compiled model; its kinds of blocks are compiled for the whole module."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, before = made(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompilationWarning)
        assert compile_blocks(model, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    return model


@needs_compiler
@pytest.mark.timeout(600)
def test_sixty_buckets_take_at_most_four_compilations_a_kind_and_equal_the_plain_model(compiled):
    plain, draw = made(), random.Random(1)
    for _ in range(60):
        duration_ms, tokens = draw.randint(300, 4000), draw.randint(4, 30)
        batch = SpeechBatch.synthetic(draw.randint(1, 6), duration_ms, tokens, vocab=60, device="cpu")
        wanted, results = outputs_of(plain, batch), outputs_of(compiled, batch)
        scale = max(float(value.abs().max()) for name, value in wanted.items() if name.endswith(("weight", "bias")))
        logits = wanted.pop("logits")
        torch.testing.assert_close(results.pop("logits"), logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
        for name, value in results.items():
            tolerance = 1e-5 if name.endswith(("running_mean", "running_var")) else 1e-3 * scale
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=tolerance, msg=name)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 2 * 4  # a kind has at least one
    compilations = [len(entries(kind)) for kind in {type(block) for block in compiled.modules() if is_block(block)}]
    assert max(compilations) <= 4 and sum(compilations) == graphs


def is_block(module) -> bool:
    return isinstance(module, Block)


def entries(kind: type[Block]) -> list:
    return torch._dynamo.eval_frame._debug_get_cache_entry_list(kind.compute.__code__)


@needs_compiler
def test_evaluation_is_not_compiled(compiled):
    batch = SpeechBatch.synthetic(2, 1111, 12, vocab=60, device="cpu")
    plain = made()
    plain.load_state_dict(compiled.state_dict())
    with torch.inference_mode():
        states = [model.eval().encode(batch.audio, batch.audio_lengths)[0] for model in (compiled, plain)]
    compiled.train()
    assert torch.equal(*states)


@needs_compiler
@pytest.mark.timeout(300)
def test_a_compiled_model_trains_with_dropout(compiled):
    settings = TrainSettings(warmup_steps=1, learning_rate=1e-3, compile="always")
    model = made(replace(MODEL, dropout=0.1))
    accelerate(model, settings, "fp32")
    assert is_compiled(model)
    optimizer = make_optimizer(model, settings)
    batch = SpeechBatch.synthetic(4, 1500, 18, vocab=60, device="cpu")
    losses = [float(train_step(model, [batch], optimizer, settings, precision="fp32", seeds=[7]).sums[0])]
    same = made(replace(MODEL, dropout=0.1))
    accelerate(same, settings, "fp32")
    again = train_step(same, [batch], make_optimizer(same, settings), settings, precision="fp32", seeds=[7])
    assert float(again.sums[0]) == losses[0]  # the seed decides what is dropped
    other = train_step(made(replace(MODEL, dropout=0.1)), [batch], optimizer, settings, precision="fp32", seeds=[8])
    assert float(other.sums[0]) != losses[0]
    losses += [float(train_step(model, [batch], optimizer, settings, precision="fp32").sums[0]) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("compiled")  # whose code is found on disk
def test_probes_run_compiled_steps_where_training_does():
    meter = StepMeter(MODEL, TrainSettings(num_workers=1, compile="always"), None, "cpu")
    assert is_compiled(meter._bare) and meter.seconds["compilation"] > 0
    assert meter.measure(2, (1500, 12), 1).fits


def test_a_compiler_that_fails_is_a_warning_and_the_plain_pass():
    from torch._inductor import config

    torch._dynamo.reset()
    model = made(replace(MODEL, encoder_width=64, decoder_width=64))
    with (
        config.patch(NO_COMPILER),
        pytest.warns(CompilationWarning, match="can't be compiled and runs uncompiled, slower; because .*train.comp"),
    ):
        assert not compile_blocks(model, torch.float32)
    assert not is_compiled(model)


@needs_compiler
@pytest.mark.timeout(300)
def test_a_compiler_that_fails_for_a_later_shape_is_one_warning_a_kind(compiled):
    from torch._inductor import config

    torch._dynamo.reset()  # what was compiled is forgotten, as for a shape that is new
    batch = SpeechBatch.synthetic(3, 1500, 12, vocab=60, device="cpu")
    with config.patch(NO_COMPILER), pytest.warns(CompilationWarning) as caught:
        results = [outputs_of(compiled, batch) for _ in range(2)][0]
    assert sorted(str(warning.message).split()[0] for warning in caught if is_compilation(warning)) == [
        "ConformerBlock",
        "DecoderBlock",
    ]
    torch.testing.assert_close(results["logits"], outputs_of(made(), batch)["logits"], rtol=0, atol=1e-5)


def is_compilation(warning) -> bool:
    return issubclass(warning.category, CompilationWarning)


@pytest.mark.parametrize(
    ("setting", "device", "wanted"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("always", "cpu", True), ("never", "cuda", False)],
)
def test_steps_are_compiled_on_gpus_unless_the_settings_say_otherwise(setting, device, wanted):
    assert compiles(TrainSettings(compile=setting), device) == wanted
