"""The attention's kernels compile for GPUs that are not here, within their shared memory and almost their registers."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from raytrain.model import relative_attention_kernels as kernels  # noqa: E402
from raytrain.model.relative_attention_launch import tiling_for  # noqa: E402

KERNELS = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "position_gradient_kernel")
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}  # what the tiles for A100 take must fit an RTX 4090 too
FLOAT32 = {"lse", "delta", "d_positions"}
INTEGERS = {"lengths": "*i64", "noise": "*i32"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def source(name, width, dtype, block, precision):
    """A kernel and the types of its arguments, as a launch gives them: pointers and strides divisible by 16."""
    kernel = getattr(kernels, name)
    constants = {"K": width, "M": block, "DROPOUT": True, "PRECISION": precision}
    types, aligned = {}, {}
    for number, argument in enumerate(kernel.arg_names):
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in ("scale", "keep_scale"):
            types[argument] = "fp32"
        elif argument in ("pairs", "parts", "T", "H", "cut"):
            types[argument] = "i32"
        else:
            is_stride = argument.startswith("kv_")
            pointer = INTEGERS.get(argument, "*fp32" if argument in FLOAT32 else f"*{dtype}")
            types[argument] = "i32" if is_stride else pointer
            aligned[(number,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, constants, aligned)


def spilled_bytes(ptx, architecture, folder):
    """What a thread keeps in memory for want of registers."""
    (folder / "kernel.ptx").write_text(ptx)
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    card = f"sm_{architecture}a" if architecture == 90 else f"sm_{architecture}"
    command = [assembler, "-v", f"--gpu-name={card}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
    return int(re.search(r"(\d+) bytes spill stores", log)[1])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("architecture", "width", "dtype", "spilled"),
    [
        (90, 128, "bf16", 400),
        (90, 64, "bf16", 150),
        (80, 128, "bf16", 100),
        (80, 64, "bf16", 0),
        (80, 64, "fp32", 50),
    ],
)
def test_kernels_compile(name, architecture, width, dtype, spilled, tmp_path):
    tiling = tiling_for(width, DTYPES[dtype], architecture // 10, "ieee")
    compiled = triton.compile(
        source(name, width, dtype, tiling.block, "ieee"),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": tiling.warps, "num_stages": tiling.stages},
    )
    assert compiled.metadata.shared <= SHARED_BYTES[architecture]
    ptx = compiled.asm["ptx"]
    if dtype == "bf16":
        assert ("wgmma.mma_async" if architecture == 90 else "mma.sync") in ptx
    assert spilled_bytes(ptx, architecture, tmp_path) <= spilled
