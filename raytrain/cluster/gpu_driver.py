"""The GPUs of this machine as its drivers report them, whether or not torch can use them."""

from __future__ import annotations

import os


def nvidia_gpus() -> tuple[int, str]:
    """Number of NVIDIA GPUs and the driver version, as nvidia-smi reports them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0, ""
    try:
        return pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return 0, ""
    finally:
        pynvml.nvmlShutdown()


def has_amd_driver() -> bool:
    """Whether AMD's compute driver is loaded."""
    return os.path.exists("/dev/kfd")


def installed_gpus() -> int:
    """Number of GPUs in this machine: NVIDIA's count, or 1 if AMD's driver is loaded."""
    return nvidia_gpus()[0] or int(has_amd_driver())
