"""Compiles the Hadamard and quantizing kernels without a GPU and prints what came out, a JSON line per case.

Run as a program, like ``triton_compile``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from triton_compile import build

from mqbench.kernels.gemm_configs import FAMILIES
from mqbench.kernels.hadamard_plan import plan
from mqbench.kernels.triton_elementwise import (
    PIECE_BLOCK,
    num_warps,
    rms_norm_kernel,
    row_block,
    static_kernel,
    token_kernel,
)
from mqbench.kernels.triton_hadamard import STAGE_COLUMNS, STAGE_K, STAGE_ROWS, row_options, stage_kernel
from mqbench.kernels.triton_hadamard_rows import rows_kernel

ROW_WIDTHS = {80: (1280, 5120, 14336), 89: (14336,), 90: (1280, 3584, 5120, 14336, 18944)}
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
QUANTIZED = {"scale": "*fp32", "row_index": "*u8", "row_scale": "*fp32", "x0": "*bf16"}


def compiled(
    name: str, capability: int, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], **options: int
) -> dict[str, Any]:
    """Arguments without a type are None."""
    absent = {arg: None for arg in kernel.arg_names if arg not in types and arg not in constants}
    return build(name, capability, kernel, types, {**constants, **absent}, **options)


def hadamard(capability: int, width: int, dtype: torch.dtype, quantized: str) -> dict[str, Any]:
    """One kernel of rows; ``quantized``: float, token or static."""
    budget = FAMILIES[capability].shared_memory_bytes
    how = plan(width, dtype.itemsize, budget)
    assert how.rows is not None
    out_dtype = torch.int8 if quantized != "float" else dtype if how.fused else torch.float32
    options = row_options(how, dtype, out_dtype, 0 if quantized == "float" else 128, budget)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    types = {"x": TYPES[dtype], "signs_a": "*i8", "signs_b": "*i8", "M": "i32", "K": "i32"}
    types["out"] = "*i8" if quantized != "float" else TYPES[out_dtype]
    arguments = {"float": (), "token": ("row_scale", "x0"), "static": ("scale", "row_index", "row_scale")}[quantized]
    types |= {argument: QUANTIZED[argument] for argument in arguments}
    case = compiled("hadamard", capability, rows_kernel, types, options, **launch)
    bound = how.rows.shared_bytes(dtype.itemsize, launch["num_stages"])
    return {
        **case,
        "width": width,
        "dtype": str(dtype),
        "quantized": quantized,
        "bound_bytes": bound,
        "fused": how.fused,
    }


def stage(capability: int, order: int, stride: int, dtype: torch.dtype) -> dict[str, Any]:
    size = triton.next_power_of_2(order)
    constants = {
        "GROUPS": 1, "ORDER": order, "STRIDE": stride, "TERMS": 2 if dtype == torch.float32 else 1,
        "BLOCK_ROWS": min(size, STAGE_ROWS), "BLOCK_VECTORS": STAGE_COLUMNS, "BLOCK_K": min(size, STAGE_K),
    }  # fmt: skip
    types = {"x": TYPES[dtype], "signs_h": "*i8", "out": "*bf16", "vectors": "i32", "K": "i32", "factor": "fp32"}
    return compiled("stage", capability, stage_kernel, types, constants, num_warps=4)


def elementwise(capability: int) -> Iterator[dict[str, Any]]:
    """Behind which each kind stands in Qwen2-VL-7B: its norms, its down_proj, the MLP of its vision tower."""
    for kind, width in (("input", 18944), ("silu_mul", 18944), ("quick_gelu", 5120)):
        types = {"x": "*bf16", "levels": "*i8", "K": "i32"} | ({"up": "*bf16"} if kind == "silu_mul" else {})
        constants = {"KIND": kind, "LARGEST": 128}
        static = {**types, "scale": "*fp32", "row_index": "*u8"}
        block = PIECE_BLOCK
        warps = num_warps(block)
        yield compiled("static", capability, static_kernel, static, {**constants, "BLOCK": block}, num_warps=warps)
        block = row_block(width)
        constants |= {"BLOCK": block, "WHOLE": True}
        token = {**types, "row_scale": "*fp32"}
        yield compiled("token", capability, token_kernel, token, constants, num_warps=num_warps(block))
    types = dict.fromkeys(("x", "residual", "weight", "total_out"), "*bf16")
    types |= {"levels": "*i8", "scale": "*fp32", "row_scale": "*fp32", "K": "i32", "eps": "fp32"}
    constants = {"LARGEST": 128, "BLOCK": row_block(3584)}
    warps = num_warps(row_block(3584))
    yield compiled("rms_norm", capability, rms_norm_kernel, types, constants, num_warps=warps)


def cases() -> Iterator[dict[str, Any]]:
    for capability in FAMILIES:
        for width in ROW_WIDTHS[capability]:
            yield hadamard(capability, width, torch.bfloat16, "token")
        yield hadamard(capability, 3584, torch.bfloat16, "static")
        yield stage(capability, 28, 320, torch.float32)
        yield stage(capability, 148, 128, torch.bfloat16)
        yield from elementwise(capability)
    yield hadamard(90, 18944, torch.bfloat16, "float")
    yield hadamard(90, 3584, torch.float32, "token")


if __name__ == "__main__":
    for case in cases():
        print(json.dumps(case), flush=True)
