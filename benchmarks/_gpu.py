"""What the parts of `benchmarks.gpu` share: device synchronization, the matmul rate, peak memory, the FLOPs of a
training step, and a profile of one call."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from raytrain.data.batch import SpeechBatch
from raytrain.model.config import ModelConfig
from raytrain.model.cost import training_flops

GIB = 2**30
Shape = tuple[int, float, int]  # utterances, seconds of audio, tokens
_NUM_PRODUCTS = 20


def nvidia_smi(*fields: str) -> list[str] | None:
    """Fields of the first GPU, named as in `nvidia-smi --query-gpu`; None if the program is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return values if len(values) == len(fields) else None


def significant(value: float, digits: int = 5) -> float:
    """`value` rounded to that many significant digits."""
    return float(f"{value:.{digits}g}")


def wait_for(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def release_memory(device: str) -> None:
    """Release unreferenced memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def seconds_per_call(work: Callable[[], object], device: str, seconds: float, least: int = 3) -> float:
    """Mean seconds of back-to-back calls without synchronization, as in training, after two warm-up calls.

    At least `least` calls, and about `seconds` of them.
    """
    work()
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    number = max(least, min(50, int(seconds / max(time.perf_counter() - start, 1e-6))))
    start = time.perf_counter()
    for _ in range(number):
        work()
    wait_for(device)
    return (time.perf_counter() - start) / number


@torch.no_grad()
def matrix_product_tflops(device: str, size: int) -> float:
    """TFLOP/s of bf16 products of two `size` × `size` matrices: the best of three rounds.

    A GPU's speed depends on its clock, power and temperature, so utilization is quoted relative to a rate measured in
    the same minute.
    """
    left, right, product = (torch.randn(size, size, device=device).bfloat16() for _ in range(3))
    torch.mm(left, right, out=product)
    best = float("inf")
    for _ in range(3):
        wait_for(device)
        start = time.perf_counter()
        for _ in range(_NUM_PRODUCTS):
            torch.mm(left, right, out=product)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * _NUM_PRODUCTS / best / 1e12


def matrix_size(tiny: bool) -> int:
    """Size of the matrices for the reference product."""
    return 256 if tiny else 8192


def step_flops(config: ModelConfig, shape: Shape) -> float:
    """Floating-point operations of a training step on a full batch of this shape (`raytrain.model.cost`)."""
    batch = SpeechBatch.synthetic(shape[0], int(shape[1] * 1000), shape[2], vocab=config.vocab_size, device="meta")
    frames = torch.full((shape[0],), batch.audio.shape[1] * 1000 / config.sample_rate / 80, dtype=torch.float64)
    return training_flops(config)(frames, torch.full((shape[0],), shape[2]))


def reset_peak(device: str) -> None:
    """Reset the peak of this process's GPU memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> dict[str, float]:
    """The peaks of allocated and of reserved memory; empty on a CPU."""
    if device != "cuda":
        return {}
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def profiled(work: Callable[[], object], device: str, number: int = 10) -> dict[str, Any]:
    """One call under the profiler: total milliseconds on the device, and the `number` costliest operators and kernels.

    Each row has name, calls, self time in milliseconds and its share. On a CPU there are only operators.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        wait_for(device)
    events = profiler.key_averages()
    if device != "cuda":
        return {"operators": _costliest(events, "self_cpu_time_total", number)}
    is_host = {id(event): event.device_type == torch.autograd.DeviceType.CPU for event in events}
    operators = [event for event in events if is_host[id(event)]]
    kernels = [event for event in events if not is_host[id(event)] and not getattr(event, "is_user_annotation", False)]
    key = "self_device_time_total"
    return {
        "device_ms": round(sum(getattr(event, key) for event in kernels) / 1000, 1),
        "kernels": _costliest(kernels, key, number),
        "operators": _costliest(operators, key, number),
    }


def _costliest(events: Iterable[Any], key: str, number: int) -> list[dict[str, Any]]:
    rows = sorted(events, key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in rows) or 1
    return [
        {
            "name": event.key[:120],
            "calls": event.count,
            "ms": round(getattr(event, key) / 1000, 3),
            "share": round(getattr(event, key) / total, 4),
        }
        for event in rows[:number]
    ]
