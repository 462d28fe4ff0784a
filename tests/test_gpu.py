"""What only a GPU shows: NCCL, the caching allocator, streams, bf16 and fused kernels as CUDA has them.

A body that makes sense on a processor runs there too, as the `cpu` variant of the same test. Nothing here needs more
than torch, so that these tests run where a GPU is and little else. CUDA graphs: tests/decoding/test_decoding_speed.py.
"""

import copy
import gc
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks._gpu_ranks import run_ranks
from benchmarks._models import random_model
from raytrain.data.batch import SpeechBatch
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.average import WeightAverage
from raytrain.training.memory.isolated_meter import IsolatedMeter
from raytrain.training.memory.meter import Probe
from raytrain.training.memory.prediction import predict_batch_size
from raytrain.training.memory.step_meter import StepMeter
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.optim import make_optimizer
from raytrain.training.parallel import join_alone, parallel_model
from raytrain.training.settings import TrainSettings
from raytrain.training.step import running_statistics, train_step

GIB = 2**30
SMALL = ModelConfig(
    encoder_layers=1,
    encoder_width=64,
    encoder_heads=2,
    subsampling_channels=16,
    decoder_layers=1,
    decoder_width=64,
    decoder_heads=2,
    max_positions=96,
    vocab_size=64,
)
# Large enough for cuBLAS's workspace, which is not predicted, to be a small part of the peak.
MEDIUM = ModelConfig(
    encoder_layers=6,
    encoder_width=512,
    encoder_heads=8,
    decoder_layers=2,
    decoder_width=512,
    decoder_heads=8,
    max_positions=256,
    vocab_size=4096,
)
SETTINGS = TrainSettings(num_workers=2, precision="bf16")
EDGES = (4000, 30)


@pytest.fixture
def card() -> Iterator[None]:
    """Skips where there is no GPU; gives back what the test took of it."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """`cpu`, and `cuda` where there is one."""
    if request.param == "cuda":
        request.getfixturevalue("card")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # toy sizes gain nothing from more
    yield request.param
    torch.set_num_threads(threads)


@pytest.fixture
def group_of_one(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of a group of this process alone: NCCL, or gloo where the test is on a processor."""
    if dist.is_initialized():
        dist.destroy_process_group()
    on_cuda = "device" not in request.fixturenames or request.getfixturevalue("device") == "cuda"
    join_alone("cuda" if on_cuda else "cpu")
    yield "nccl" if on_cuda else "gloo"
    dist.destroy_process_group()


def batch_on(device: str, size: int = 4) -> SpeechBatch:
    torch.manual_seed(3)
    return SpeechBatch.synthetic(size, *EDGES, vocab=SMALL.vocab_size, device=device)


def test_a_model_made_on_the_device_has_the_same_constants(device):
    there, here = random_model(SMALL, device), Canary(SMALL)
    assert {parameter.device.type for parameter in there.parameters()} == {device}
    for (name, buffer), (_, wanted) in zip(there.named_buffers(), here.named_buffers(), strict=True):
        assert buffer.device.type == device and torch.equal(buffer.cpu(), wanted), name


def test_a_group_of_one_has_the_gradients_of_no_group(device, group_of_one):
    bare = random_model(SMALL, device).train()
    target_device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    wrapped = parallel_model(copy.deepcopy(bare), SETTINGS, SETTINGS.most_workers, target_device)
    assert dist.get_backend() == group_of_one
    for model in (bare, wrapped):
        optimizer = make_optimizer(model, SETTINGS)
        train_step(model, [batch_on(device)] * 2, optimizer, SETTINGS, precision="fp32", seeds=[5, 6])
    for (name, wanted), parameter in zip(bare.named_parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, wanted.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.gpu
def test_two_ranks_have_the_same_weights_after_their_steps(card):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there is {torch.cuda.device_count()}")
    ranks = run_ranks("cuda", "canary-tiny", (2, 1.0, 12))
    assert [rank["ranks_agree"] for rank in ranks] == [True, True] and ranks[0]["backend"] == "nccl"


def test_a_bf16_step_is_finite_and_keeps_float32_weights(device):
    model = random_model(SMALL, device).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, SETTINGS)
    for _ in range(3):
        result = train_step(model, [batch_on(device)], optimizer, SETTINGS, precision="bf16")
        assert result.sums.isfinite().all() and result.grad_norm.isfinite() and float(result.skipped) == 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.equal(
        model.log_softmax.mlp["layer0"].weight, before["transf_decoder._embedding.token_embedding.weight"]
    )


