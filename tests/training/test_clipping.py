"""Clipping by the optimizer's divisor is clipping by a pass over the gradients; what a skipped step leaves alone."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from rank_processes import on_ranks
from tiny_models import TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain.data.batch import SpeechBatch
from raytrain.model.canary import Canary
from raytrain.training.average import WeightAverage
from raytrain.training.optim import make_optimizer
from raytrain.training.parallel import parallel_model
from raytrain.training.settings import TrainSettings
from raytrain.training.sharded import whole
from raytrain.training.step import StepStatistics, clip_and_update, clip_divisor, train_step

SETTINGS = TrainSettings(learning_rate=1e-3, weight_decay=0.1, shard=True, num_workers=2)


def layers(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5)).to(dtype)


def set_gradients(model: nn.Module, norm: float, step: int) -> None:
    """Gradients of this norm, the same for every model of the same form."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    total = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    for parameter in model.parameters():
        parameter.grad *= norm / total


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [whole(tensor.detach()).clone() for tensor in (*model.parameters(), *moments)]


NORMS = (3.0, 0.01, 6.0, 1.4, 12.0)
CLIP_NORM = 1.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_update_is_that_of_gradients_clipped_before(dtype, tolerance):
    model = layers(dtype)
    reference = copy.deepcopy(model)
    optimizer, plain = (make_optimizer(chosen, SETTINGS) for chosen in (model, reference))
    for step, norm in enumerate(NORMS):
        set_gradients(model, norm, step)
        set_gradients(reference, norm, step)
        measured, skipped = clip_and_update(model, optimizer, CLIP_NORM)
        if dtype == torch.float32:
            wanted = nn.utils.clip_grad_norm_(reference.parameters(), CLIP_NORM)
        else:  # the divisor has 24 bits, as fused kernels take it
            wanted = nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters()])
            for parameter in reference.parameters():
                parameter.grad /= clip_divisor(wanted, CLIP_NORM).to(dtype)
        plain.step()
        assert torch.equal(measured, wanted) and measured.dtype == dtype and float(skipped) == 0
        # Whatever reads gradients after the step finds them clipped, as before.
        for here, there in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(here.grad, there.grad, rtol=tolerance, atol=0)
    for here, there in zip(everything(model, optimizer), everything(reference, plain), strict=True):
        torch.testing.assert_close(here, there, rtol=tolerance, atol=tolerance)
    assert not torch.equal(everything(model, optimizer)[0], layers(dtype)[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_within_the_limit_are_used_bit_by_bit(dtype):
    model = layers(dtype)
    reference = copy.deepcopy(model)
    optimizer, plain = (make_optimizer(chosen, SETTINGS) for chosen in (model, reference))
    for step, norm in enumerate((0.3, 1e-20, CLIP_NORM - 1e-5)):
        set_gradients(model, norm, step)
        set_gradients(reference, norm, step)
        clip_and_update(model, optimizer, CLIP_NORM)
        plain.step()
    for here, there in zip(everything(model, optimizer), everything(reference, plain), strict=True):
        assert torch.equal(here, there)


def test_the_divisor_is_the_inverse_of_the_factor_of_torch():
    norms = torch.tensor([0.0, 1e-30, 1.0, 1.5 - 1e-6, 1.6, 1e20, float("inf"), float("nan")], dtype=torch.float64)
    divisors = clip_divisor(norms, CLIP_NORM)
    assert divisors.dtype == torch.float32 and divisors[:4].tolist() == [1.0] * 4
    torch.testing.assert_close(divisors[4:6].double(), (norms[4:6] + 1e-6) / CLIP_NORM, rtol=1e-7, atol=0)
    assert not divisors[6:].isfinite().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_leaves_weights_moments_and_step_counts(value):
    """1e30 is finite, and its square is not."""
    model = layers(torch.float32)
    optimizer = make_optimizer(model, SETTINGS)
    set_gradients(model, 3.0, 0)
    clip_and_update(model, optimizer, CLIP_NORM)
    before = everything(model, optimizer)
    set_gradients(model, 3.0, 1)
    model[2].weight.grad[1, 2] = value
    _, skipped = clip_and_update(model, optimizer, CLIP_NORM)
    assert float(skipped) == 1
    assert all(torch.equal(now, then) for now, then in zip(everything(model, optimizer), before, strict=True))
    set_gradients(model, 3.0, 2)
    _, skipped = clip_and_update(model, optimizer, CLIP_NORM)
    assert float(skipped) == 0 and {int(state["step"]) for state in optimizer.state.values()} == {2}


def reference_model() -> Canary:
    torch.manual_seed(0)
    return Canary(replace(TINY, dropout=0.0)).train()


def sharded_updates(rank: int) -> list[list[torch.Tensor]]:
    model = reference_model()
    parallel_model(model, SETTINGS, 2, torch.device("cpu"))
    return updates(model)


def updates(model: nn.Module) -> list[list[torch.Tensor]]:
    """Norm, flag, weights and moments after a clipped step, and after one whose gradients are not finite."""
    optimizer, average, states = make_optimizer(model, SETTINGS), WeightAverage(model, 0.5), []
    torch.manual_seed(1)
    good = SpeechBatch.synthetic(3, 1200, 14, vocab=40, device="cpu")
    for batch in (good, replace(good, audio=good.audio * float("nan"))):
        settings = replace(SETTINGS, clip_norm=0.05)
        result = train_step(model, [batch, batch], optimizer, settings, precision="fp32", average=average)
        states.append([result.grad_norm, result.skipped, *everything(model, optimizer)])
    return states


def test_ranks_of_a_sharded_model_clip_by_the_norm_of_the_whole():
    """Moments are compared: the first step moves weights by the signs of gradients, also of those that only rounding
    makes differ from 0."""
    (norm, _, *alone), _ = updates(reference_model())
    num_weights = len(list(reference_model().parameters()))
    assert float(norm) > 20 * 0.05
    for clipped, skipped in on_ranks(sharded_updates):
        torch.testing.assert_close(clipped[0], norm, rtol=1e-5, atol=0)
        moments, wanted = clipped[2 + num_weights :], alone[num_weights:]
        for kind in range(3):  # step counts, means, and means of squares
            here, there = (torch.cat([value.flatten() for value in values[kind::3]]) for values in (moments, wanted))
            assert there.norm() > 0 and (here - there).norm() <= 1e-5 * there.norm()
        assert [float(clipped[1]), float(skipped[1])] == [0, 1]
        assert all(torch.equal(here, there) for here, there in zip(clipped[2:], skipped[2:], strict=True))


class Copies(TorchDispatchMode):
    """Counts calls of operators, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_operators_around_the_backward_pass_do_not_grow_with_the_layers():
    counted = []
    for encoder_layers in (1, 5):
        statistics = StepStatistics(Canary(replace(TINY, encoder_layers=encoder_layers)))
        with Copies() as copies:
            statistics.end_micro_batch()
            statistics.average()
            statistics.restore_where(torch.zeros(()))
        # Views are no kernels.
        counted.append({name: calls for name, calls in copies.calls.items() if name not in ("view", "split")})
    assert counted[0] == counted[1] and counted[0]["_foreach_copy_"] == 3
