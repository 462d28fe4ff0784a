"""Meters of real steps: with a budget on a CPU, after failures, sharded over processes; and models to probe."""

import sys
import threading
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from ray import cloudpickle
from tiny_models import TINY
from torch.nn.parallel import DistributedDataParallel

from benchmarks._gpu_memory import LAYERS, _inputs, left_over, measured_layer, traced_layer
from benchmarks.oomptimizer import PROCESSOR_MODEL, processor_cells
from raytrain.data.batch import SpeechBatch
from raytrain.errors import TrainingError
from raytrain.model.canary import Canary
from raytrain.training.memory.isolated_meter import IsolatedMeter
from raytrain.training.memory.meter import Probe, ProbeGroup, joint_probe
from raytrain.training.memory.step_meter import StepMeter, probe_model
from raytrain.training.memory.tracer import StepTracer
from raytrain.training.optim import make_optimizer
from raytrain.training.parallel import join_alone, parallel_model
from raytrain.training.settings import TrainSettings
from raytrain.training.step import train_step

cloudpickle.register_pickle_by_value(sys.modules[__name__])
SMALL = replace(TINY, encoder_layers=2, subsampling_channels=32)
MIB = 2**20


@pytest.fixture
def no_group():
    """No process group before and after."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- a CPU as a device with a limit


def test_a_budget_on_a_cpu_is_the_resident_size_of_the_process():
    budget, edges = 900 * MIB, (16_000, 40)
    tracer = StepTracer(SMALL, TrainSettings(), world_size=2, device_type="cpu")
    too_many = next(size for size in range(8, 1000, 8) if tracer.trace(size, *edges).peak_bytes > budget)
    with IsolatedMeter(StepMeter, SMALL, TrainSettings(), budget, "cpu") as meter:
        small, large = meter.measure(1, edges, 2), meter.measure(too_many, edges, 1)
        assert small.fits and small.peak_bytes < budget
        assert not large.fits and "of a budget of 0.88" in large.why
        assert meter.measure(1, edges, 1).fits  # the process survives
        # The duration of the start, for the log.
        assert meter.num_starts == 1 and set(meter.seconds) == {
            "process",
            "context",
            "model",
            "compilation",
            "first_step",
        }
        assert all(seconds >= 0 for seconds in meter.seconds.values()) and meter.seconds["process"] > 0.1


@pytest.mark.parametrize(("kind", "dtype"), [("cuda", torch.bfloat16), (None, torch.float32)])
def test_a_cpu_computes_in_the_precision_of_the_device_it_emulates(kind, dtype):
    meter = StepMeter(SMALL, TrainSettings(num_workers=1), None, "cpu", kind=kind)
    seen = set()
    meter._bare.transf_decoder._decoder.layers[0].third_sub_layer.dense_in.register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype)
    )
    assert meter.measure(2, (1000, 12), 1).fits and seen == {dtype}


def test_a_failed_step_leaves_no_old_buckets(no_group):
    """Also where a cycle holds the old DDP, as that of the imports in its constructor does."""
    meter = StepMeter(SMALL, TrainSettings(num_workers=2), None, "cpu")
    old = weakref.ref(meter._model)
    meter._model.holder = [meter._model]

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = next(meter._bare.parameters()).register_hook(fail)
    assert not meter.measure(2, (1000, 12), 1).fits
    hook.remove()
    assert old() is None and isinstance(meter._model, DistributedDataParallel)
    assert meter.measure(2, (1000, 12), 1).fits


# --- a model to probe


def test_a_probed_model_is_a_new_model_but_for_the_numbers_in_its_matrices():
    new, model = Canary(SMALL), probe_model(SMALL, "cpu")
    expected, state = new.state_dict(), model.state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert len(list(model.parameters())) == len(list(new.parameters()))  # the tied matrix is one
    for name, buffer in new.named_buffers():
        torch.testing.assert_close(state[name], buffer, msg=name)
    norms = [name for name, module in new.named_modules() if "norm" in name and hasattr(module, "eps")]
    for name in norms:
        assert (state[f"{name}.weight"] == 1).all() and (state[f"{name}.bias"] == 0).all()
    matrices = [value.detach() for name, value in model.named_parameters() if value.ndim > 1]
    assert all(0.005 < float(value.std()) < 0.04 for value in matrices if value.numel() > 100)


def test_a_probed_model_takes_a_step_as_a_trained_one_does():
    model, settings = probe_model(SMALL, "cpu").train(), TrainSettings(num_workers=1)
    batch = SpeechBatch.synthetic(2, 1500, 12, vocab=40, device="cpu")
    result = train_step(model, [batch], make_optimizer(model, settings), settings, precision="fp32")
    assert float(result.skipped) == 0 and float(result.grad_norm) > 0
    without = [name for name, value in model.named_parameters() if not value.grad.abs().sum() > 0]
    # A softmax does not see what it adds to all keys alike.
    assert all(name.endswith(("key_net.bias", "linear_k.bias")) for name in without)


def test_few_numbers_are_drawn_for_a_probed_model():
    before = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        probe_model(SMALL, "cpu")
        after = torch.rand(())
        torch.manual_seed(0)
        torch.randn(1 << 16)
        assert after == torch.rand(())
    finally:
        torch.random.set_rng_state(before)


# --- several ranks


def test_probes_wrap_the_model_as_training_does(no_group):
    join_alone("cpu")
    wrapped = parallel_model(Canary(SMALL), TrainSettings(num_workers=2), 2, torch.device("cpu"))
    assert isinstance(wrapped, DistributedDataParallel)
    assert wrapped.gradient_as_bucket_view and not wrapped.broadcast_buffers
    model = Canary(SMALL)
    assert parallel_model(model, TrainSettings(num_workers=1, shard=True), 1, torch.device("cpu")) is model


def test_a_sharded_model_is_not_probed_by_one_process(no_group):
    with pytest.raises(TrainingError, match="needs a process group of several ranks"):
        StepMeter(SMALL, TrainSettings(num_workers=2, shard=True), None, "cpu")


def test_ranks_fit_together_or_not_at_all():
    fitting = [Probe(4, True, 10, 1.0), Probe(4, True, 12, 0.5)]
    assert joint_probe(fitting) == Probe(4, True, 12, 1.0)
    failed = Probe(4, False, why="out of memory")
    assert joint_probe([fitting[0], failed]) == failed
    assert joint_probe([Probe(4, True)]) == Probe(4, True)


class Breakable(StepMeter):
    """Runs out of memory in backward at a batch of 7."""

    def measure(self, batch_size, edges, num_steps, *, fresh=True):
        block = self._bare.encoder.layers[0]
        fails = batch_size == 7

        def fail(gradient):
            raise torch.OutOfMemoryError("CUDA out of memory")

        hook = block.register_forward_hook(lambda module, inputs, x: x.register_hook(fail) and None) if fails else None
        probe = super().measure(batch_size, edges, num_steps, fresh=fresh)
        if hook is not None:
            hook.remove()
        return probe


def _called(data: bytes):
    return cloudpickle.loads(data)()


def breakable(rank: int, folder: str) -> StepMeter:
    settings = TrainSettings(num_workers=2, shard=True)
    group = ProbeGroup(rank, 2, f"file://{folder}/group", timeout_s=60)
    return Breakable(SMALL, settings, None, "cpu", group=group)


@pytest.mark.timeout(240)
def test_sharded_meters_probe_together_and_are_recreated_after_a_failure(tmp_path):
    starts = [cloudpickle.dumps(partial(breakable, rank, str(tmp_path))) for rank in range(2)]
    meters = [IsolatedMeter(_called, start) for start in starts]
    probes: dict[tuple[int, int], Probe] = {}

    def run(rank: int) -> None:
        with meters[rank] as meter:
            for size in (2, 7, 3):
                probes[rank, size] = meter.measure(size, (1000, 12), 2)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        assert probes[rank, 2].fits, probes[rank, 2].why
        assert not probes[rank, 7].fits and probes[rank, 7].why == "CUDA out of memory"
        assert not probes[rank, 3].fits and "recreate the meters of all ranks" in probes[rank, 3].why


@pytest.mark.timeout(240)
def test_a_traced_rank_of_a_sharded_model_takes_what_its_process_takes():
    settings = TrainSettings(num_workers=2, shard=True, precision="fp32")
    (row,) = processor_cells(PROCESSOR_MODEL, settings, [(8, (14_000, 80))])
    assert abs(row["error"]) < 0.02, row


# --- GPU only


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layers_whose_memory_is_measured_run_and_have_gradients(layer):
    run, inputs = _inputs(layer, 1, "cpu")
    output = run(*inputs)
    output.backward(torch.ones_like(output))
    assert all(value.grad is not None for value in inputs if value.requires_grad)
    traced = traced_layer(layer, 1, "cuda")
    assert 0 < traced["kept"] <= traced["forward_peak"] <= traced["backward_peak"]
    assert measured_layer(layer, 1, "cpu") is None


def test_a_failed_probe_leaves_nothing(no_group):
    left = left_over("cpu", SMALL)
    assert left["failed"] and left["ddp_alive_beside_the_new"] == 0 and left["buckets_mib"] > 0


@pytest.mark.gpu
def test_a_gpu_takes_the_traced_memory(no_group):
    for layer in LAYERS:
        traced, measured = traced_layer(layer, 64, "cuda"), measured_layer(layer, 64, "cuda")
        assert measured["kept"] == pytest.approx(traced["kept"], rel=0.02), layer.name
    left = left_over("cuda", SMALL)
    assert left["failed"] and left["ddp_alive_beside_the_new"] == 0 and abs(left["left_over_mib"]) < 1
