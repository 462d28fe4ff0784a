"""What inductor would launch on an H100 for a compiled block, found without a GPU.

    python -m benchmarks._inductor_plan < request.json > plans.json

The request names a model's configuration and the inputs of a block of each kind. Blocks are traced on fake tensors of
the device `cuda`, divided into forward and backward and lowered by inductor as training does it, up to the scheduler's
fused nodes. There it stops: a fused node is a Triton kernel, whose code is not needed to count what it reads and
writes.

A torch without CUDA refuses two things, both in C++: devices of type `cuda` have no guard, and autograd no accelerator.
`_SHIM` gives them ones that do nothing. It has to be loaded before torch, hence a process of its own. Properties of the
device are an H100's. All of this uses private interfaces of torch 2.13.0.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SHIM = r"""
#include <optional>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
};
static c10::impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard);
namespace at {
struct CUDAHooks : CUDAHooksInterface {  // the registry looks for this name
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
namespace at::accelerator {  // replaces libtorch_cpu's, which has compiled in that there is none
__attribute__((visibility("default"))) std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
}
"""
_H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


def plan_blocks(request: dict[str, Any]) -> dict[str, Any]:
    """Plans of blocks by kind, made in a process of its own: `forward` and `backward`, lists of kernels.

    `request`: `model` (fields of a `ModelConfig`), `blocks` (kind → `module`, its name in the model, and `inputs` of
    shape, stride, dtype, grad), `options` of inductor. Raises `RuntimeError` with the end of the process's output.
    """
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._inductor_plan"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    if done.returncode:
        raise RuntimeError(f"inductor's plan can't be made: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _load_shim() -> None:
    """Compile the library once for each torch, and load it before torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None and "torch" not in sys.modules
    torch_folder = Path(spec.origin).parent
    version = (torch_folder / "version.py").read_text()
    name = hashlib.sha256((_SHIM + version + str(torch_folder)).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"cuda_shim_{os.getuid()}_{name}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        flags = ["-x", "c++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
        links = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, *flags, "-", "-x", "none", "-o", str(partial), *links]
        subprocess.run(command, input=_SHIM, text=True, check=True)
        partial.replace(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


class _Planned(Exception):
    """The blocks' code would run now, but there is none."""


def _pretend() -> None:
    """Let torch's Python side see an H100."""
    import torch

    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": _H100,
        "get_device_capability": (_H100.major, _H100.minor),
        "get_rng_state": state,
        "set_rng_state": None,
        "synchronize": None,
        "_lazy_init": None,
        "_is_in_bad_fork": False,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)


def _kernels(graph: Any) -> list[dict[str, Any]]:
    """A lowered graph's kernels in order, after fusion."""
    from torch._inductor import ir, scheduler

    kernels = []
    for node in graph.scheduler.nodes:
        if isinstance(node, scheduler.NopKernelSchedulerNode):
            continue
        is_extern = isinstance(node, scheduler.ExternKernelSchedulerNode)
        if is_extern and isinstance(node.node, (ir.MultiOutput, ir.DynamicScalar, ir.AssertScalar)):
            continue
        kernels.append(
            {
                "name": _operator(node.node) if is_extern else "+".join(sorted(_fused_operators(node))),
                "extern": is_extern,
                "bytes": int(node.get_read_write_buffers_sizes()),
            }
        )
    return kernels


def _operator(node: Any) -> str:
    overload = getattr(node, "op_overload", None)
    return overload.overloadpacket.__name__ if overload is not None else node.python_kernel_name.rsplit(".", 1)[-1]


def _fused_operators(node: Any) -> set[str]:
    origins = {origin for part in node.get_nodes() for origin in part.node.get_origins()}
    targets = [origin.target for origin in origins if origin.op == "call_function"]
    return {getattr(target, "overloadpacket", target).__name__ for target in targets}


def _attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False) -> Any:
    """Which kernel CUDA takes for 16-bit numbers; the choice is made in C++, for devices that are there."""
    import torch

    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    bias = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, is_causal)[0]


def _plan(block: Any, inputs: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch.nn import functional as F

    from raytrain.model.checkpointing import compile_options

    plans: list[list[dict[str, Any]]] = []

    def stop(self: Any) -> Any:
        self.init_wrapper_code()
        self._update_scheduler()
        plans.append(_kernels(self))
        return SimpleNamespace(call=run, key="", __file__=os.devnull)

    def run(_: object) -> None:
        raise _Planned

    def backend(graph: Any, examples: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is F.scaled_dot_product_attention:
                node.target = _attention
        graph.recompile()
        return compile_fx(graph, examples)

    GraphLowering.compile_to_module = stop
    try:
        with torch._inductor.config.patch(compile_options("none") | options):
            torch.compile(type(block).compute, backend=backend, dynamic=True, fullgraph=True)(block, *inputs)
    except _Planned:
        return dict(zip(("forward", "backward"), plans, strict=True))
    raise RuntimeError("the block ran without inductor")


def main() -> None:
    _load_shim()
    import torch

    _pretend()
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.fx_passes import fuse_attention
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from raytrain.model.config import ModelConfig
    from raytrain.training.memory.tracer import StepTracer
    from raytrain.training.settings import TrainSettings

    # Patterns of attention that is spelled out, made of numbers on the device; the blocks call attention by its name.
    fuse_attention._sfdp_init = lambda *_: None
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.joint_graph_constant_folding = False  # it computes on the device; kernels inline constants
    request = json.load(sys.stdin)
    # As the tracer prepares it for steps on CUDA.
    tracer = StepTracer(ModelConfig(**request["model"]), TrainSettings(), precision="bf16", compiled=False)
    plans = {}
    for kind, entry in request["blocks"].items():
        torch._dynamo.reset()
        block = tracer._model.get_submodule(entry["module"])
        with FakeTensorMode(shape_env=ShapeEnv()):
            block._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
            inputs = [
                torch.empty_strided(
                    x["shape"], x["stride"], dtype=getattr(torch, x["dtype"]), device="cuda", requires_grad=x["grad"]
                )
                for x in entry["inputs"]
            ]
            plans[kind] = _plan(block, inputs, request["options"])
    print(json.dumps(plans))


if __name__ == "__main__":
    main()
