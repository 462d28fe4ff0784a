"""The device of a worker: a CPU, a GPU, or the GPU branches on a CPU."""

import pickle

import pytest
import torch

from raytrain.errors import ClusterError
from raytrain.model.cost import peak_flops
from raytrain.model.device import CPU, EMULATED_GPU, Device, emulated_gpu, gpu_device, visible_gpus, worker_device

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")


def test_a_worker_without_a_gpu_computes_on_the_cpu():
    assert worker_device(False) is CPU and CPU.torch == torch.device("cpu") and not CPU.pins_memory


def test_an_emulated_gpu_takes_the_gpu_branches_on_the_cpu(monkeypatch):
    monkeypatch.setenv(EMULATED_GPU, "NVIDIA H100: 80GB:85899345920")
    device = worker_device(True)
    assert device == Device("cuda", "cpu", "NVIDIA H100: 80GB", 80 << 30) == pickle.loads(pickle.dumps(device))
    assert device.is_emulated and device.torch == torch.device("cpu") and not device.pins_memory
    assert visible_gpus() == [device] and worker_device(False) is CPU


@pytest.mark.parametrize("text", ["H100", ":5", "H100:", "H100:many", "H100:0"])
def test_a_malformed_setting_is_an_error(monkeypatch, text):
    monkeypatch.setenv(EMULATED_GPU, text)
    with pytest.raises(ClusterError, match=f"{EMULATED_GPU} can't be read.*NAME:BYTES"):
        emulated_gpu()


@without_cuda
def test_a_gpu_that_torch_can_not_use_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.delenv(EMULATED_GPU, raising=False)
    with pytest.raises(ClusterError, match=r"torch can't use.*because.*to do: install a torch build with CUDA"):
        gpu_device()


def test_a_slice_of_a_gpu_has_its_share_of_the_peak():
    whole = peak_flops("NVIDIA H100 80GB HBM3")
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 3g.40gb") == pytest.approx(whole * 3 / 7)
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") == pytest.approx(whole / 7)
    assert peak_flops("Some GPU MIG 1g.10gb") is None and peak_flops("") is None


@pytest.mark.gpu
def test_a_gpu_is_named_and_becomes_current():
    device = gpu_device()
    assert device.name == torch.cuda.get_device_name() and device.pins_memory and not device.is_emulated
    assert device.total_bytes == torch.cuda.get_device_properties(0).total_memory