def test_a_step_with_gradients_that_are_not_finite_changes_nothing(device):
    model = random_model(SMALL, device).train()
    optimizer = make_optimizer(model, SETTINGS)
    assert optimizer.defaults["fused"]
    good = batch_on(device)
    bad = SpeechBatch(good.audio * float("nan"), *good.tensors()[1:])
    train_step(model, [good], optimizer, SETTINGS, precision="bf16")

    def everything() -> list[torch.Tensor]:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *running_statistics(model), *moments)]

    before = everything()
    assert float(train_step(model, [bad], optimizer, SETTINGS, precision="bf16").skipped) == 1
    assert all(torch.equal(now, then) for now, then in zip(everything(), before, strict=True))
    assert float(train_step(model, [good], optimizer, SETTINGS, precision="bf16").skipped) == 0
    assert not all(torch.equal(now, then) for now, then in zip(everything(), before, strict=True))


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_device(card):
    """The batch comes from pinned memory, as the loader gives it."""
    model = random_model(SMALL, "cuda").train()
    optimizer, average = make_optimizer(model, SETTINGS), WeightAverage(model, 0.9)
    pinned = batch_on("cpu").pin_memory()

    def step(number: int) -> None:
        batches = [pinned.to("cuda"), pinned.to("cuda")]
        train_step(model, batches, optimizer, SETTINGS, precision="bf16", average=average, seeds=[number, number + 1])

    for number in range(3):  # kernels, plans and the optimizer's states are made when they are first needed
        step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(3)
        with pytest.raises(RuntimeError, match="synchroniz"):  # it does notice
            float(torch.ones(1, device="cuda").sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_batch_pinned_by_another_thread_arrives_whole(card):
    batch, pinned = batch_on("cpu"), []
    thread = threading.Thread(target=lambda: pinned.append(batch.pin_memory()))
    thread.start()
    thread.join()
    assert all(tensor.is_pinned() for tensor in pinned[0].tensors())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        moved = pinned[0].to("cuda")
    torch.cuda.current_stream().wait_stream(side)
    for there, here in zip(moved.tensors(), batch.tensors(), strict=True):
        assert torch.equal(there.cpu(), here)


@pytest.mark.gpu
def test_the_thread_that_pins_batches_is_on_the_workers_gpu(card):
    loader = pytest.importorskip("raytrain.data.loader", reason="it needs the audio libraries", exc_type=ImportError)
    seen, last = [], torch.cuda.device_count() - 1

    def work():  # runs in the thread
        seen.append(torch.cuda.current_device())
        yield from ()

    reader = SimpleNamespace(close=lambda: None)
    with torch.cuda.device(last), loader.BatchLoader(work(), reader, pin_memory=True) as batches:
        assert list(batches) == []
    assert seen == [last]


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_is_an_answer_and_the_next_probe_works(card, group_of_one):
    budget = 3 * GIB
    tracer = StepTracer(MEDIUM, SETTINGS, precision="bf16", world_size=2)
    half, double = (predict_batch_size(tracer, *EDGES, size, 4096).batch_size for size in (budget // 2, 2 * budget))
    meter = StepMeter(MEDIUM, SETTINGS, budget)
    for _ in range(2):
        failed = meter.measure(double, EDGES, 2)
        assert not failed.fits and "out of memory" in failed.why.lower()
        fitting = meter.measure(half, EDGES, 2)
        assert fitting.fits and 0 < fitting.peak_bytes < budget
        assert torch.cuda.max_memory_reserved() <= budget * 1.001, "the process takes its share and no more"


@pytest.mark.gpu
@pytest.mark.parametrize("edges", [(4000, 30), (30000, 200)])
def test_the_traced_peak_is_near_the_measured(edges, card, group_of_one):
    tracer = StepTracer(MEDIUM, SETTINGS, precision="bf16", world_size=2)
    prediction = predict_batch_size(tracer, *edges, 5 * GIB, 4096)
    probe = StepMeter(MEDIUM, SETTINGS, 7 * GIB).measure(prediction.batch_size, edges, 3)
    assert probe.fits
    assert prediction.peak_bytes == pytest.approx(probe.peak_bytes, rel=0.10)


class FaultyMeter:
    """Asks a tensor of the device for an element that it does not have, where the batch is above 1.

    On a GPU the kernel's assertion leaves the process without a usable context.
    """

    def __init__(self, device: str) -> None:
        self._values = torch.ones(2, device=device)

    def measure(self, batch_size: int, edges: tuple[int, int], num_steps: int, *, fresh: bool = True) -> Probe:
        index = torch.full((1,), batch_size, device=self._values.device)
        return Probe(batch_size, float(self._values[index].sum()) == 1)


def test_a_fault_of_the_device_is_an_answer(device):
    with IsolatedMeter(FaultyMeter, device) as meter:
        failed = meter.measure(1000, EDGES, 1)
        assert not failed.fits and ("CUDA error" in failed.why if device == "cuda" else "IndexError" in failed.why)
        assert meter.measure(1, EDGES, 1).fits


@pytest.mark.gpu
def test_an_isolated_meter_runs_real_steps_within_its_budget(card):
    with IsolatedMeter(StepMeter, SMALL, SETTINGS, GIB, "cuda") as meter:
        small, large = meter.measure(1, EDGES, 2), meter.measure(8, EDGES, 1)
        assert small.fits and large.fits and GIB > large.peak_bytes > small.peak_bytes
        assert not meter.measure(4096, (40000, 90), 1).fits
        assert meter.measure(1, EDGES, 1).fits
