"""Optimizations of decoding change no text: rare synchronization, steps of fixed shape, packed linear layers."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import DECODED
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from training_parts import Syncs

from raytrain.decoding import graphs
from raytrain.decoding.beam import Ranking, beam_search
from raytrain.decoding.graphs import Programs, kept_programs, programs_for
from raytrain.decoding.greedy import greedy_search
from raytrain.decoding.precision import prepare_for_inference
from raytrain.decoding.search import decode
from raytrain.decoding.settings import DecodeSettings
from raytrain.decoding.steps import PromptGroup
from raytrain.errors import DataError
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.model.linear import PreparedLinear, affine

EOS, PROMPT = 3, [7, 4, 8]
SMALL = replace(DECODED, max_positions=160)
CPU = torch.device("cpu")
LONG = DecodeSettings(max_generation_delta=90)


def talker(config: ModelConfig = SMALL, bias: float = 1.0) -> Canary:
    """A model with random weights whose texts vary and end at different steps, some at the cap."""
    torch.manual_seed(7)
    model = Canary(config).eval()
    for name, weight in model.named_parameters():
        if "transf_decoder" in name and weight.ndim == 2:
            weight.data *= 3
    model.log_softmax.mlp["layer0"].bias.data[EOS] = bias
    return model


@pytest.fixture(scope="module")
def spoken():
    """A model and the encoder states of seven utterances that differ widely."""
    torch.manual_seed(2)
    states = 3 * torch.randn(7, 13, SMALL.decoder_width)
    return talker(), states, torch.tensor([13, 8, 3, 10, 1, 12, 6])


def greedy(model, group, settings, **options):
    return [[hypothesis] for hypothesis in greedy_search(model, group, EOS, settings.length_penalty, **options)]


def beam(model, group, settings, **options):
    ranking = Ranking(settings.n_best, settings.length_penalty)
    return beam_search(model, group, EOS, settings.beam_size, ranking, **options)


def run(spoken, search, settings, rows=slice(None), **options):
    """The results of `search` for these rows."""
    model, states, lengths = spoken[0], spoken[1][rows], spoken[2][rows].clamp_min(1)
    limits = (lengths + settings.max_generation_delta).clamp_max(model.config.max_positions) - len(PROMPT)
    prompt = torch.tensor([PROMPT] * len(lengths), device=states.device)
    with torch.inference_mode():
        return search(model, PromptGroup(states, lengths, prompt, limits), settings, **options)


def assert_same(actual, wanted):
    assert [[result.ids for result in row] for row in actual] == [[result.ids for result in row] for row in wanted]
    for hypothesis, expected in zip(sum(actual, []), sum(wanted, []), strict=True):
        assert hypothesis.ended == expected.ended and hypothesis.score == pytest.approx(expected.score, abs=1e-4)
        assert hypothesis.token_log_probs == pytest.approx(expected.token_log_probs, abs=1e-4)


@pytest.mark.parametrize("sync_interval", [3, 8, 64])
@pytest.mark.parametrize(
    ("search", "settings"),
    [
        (greedy, LONG),
        (beam, DecodeSettings(beam_size=3, n_best=3, max_generation_delta=40)),
        (beam, DecodeSettings(beam_size=4, n_best=2, max_generation_delta=60, length_penalty=1.0)),
    ],
)
def test_texts_do_not_depend_on_the_synchronization_interval(spoken, search, settings, sync_interval):
    wanted = run(spoken, search, settings, sync_interval=1)
    assert_same(run(spoken, search, settings, sync_interval=sync_interval), wanted)
    ends = {len(row[0].ids) for row in wanted if row[0].ended}
    assert len(ends) > 2 and not all(row[0].ended for row in wanted), "texts should end at different steps"


class HostReads(TorchFunctionMode):
    """Counts values read from tensors: on a GPU the host waits for each."""

    READS = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.cpu)

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.number += func in self.READS
        return func(*args, **(kwargs or {}))


def num_reads(spoken, search, settings, **options) -> int:
    with HostReads() as reads, Syncs() as syncs:
        run(spoken, search, settings, **options)
    assert syncs.found == ["is_nonzero"]  # whether frames are padded
    return reads.number


def test_nothing_is_read_between_two_synchronizations(spoken):
    model = spoken[0]
    bias = model.log_softmax.mlp["layer0"].bias
    bias.data[EOS] -= 100
    try:
        first_row = slice(0, 1)
        steps = len(run(spoken, greedy, LONG, first_row)[0][0].ids)
        assert steps > 80
        for programs in (None, Programs(model, spoken[1])):
            often, seldom, never = (
                num_reads(spoken, greedy, LONG, rows=first_row, sync_interval=step, programs=programs)
                for step in (1, 8, 1000)
            )
            assert often - never == steps - 1 and seldom - never == -(-steps // 8) - 1
            assert never < 6
        settings = DecodeSettings(beam_size=2, max_generation_delta=50)
        often, seldom = (num_reads(spoken, beam, settings, rows=first_row, sync_interval=step) for step in (1, 8))
        assert 0 < seldom < often / 4
    finally:
        bias.data[EOS] += 100


@pytest.mark.parametrize("sync_interval", [1, 8])
def test_steps_of_fixed_shape_give_the_same_texts(spoken, sync_interval):
    programs = Programs(spoken[0], spoken[1])
    for rows in (slice(None), slice(2, 4), slice(None), slice(4, 5)):  # programs are reused
        wanted = run(spoken, greedy, LONG, rows)
        assert_same(run(spoken, greedy, LONG, rows, sync_interval=sync_interval, programs=programs), wanted)
    sizes = set(programs._held)
    assert (8, 64, 64) in sizes and {positions for _, positions, _ in sizes} == {64, 128}, "texts outgrow 64 positions"
    assert len({rows for rows, _, _ in sizes}) > 2, "the batch shrinks"


def test_a_program_is_as_good_as_new_after_a_batch_of_nonsense(spoken):
    model, states, lengths = spoken
    programs = Programs(model, states)
    broken = (model, torch.full_like(states, float("nan")), lengths)
    run(broken, greedy, LONG, sync_interval=8, programs=programs)
    shorter = (model, states[:, :9], lengths.clamp_max(9))
    assert_same(run(shorter, greedy, LONG, programs=programs), run(shorter, greedy, LONG))


def test_programs_are_bounded_in_memory(spoken, monkeypatch):
    programs = Programs(spoken[0], spoken[1])
    monkeypatch.setattr(graphs, "MAX_BYTES", 3 * programs.num_bytes(8, 64, 64))
    assert programs.have_room(8, 13, 60) and not programs.have_room(8, 13, 200) and not programs.have_room(9, 13, 60)
    with torch.inference_mode():
        for rows in (8, 4, 2, 1, 7, 3):
            program = programs.get(rows, 60, 13)
            assert sum(programs.num_bytes(*key) for key in programs._held) <= graphs.MAX_BYTES
            assert programs.get(rows, 64, 64) is program and program.rows == graphs.size_class(rows)
    layer_cache = program.cache[0]
    assert programs.num_bytes(4, 64, 64) == len(program.cache) * sum(
        part.nbytes for part in (layer_cache.self_keys_values, layer_cache.cross_keys, layer_cache.cross_values)
    )
    wanted = run(spoken, greedy, LONG)
    assert_same(run(spoken, greedy, LONG, programs=programs), wanted)  # too large: without programs


def test_programs_of_changed_weights_are_dropped(spoken):
    model, states = talker(), spoken[1]
    first = kept_programs(model, states)
    assert kept_programs(model, states) is first
    with torch.no_grad():
        model.transf_decoder._decoder.layers[1].first_sub_layer.key_net.weight.mul_(1.5)
    second = kept_programs(model, states)
    assert second is not first
    model.load_state_dict(talker(bias=2.0).state_dict(), assign=True)
    assert kept_programs(model, states) is not second
    with torch.inference_mode():
        assert programs_for(model, states) is None, "a CPU needs none"


@pytest.mark.gpu
def test_graphs_give_the_texts_of_eager_steps(spoken, monkeypatch):
    model = talker().cuda()
    states, lengths = (part.clone().cuda() for part in spoken[1:])
    there = (model, states, lengths)
    wanted = run(there, greedy, LONG, sync_interval=1, programs=None)
    monkeypatch.setenv(graphs.VARIABLE, "0")
    with torch.inference_mode():
        assert programs_for(model, states) is None
    eager = run(there, greedy, LONG, sync_interval=1)
    monkeypatch.delenv(graphs.VARIABLE)
    assert_same(wanted, eager)
    for rows in (slice(None), slice(1, 4), slice(None)):
        assert_same(run(there, greedy, LONG, rows), eager[rows])
    assert len(kept_programs(model, states)._held) > 2


# Large enough for oneDNN's kernels, which are taken for weights of 2¹⁷ numbers on.
WIDE = ModelConfig(
    encoder_layers=2,
    encoder_width=256,
    encoder_heads=4,
    subsampling_channels=16,
    decoder_layers=2,
    decoder_width=384,
    decoder_heads=4,
    max_positions=64,
    vocab_size=512,
)


@pytest.mark.parametrize("shape", [(7, 5), (384, 512)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_linear_maps_are_linear_maps(shape, rows):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(rows, 2, shape[1])
    for offset in (bias, None):
        wanted = F.linear(x, weight, offset)
        assert torch.allclose(affine(weight, offset)(x), wanted, atol=1e-4)
        errors = [
            (PreparedLinear(weight, offset, name)(x) - wanted).std() / wanted.std() for name in ("fp32", "bf16", "int8")
        ]
        assert errors[0] < 1e-6 < 5e-4 < errors[1] < 5e-3 and 2e-3 < errors[2] < 2e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert affine(weight, bias)(x).dtype == torch.bfloat16


def test_a_prepared_model_gives_the_same_texts():
    model = talker(WIDE, bias=-9.0)
    torch.manual_seed(1)
    audio, lengths = torch.randn(3, 24000), torch.tensor([24000, 16000, 9000])
    ids, sizes = torch.randint(4, 500, (3, 20)), torch.full((3,), 3)

    def outputs(candidate):
        with torch.inference_mode():
            states, frames = candidate.encode(audio, lengths)
            hypotheses = decode(candidate, states, frames, torch.tensor([PROMPT] * 3), sizes, EOS)
            return states, candidate.decode_logits(ids, states, frames).log_softmax(-1), hypotheses

    states, log_probs, hypotheses = outputs(model)
    errors = {}
    for name in ("fp32", "bf16", "int8"):
        prepared = prepare_for_inference(copy.deepcopy(model), name, CPU)
        num_trainable, num_before = (sum(map(torch.numel, network.parameters())) for network in (prepared, model))
        assert num_trainable < 0.1 * num_before
        prepared_states, prepared_log_probs, prepared_results = outputs(prepared)
        errors[name] = float((prepared_states - states).std() / states.std())
        assert (prepared_log_probs - log_probs).abs().mean() < (1e-4 if name == "fp32" else 0.5)
        if name == "fp32":
            assert_same(prepared_results, hypotheses)
        # Steps with a cache go through the packed layers too, as the whole pass does.
        text = [*PROMPT, *prepared_results[0][0].ids]
        with torch.inference_mode():
            frames = prepared.encode(audio, lengths)[1]
            again = prepared.decode_logits(torch.tensor([text] * 3), prepared_states, frames).log_softmax(-1)[0]
        recomputed = [float(again[len(PROMPT) - 1 + i, token]) for i, token in enumerate(prepared_results[0][0].ids)]
        assert prepared_results[0][0].token_log_probs == pytest.approx(recomputed, abs=1e-3 if name == "fp32" else 0.5)
    assert errors["fp32"] < 1e-5 and 1e-4 < errors["bf16"] < 0.03 and 1e-4 < errors["int8"] < 0.1


def test_unknown_precisions_are_rejected():
    with pytest.raises(DataError, match="unknown precision; got fp8; allowed: fp32, bf16, int8"):
        prepare_for_inference(talker(), "fp8", CPU)
    with pytest.raises(DataError, match="int8 weights need a CPU; got device cuda; to do: ask for bf16"):
        prepare_for_inference(talker(), "int8", torch.device("cuda"))


def test_packed_layers_run_in_fixed_shapes_too(spoken):
    model = prepare_for_inference(talker(), "int8", CPU)
    there = (model, *spoken[1:])
    wanted = run(there, greedy, LONG, slice(1, 2))
    programs = Programs(model, spoken[1])
    assert_same(run(there, greedy, LONG, slice(1, 2), programs=programs), wanted)
    assert programs._held
