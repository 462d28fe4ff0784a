"""Batches reach a GPU while it computes the step before, and their memory is not reused too early."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from training_parts import SETTINGS, make_loop, micro_batch

from raytrain.data.batch import SpeechBatch
from raytrain.model.device import EMULATED_GPU, gpu_device
from raytrain.training.ahead import DeviceCopies


def test_on_an_emulated_gpu_the_loop_trains_on_what_it_asked_for_and_reads_nothing_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv(EMULATED_GPU, "A100:1000")
    asked, steps = [], []

    def batches():
        for number in range(100):
            asked.append(number)
            yield micro_batch(number)

    def before_step(step, loaded):
        steps.append((step, loaded.state.to_dict()["positions"][0], len(asked)))

    loop, _ = make_loop(tmp_path, batches(), before_step=before_step)
    loop.device = gpu_device().torch
    assert loop.run() == SETTINGS.max_steps == len(asked)
    assert steps == [(number + 1, number, number + 1) for number in range(SETTINGS.max_steps)]
    assert loop.checkpoints.newest().meta["schedule"]["positions"][0] == SETTINGS.max_steps - 1


def test_on_a_processor_batches_are_not_copied():
    batch = micro_batch(0).batch
    (same,) = DeviceCopies(torch.device("cpu")).copy([batch])
    assert all(here is there for here, there in zip(same.tensors(), batch.tensors(), strict=True))


class Stream:
    """A stream's queue: what it runs, and for what of another's queue it waits."""

    def __init__(self, *_):
        self.queue = []

    def record_event(self):
        return self, len(self.queue)

    def wait_event(self, event):
        self.queue.append(("waits", event))


def ends(stream: Stream, position: int) -> dict[Stream, int]:
    """For each stream the length of its queue that has run before an entry of `stream`."""
    reached = {stream: position}
    for kind, event in stream.queue[:position]:
        if kind == "waits":
            for waited, length in ends(*event).items():
                reached[waited] = max(reached.get(waited, 0), length)
    return reached


def test_a_copy_waits_for_the_last_step_but_one_and_a_step_for_its_copy(monkeypatch):
    """The order of a GPU's queues, without a GPU."""
    computing, copying = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    copies, alive = DeviceCopies(SimpleNamespace(type="cuda")), []

    class Batch:
        def __init__(self, number):
            self.number = number

        def to(self, device):
            alive.append([len(held) for held in copies._held])
            copying.queue.append(("copies", self.number))
            return self

    for number in range(6):
        copies.copy([Batch(number)])
        computing.queue.append(("computes", number))
    for number in range(6):
        before_copy = ends(copying, copying.queue.index(("copies", number))).get(computing, 0)
        ran = [entry for kind, entry in computing.queue[:before_copy] if kind == "computes"]
        assert ran == list(range(number - 1)), "the step before it may still run"
        before_step = ends(computing, computing.queue.index(("computes", number)))[copying]
        assert ("copies", number) in copying.queue[:before_step]
    assert alive == [[], *[[1]] * 5], "while a batch is copied, only that of the step before is held"


@pytest.mark.gpu
def test_late_steps_read_their_own_batches_and_copies_do_not_wait_for_them():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    copies, sums, copied, last = DeviceCopies(device), [], [], None
    hosts = [SpeechBatch.synthetic(8, 2000, 10, vocab=40, device="cpu").pin_memory() for _ in range(12)]
    torch.cuda.synchronize()
    for host in hosts:
        (batch,) = copies.copy([host])
        copied.append(copies._stream.record_event())
        torch.cuda._sleep(20_000_000)  # about 10 ms, so that the host is far ahead
        sums.append(batch.audio.double().sum())
        last = torch.cuda.current_stream().record_event()
    copied[1].synchronize()
    assert not last.query(), "the second batch was there long before the first steps ended"
    for here, host in zip(torch.stack(sums).tolist(), hosts, strict=True):
        assert here == pytest.approx(float(host.audio.double().sum()), rel=1e-9)
