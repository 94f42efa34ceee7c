"""Compiles the kernels of integer products without a GPU and prints what came out, a JSON line per case.

Run as a program, because a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mqbench.kernels.gemm_configs import FAMILIES, GEMV_BLOCK_K, GEMV_BLOCK_N, GemmConfig
from mqbench.kernels.triton_epilogue import NIBBLE_SCALE, REDUCE_BLOCK_M, REDUCE_BLOCK_N, reduce_kernel
from mqbench.kernels.triton_gemm import int4_gemm_kernel, int8_gemm_kernel
from mqbench.kernels.triton_gemv import WORDS_FIRST, int_gemv_kernel, weight_only_gemv_kernel
from mqbench.kernels.triton_unpack import BLOCK_K, BLOCK_N, HIGH_NIBBLES, dequantize_kernel, unpack_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WIDTHS = (3584, 18944)
EPILOGUE = {
    "row_scale": "*fp32", "w_scale": "*fp32", "row_index": "*u8", "bias": "*bf16", "x0": "*bf16", "w0": "*bf16",
    "scale_stride": "i32", "M": "i32", "N": "i32",
}  # fmt: skip
UNALIGNED = ("M", "scale_stride", "GROUP", "GROUPS")
"""Integers that need not be multiples of 16; all others are, at the shapes of real models."""


def build(
    name: str,
    capability: int,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    unaligned: Collection[str] = UNALIGNED,
    **options: int,
) -> dict[str, Any]:
    """Compiles one kernel to a cubin and reads its resources."""
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    aligned = [i for i, arg in enumerate(kernel.arg_names) if arg not in constants and arg not in unaligned]
    source = ASTSource(kernel, signature, dict(constants), {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "name": name,
        "capability": capability,
        "shared_bytes": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
        "matrix": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\S+", ptx))),
        "registers_first": bool(re.search(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*\{", ptx)),
        "dp4a": ptx.count("dp4a"),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "layout_conversions": compiled.asm["ttgir"].count("ttg.convert_layout"),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and stack and local memory in bytes: spilled registers would be there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return dict(zip(("registers", "stack_bytes", "local_bytes"), map(int, found.groups()), strict=True))


def gemm(capability: int, num_bits: int, config: GemmConfig, split_k: int, **options: int) -> dict[str, Any]:
    kernel = int8_gemm_kernel if num_bits == 8 else int4_gemm_kernel
    width = "K" if num_bits == 8 else "HALF"
    types = {"x": "*i8", "w": "*i8" if num_bits == 8 else "*u8", "out": "*bf16" if split_k == 1 else "*i32"}
    constants = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
        "SPLIT_K": split_k, "EVEN_K": True, "ACC_SCALE": 1.0 if num_bits == 8 else NIBBLE_SCALE,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **options}
    return build(f"gemm{num_bits}", capability, kernel, {**types, **EPILOGUE, width: "i32"}, constants, **options)


def gemv(capability: int, num_bits: int, num_rows: int, block_n: int, width: int) -> dict[str, Any]:
    constants = {
        "WORDS": width * num_bits // 32, "IS_INT4": num_bits == 4, "BLOCK_M": num_rows, "BLOCK_N": block_n,
        "BLOCK_K": GEMV_BLOCK_K, "SPLIT_K": 1, "ACC_SCALE": 1.0 if num_bits == 8 else NIBBLE_SCALE,
    }  # fmt: skip
    types = {"x": "*i32", "w": "*i32", "out": "*bf16", **EPILOGUE}
    return build(f"gemv{num_bits}", capability, int_gemv_kernel, types, constants, num_warps=4)


def weight_only(capability: int, num_rows: int, block_n: int, width: int) -> dict[str, Any]:
    types = {"x": "*fp32", "w": "*i32", "out": "*bf16", "scale": "*fp32", "zero_point": "*fp32", "bias": "*bf16"}
    constants = {
        "WORDS": width // 8, "GROUP": 128, "BLOCK_M": num_rows, "BLOCK_N": block_n, "BLOCK_K": GEMV_BLOCK_K,
        "WORDS_FIRST": WORDS_FIRST,
    }  # fmt: skip
    types |= {"M": "i32", "N": "i32"}
    return build("weight_only", capability, weight_only_gemv_kernel, types, constants, num_warps=4)


def others(capability: int) -> Iterator[dict[str, Any]]:
    """Second pass of a split product, and both ways of unpacking into memory."""
    constants = {"SPLIT_K": 4, "ACC_SCALE": NIBBLE_SCALE, "BLOCK_M": REDUCE_BLOCK_M, "BLOCK_N": REDUCE_BLOCK_N}
    yield build("reduce", capability, reduce_kernel, {"partial": "*i32", "out": "*bf16", **EPILOGUE}, constants)
    blocks = {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
    types = {"packed": "*i32", "out": "*i32", "N": "i32", "WIDTH": "i32"}
    yield build("unpack", capability, unpack_kernel, types, {"MASK": HIGH_NIBBLES[torch.int32], **blocks})
    types = {"packed": "*u8", "out": "*bf16", "scale": "*fp32", "zero_point": "*fp32"}
    types |= dict.fromkeys(("N", "HALF", "GROUP", "GROUPS"), "i32")
    yield build("dequantize", capability, dequantize_kernel, types, blocks)


def cases() -> Iterator[dict[str, Any]]:
    """Every tile of the tables, whole and split, and the kernels that have no table."""
    for capability, family in FAMILIES.items():
        for num_bits, table in ((8, family.int8), (4, family.int4)):
            for _, config in table:
                yield gemm(capability, num_bits, config, split_k=1)
            yield gemm(capability, num_bits, table[0][1], split_k=4)
        for num_rows in (1, 2, 4, 8) if capability == 90 else (1, 8):
            block_n = next(block_n for largest, block_n in GEMV_BLOCK_N if num_rows <= largest)
            yield gemv(capability, 8, num_rows, block_n, WIDTHS[0])
            yield gemv(capability, 4, num_rows, block_n, WIDTHS[1])
            yield weight_only(capability, num_rows, block_n, WIDTHS[1])
        yield from others(capability)
    starved = gemm(80, 8, FAMILIES[80].int8[-1][1], split_k=1, maxnreg=64)
    yield {**starved, "name": "starved"}


if __name__ == "__main__":
    for case in cases():
        print(json.dumps(case), flush=True)
