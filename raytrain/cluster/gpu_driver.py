"""The GPUs of this machine as its drivers count them; whether torch can use them is another matter."""

from __future__ import annotations

import os


def nvidia_gpus() -> tuple[int, str]:
    """NVIDIA GPUs and the driver's version, as nvidia-smi would name them."""
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
    """Whether AMD's driver for computing is loaded."""
    return os.path.exists("/dev/kfd")


def installed_gpus() -> int:
    """GPUs of this machine: NVIDIA's, or 1 where AMD's driver is loaded."""
    return nvidia_gpus()[0] or int(has_amd_driver())
