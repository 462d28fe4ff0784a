"""The loop of one rank without Ray: skipped steps, memory, patience, averages, validation scores, notes of faults."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from training_parts import MODEL, SETTINGS, Syncs, make_loop, micro_batch

from raytrain.data.assignment import Row
from raytrain.data.batch import SpeechBatch
from raytrain.decoding.settings import DecodeSettings
from raytrain.errors import StorageError, TrainingError
from raytrain.evaluation.validation_scores import Decoded, score_decoded
from raytrain.lengths.schedule import shares_of
from raytrain.model.canary import Canary
from raytrain.training.average import WeightAverage
from raytrain.training.checkpoint import CheckpointFolder, CheckpointWriter
from raytrain.training.faults import SAVING, VALIDATION, FaultNotes, Watchdog, kills_for_memory
from raytrain.training.limits import GaveUp
from raytrain.training.optim import learning_rate, make_optimizer
from raytrain.training.state import RankShares
from raytrain.training.step import train_step
from raytrain.training.validation import Validator
from raytrain.training.window import FlopsEstimate


def test_a_step_whose_gradients_are_not_finite_changes_nothing(tmp_path):
    kept = {}

    def state(loop):
        moments = loop.state.optimizer.state_dict()["state"].values()
        return [weight.clone() for weight in loop.state.model.state_dict().values()] + [
            value.clone() for moment in moments for value in moment.values()
        ]

    batches = [micro_batch(number, broken=number == 3) for number in range(6)]
    loop, logged = make_loop(tmp_path, batches, before_step=lambda step, loaded: kept.update({step: state(loop)}))
    assert loop.run() == 6
    counted = [name for name, _ in Canary(MODEL).named_buffers() if name.endswith("num_batches_tracked")]
    names = list(loop.state.model.state_dict())
    for index, (before, after) in enumerate(zip(kept[4], kept[5], strict=True)):
        if index >= len(names) or names[index] not in counted:
            assert torch.equal(before, after)
    assert any(not torch.equal(before, after) for before, after in zip(kept[5], kept[6], strict=True))
    assert [line["skipped_steps"] for line in logged] == [0, 1, 1]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in logged)
    note = json.loads((tmp_path / "bad_steps" / "step_00000004_rank_0.json").read_bytes())
    assert note["step"] == 4 and note["rows"][0]["audio_path"] == "/audio/3.wav"


def test_too_many_bad_steps_in_a_row_end_training_and_finite_ones_between_do_not(tmp_path):
    settings = replace(SETTINGS, max_steps=20, log_every_steps=1)
    every_third_good = (micro_batch(number, broken=number % 3 != 0) for number in range(100))
    assert make_loop(tmp_path / "a", every_third_good, settings)[0].run() == 20
    loop, _ = make_loop(tmp_path / "b", (micro_batch(number, broken=number > 4) for number in range(100)), settings)
    with pytest.raises(GaveUp, match="3 steps in a row were not finite, up to step 8"):
        loop.run()


class Greedy(torch.nn.Module):
    """A model that runs out of memory for more than two utterances."""

    def __init__(self):
        super().__init__()
        self.inner = Canary(MODEL)

    def forward(self, audio, *rest, **options):
        if len(audio) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")
        return self.inner(audio, *rest, **options)


def test_a_step_that_does_not_fit_is_noted_and_named(tmp_path):
    notes = FaultNotes(tmp_path / "faults", "profile")
    loop, _ = make_loop(
        tmp_path,
        [micro_batch(0)],
        model=Greedy(),
        on_out_of_memory=lambda bucket, size: notes.lower(bucket, size, "out of memory"),
    )
    with pytest.raises(TrainingError, match="step 1 does not fit.*3 utterances of bucket 1.*1 GiB"):
        loop.run()
    assert notes.lowered((8, 8, 8)) == (8, 2, 8)
    assert FaultNotes(tmp_path / "faults", "another profile").lowered((8, 8, 8)) == (8, 8, 8)


def test_errors_on_another_dev_set_do_not_compare(tmp_path):
    """A best checkpoint of a dev set that was wrong would stay the best forever, and patience would end training."""
    settings = replace(SETTINGS, max_steps=2, patience=2, keep_checkpoints=3)

    def go_on(validation: str, error: float) -> dict:
        folder = CheckpointFolder(tmp_path / "checkpoints")
        step = newest.step if (newest := folder.newest()) else 0
        validate = lambda model, device: {"wer": error, "error": error, "val_loss": 1.0}  # noqa: E731
        longer = replace(settings, max_steps=step + 6)
        loop, _ = make_loop(tmp_path, (micro_batch(number) for number in range(100)), longer, validate=validate)
        loop.checkpoint_meta, loop.progress.step = {"ids": {"validation": validation}}, step
        loop.run()
        return loop.checkpoints.best_note()

    assert go_on("wrong", 0.0)["error"] == 0.0
    assert go_on("right", 0.7) == {"error": 0.7, "kept": [{"error": 0.7, "step": 8}], "step": 8, "validation": "right"}
    assert go_on("right", 0.9)["step"] == 8
    assert go_on("right", 0.5)["step"] > 8


def test_training_ends_when_patience_does_and_keeps_the_best(tmp_path):
    errors = iter([0.9, 0.5, 0.4, 0.6, 0.7, 0.8, 0.9, 0.1])
    settings = replace(SETTINGS, max_steps=100, patience=3, keep_checkpoints=1, keep_best=2)
    validate = lambda model, device: {"wer": (error := next(errors)), "error": error, "val_loss": 1.0}  # noqa: E731
    loop, _ = make_loop(tmp_path, (micro_batch(number) for number in range(100)), settings, validate=validate)
    assert loop.run() == 12
    assert loop.checkpoints.best_note()["kept"] == [{"step": 6, "error": 0.4}, {"step": 4, "error": 0.5}]
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000006", "step_00000012"]


def test_averaged_weights_are_what_the_formula_says_and_what_validation_and_decoding_see(tmp_path):
    settings, weights = replace(SETTINGS, average_decay=0.5), []
    model = Canary(MODEL)
    average = WeightAverage(model, 0.5)
    name = "encoder.pre_encode.out.weight"
    seen = []

    def validate(model, device):
        seen.append(model.state_dict()[name].clone())
        return {"wer": 1.0, "error": 1.0, "val_loss": 1.0}

    loop, _ = make_loop(
        tmp_path,
        [micro_batch(number) for number in range(6)],
        settings,
        model,
        validate=validate,
        average=average,
        before_step=lambda step, loaded: weights.append(model.state_dict()[name].clone()),
    )
    loop.run()
    weights.append(model.state_dict()[name].clone())
    expected = weights[0]
    for update, weight in enumerate(weights[1:], 1):
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(seen[-1], expected)
    checkpoint = loop.checkpoints.newest()
    torch.testing.assert_close(checkpoint.load_weights()[name], expected)
    assert torch.equal(checkpoint.load("model")[name], weights[-1])
    # A model made of the checkpoint is the averaged one in every weight, also where one has two names (the tied head).
    loaded = Canary(MODEL)
    loaded.load_state_dict(checkpoint.load_weights())
    with average.swapped_in():
        wanted = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[key]), key
    restored = WeightAverage(model, 0.5)
    restored.load_state_dict(checkpoint.load("average"))
    assert torch.equal(restored.state_dict()[name], average.state_dict()[name])
    assert int(restored.state_dict()["updates"]) == 6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_reads_nothing_from_the_device(accumulate):
    model = Canary(MODEL).train()
    settings = replace(SETTINGS, mask_prompt=True)
    optimizer = make_optimizer(model, settings)
    average = WeightAverage(model, 0.9)
    batches = [micro_batch(0).batch] * accumulate
    options = {"precision": "fp32", "average": average, "seeds": range(accumulate)}
    train_step(model, batches, optimizer, settings, **options)
    with Syncs() as syncs:
        train_step(model, batches, optimizer, settings, **options)
    assert syncs.found == []
    with Syncs() as syncs:
        float(torch.ones(1).sum())
    assert syncs.found == ["_local_scalar_dense"]  # the counter works


def test_cosine_ends_at_the_least_rate():
    settings = replace(SETTINGS, schedule="cosine", warmup_steps=10, max_steps=110, min_learning_rate=1e-5)
    assert learning_rate(10, settings) == pytest.approx(1e-3)
    assert learning_rate(60, settings) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(110, settings) == learning_rate(500, settings) == pytest.approx(1e-5)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_every_share_of_a_step_has_one_worker(world_size):
    parts = [shares_of(rank, world_size, 8) for rank in range(world_size)]
    assert [share for part in parts for share in part] == list(range(8))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_checkpoints_are_written_in_the_background_and_errors_come_with_the_next(tmp_path):
    weights = {"w": torch.zeros(4)}
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=5)
    writer = CheckpointWriter(folder)
    with writer:
        writer.save(1, {"model": weights}, {}, None, wait=False)
        weights["w"] += 1  # training continues; the checkpoint was copied before
        writer.save(2, {"model": weights}, {}, 0.5, wait=True)
    assert [float(folder.at(step).load("model")["w"][0]) for step in (1, 2)] == [0, 1]
    assert folder.best_note()["step"] == 2
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError), CheckpointWriter(CheckpointFolder(tmp_path / "file" / "x")) as writer:
        writer.save(1, {"model": weights}, {}, None, wait=False)
        writer.wait()


def test_validation_scores_words_and_translations_apart():
    items = [
        Decoded("en", "a", False, "one two three", "one two three"),
        Decoded("en", "b", False, "one two three", "one too three"),
        Decoded("de", "b", False, "eins zwei", "eins zwei"),
        Decoded("fr", "c", True, "un deux trois quatre cinq", "un deux trois quatre cinq"),
    ]
    scores = score_decoded(items)
    assert scores["wer"] == pytest.approx(1 / 8)
    assert scores["wer_en"] == pytest.approx(1 / 6) and scores["wer_de"] == 0
    assert scores["wer_a"] == 0 and scores["wer_b"] == pytest.approx(1 / 5)
    assert scores["bleu"] == pytest.approx(100)
    assert scores["error"] == pytest.approx(3 / 4 * 1 / 8)
    assert "bleu_fr" not in scores  # the only one
    assert score_decoded(items[3:])["error"] == pytest.approx(0)


def test_a_kill_for_memory_lowers_the_bucket_it_happened_in(tmp_path):
    machine, kills = kills_for_memory()
    notes = FaultNotes(tmp_path, "profile", rank=3)

    def learn(kills: dict[str, int]) -> None:
        first = FaultNotes(tmp_path, "profile")
        first.learn_from_deaths(kills, first.take_marks())

    mark = notes.marking()
    mark.__enter__()(7, 2, 40)  # and then the process is gone
    learn({machine: kills})  # no process was killed for memory
    assert notes.lowered((50, 50, 50)) == (50, 50, 50)
    mark = notes.marking()
    mark.__enter__()(7, 2, 40)
    learn({machine: kills + 1})
    assert notes.lowered((50, 50, 50)) == (50, 50, 38)
    reason = "a worker ran out of host memory and was killed"
    assert notes.reasons() == [f"bucket 2 takes 38 utterances instead of 40: {reason}"]
    learn({machine: kills + 9})  # no marks, no lesson
    assert notes.lowered((50, 50, 50)) == (50, 50, 38)
    with pytest.raises(ValueError), notes.marking() as write:
        write(1, 0, 1)
        raise ValueError
    assert not list(tmp_path.glob("doing-*"))


def test_the_watchdog_ends_only_a_stalled_process(tmp_path):
    ended, notes = threading.Event(), FaultNotes(tmp_path, "profile", rank=1)
    with Watchdog(0.4, notes.note_stall, end=lambda code: ended.set()) as dog:
        for number in range(8):
            dog.beat(f"in step {number}")
            assert not ended.wait(0.1)
        assert ended.wait(5)
    (found,) = notes.stalls(0)
    assert found.startswith("worker 1: in step 7 for")
    assert notes.stalls(2e10) == []


def test_a_notice_saves_at_once(tmp_path):
    notices = iter([False, True, False])
    loop, _ = make_loop(tmp_path, [micro_batch(number) for number in range(6)], should_save=lambda: next(notices))
    loop.checkpoints.keep = 10
    loop.run()
    steps = [folder.name for folder in sorted((tmp_path / "checkpoints").glob("step_*"))]
    assert steps == ["step_00000004", "step_00000006"]


def test_metrics_say_how_fast_and_how_full(tmp_path):
    loop, logged = make_loop(
        tmp_path,
        [micro_batch(number) for number in range(12)],
        shares=RankShares(0, range(2), 2),
        flops=FlopsEstimate(lambda batch: 1e9, 1e12),
    )
    loop.run()
    line = SimpleNamespace(**logged[-1])
    assert line.batch_size == 6 and logged[-1]["batch_size_by_bucket/001"] == 3
    assert logged[-1]["audio_padding_by_bucket/001"] == line.audio_padding == 0
    assert 0 <= line.data_wait < 1 and line.mfu > 0
    assert "loader_busy" not in logged[-1]
    assert line.audio_hours == pytest.approx(6 * 6 * 1.2 / 3600)
    assert line.tokens_per_second > line.audio_seconds_per_second > 0


def test_metrics_say_what_the_loaders_threads_do(tmp_path):
    batches = [replace(micro_batch(number), read_seconds=1e-4, cpu_seconds=2.5e-5) for number in range(4)]
    loop, logged = make_loop(tmp_path, batches)
    loop.run()
    assert 0 < logged[-1]["loader_busy"] < 1 and logged[-1]["loader_cpu"] == pytest.approx(0.25)


def test_a_kill_for_memory_in_validation_or_saving_lowers_no_bucket(tmp_path):
    machine, kills = kills_for_memory()
    sizes, notes = (50, 50, 50), FaultNotes(tmp_path, "profile")

    def die(phase: int, size: int) -> None:
        marking = FaultNotes(tmp_path, "profile", rank=1).marking()
        write = marking.__enter__()
        write(7, 2, 40)  # the step before
        write(None, phase, size)
        notes.learn_from_deaths({machine: kills + 1}, notes.take_marks())

    die(SAVING, 0)
    assert notes.lowered(sizes) == sizes and notes.validation_size(32) == 32
    die(VALIDATION, 32)
    assert notes.lowered(sizes) == sizes and notes.validation_size(32) == 16
    die(VALIDATION, 16)
    assert notes.validation_size(32) == 8 and notes.validation_size(4) == 4 and notes.reasons() == []


def validator(fits: int, reported_sizes: list[int]) -> tuple[Validator, Canary]:
    """A validator of five utterances, on a device that takes `fits` of them at a time."""
    torch.manual_seed(0)
    model, batch = Canary(MODEL).eval(), SpeechBatch.synthetic(5, 1200, 14, vocab=40, device="cpu")
    batch.audio_lengths[1:] -= 4000
    rows = [Row(f"/audio/{number}.wav", 0, 1200, "a", "en", 5, (1, 2, 3)) for number in range(5)]

    def refuse(module, arguments) -> None:
        if len(arguments[0]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.preprocessor.register_forward_pre_hook(refuse)
    found = Validator(
        batches=lambda on_error: [(rows, batch)],
        is_translation=lambda row: False,
        decode=lambda ids: " ".join(map(str, ids)),
        eos_id=3,
        search=DecodeSettings(max_generation_delta=3),
        on_out_of_memory=reported_sizes.append,
    )
    return found, model


@pytest.mark.parametrize(("fits", "failed"), [(5, []), (3, [5]), (1, [5, 3, 2])])
def test_validation_that_does_not_fit_takes_smaller_batches(fits, failed):
    reported_sizes = []
    whole, model = validator(5, [])
    halved, same_model = validator(fits, reported_sizes)
    cpu = torch.device("cpu")
    wanted, metrics = whole(model, cpu), halved(same_model, cpu)
    assert reported_sizes == failed and metrics.keys() == wanted.keys()
    assert metrics["wer"] == wanted["wer"] and metrics["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-4)


def test_an_utterance_that_can_not_be_validated_is_an_error():
    found, model = validator(0, [])
    with pytest.raises(TrainingError, match="validation of a single utterance.*CUDA out of memory"):
        found(model, torch.device("cpu"))


def test_a_checkpoint_that_does_not_fit_is_copied_without_gradients(tmp_path):
    loop, _ = make_loop(tmp_path, [micro_batch(number) for number in range(6)])
    whole, had_gradients = loop.state.model.state_dict, []

    def state_dict(*arguments, **options):
        had_gradients.append(any(parameter.grad is not None for parameter in loop.state.model.parameters()))
        if had_gradients[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(*arguments, **options)

    loop.state.model.state_dict = state_dict
    assert loop.run() == 6
    assert had_gradients == [True, False] and loop.checkpoints.newest().step == 6
