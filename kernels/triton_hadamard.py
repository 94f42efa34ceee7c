"""Fast Hadamard transforms of rows on a GPU, alone and before quantization.

``hadamard_plan`` says how a width runs: in one program per row where it fits, quantization included; otherwise through
memory, in passes over float32 sums, with quantization as a pass of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mqbench.kernels.gemm_configs import FAMILIES, family_of
from mqbench.kernels.hadamard import padded_size
from mqbench.kernels.hadamard_plan import MIN_TILE, SHARED_BYTES, Plan, Rows, Stage, plan, signs
from mqbench.kernels.triton_elementwise import quantize_static, quantize_token
from mqbench.kernels.triton_epilogue import to_dtype
from mqbench.kernels.triton_hadamard_rows import product, rows_kernel

WARPS_PER_SM = 32
"""Warps of programs that stay on the device and walk through the rows, per streaming multiprocessor."""

INTERPRETER_PROGRAMS = 2

STAGE_ROWS, STAGE_COLUMNS, STAGE_K = 128, 64, 64
"""Tile of a pass over memory: outputs along the axis, vectors, inputs along the axis at a time."""


@triton.jit
def stage_kernel(
    x, signs_h, out, vectors, K, factor,
    GROUPS: tl.constexpr, ORDER: tl.constexpr, STRIDE: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_VECTORS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """H_ORDER over the middle axis of rows seen as (GROUPS, ORDER, STRIDE), times ``factor``; x has K columns a row."""
    in_type: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.float32 else x.dtype.element_ty
    vector = tl.program_id(0).to(tl.int64) * BLOCK_VECTORS + tl.arange(0, BLOCK_VECTORS)
    row = vector // (GROUPS * STRIDE)
    within = vector % (GROUPS * STRIDE)
    base = (within // STRIDE) * (ORDER * STRIDE) + within % STRIDE
    outputs = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_VECTORS), tl.float32)
    for first in range(0, ORDER, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        columns = inputs[:, None] * STRIDE + base[None, :]
        mask = (inputs < ORDER)[:, None] & (vector < vectors)[None, :] & (columns < K)
        values = tl.load(x + row[None, :] * K + columns, mask=mask, other=0.0).to(tl.float32)
        inside = (outputs < ORDER)[:, None] & (inputs < ORDER)[None, :]
        h = tl.load(signs_h + outputs[:, None] * ORDER + inputs[None, :], mask=inside, other=0)
        acc = product(h, values, acc, True, TERMS, in_type)
    to = row[None, :] * (GROUPS * ORDER * STRIDE) + outputs[:, None] * STRIDE + base[None, :]
    mask = (outputs < ORDER)[:, None] & (vector < vectors)[None, :]
    tl.store(out + to, to_dtype(acc * factor, out.dtype.element_ty), mask=mask)


def hadamard(x: Tensor) -> Tensor:
    """See ``api.hadamard``; arguments are checked already, here and below."""
    return _transform(x, _plan(x))


def hadamard_quantize(
    x: Tensor, scale: Tensor | None, row_index: Tensor | None, take_x0: bool, num_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``api.hadamard_quantize``."""
    how = _plan(x)
    if not how.fused:
        return _quantize_apart(_transform(x, how), scale, row_index, take_x0, num_bits)
    levels = x.new_empty(x.shape[0], how.width, dtype=torch.int8)
    row_scale = x.new_empty(x.shape[0] if scale is None else 0, dtype=torch.float32)
    x0 = x.new_empty(x.shape[0] if take_x0 else 0)
    _run_rows(how, x, levels, (scale, row_index, row_scale, x0 if take_x0 else None), 2 ** (num_bits - 1))
    return levels, row_scale, x0


def _quantize_apart(
    y: Tensor, scale: Tensor | None, row_index: Tensor | None, take_x0: bool, num_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    x0 = y.new_empty(0)
    if take_x0:
        x0 = y[:, 0].clone()
        y[:, 0] = 0
    if scale is None:
        return *quantize_token(y, num_bits), x0
    return quantize_static(y, scale, row_index, num_bits), y.new_empty(0, dtype=torch.float32), x0


def _plan(x: Tensor) -> Plan:
    return plan(padded_size(x.shape[1]), x.element_size(), _shared_bytes(x.device))


def _transform(x: Tensor, how: Plan) -> Tensor:
    """(M, padded K) in the dtype of x: rows first, then the passes, which leave float32 between them."""
    steps: list[Rows | Stage] = [step for step in (how.rows, *how.stages) if step is not None]
    dtype = x.dtype
    for step in steps:
        last = step is steps[-1]
        out = x.new_empty(x.shape[0], how.width, dtype=dtype if last else torch.float32)
        if isinstance(step, Rows):
            _run_rows(how, x, out, (None, None, None, None), 0)
        else:
            _run_stage(step, x, out, how.width**-0.5 if last else 1.0)
        x = out
    return x


def _run_rows(
    how: Plan,
    x: Tensor,
    out: Tensor,
    quantized: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    largest: int,
) -> None:
    """Rows of the plan; with stages to follow, on parts of rows and without the final division."""
    rows = how.rows
    assert rows is not None
    parts = how.width // rows.width
    if parts > 1 and x.shape[1] != how.width:
        x = torch.nn.functional.pad(x, (0, how.width - x.shape[1]))
    count = x.shape[0] * parts
    if count == 0:
        return
    options = row_options(how, x.dtype, out.dtype, largest, _shared_bytes(x.device))
    rows_kernel[(min(count, _num_programs(x.device, options["num_warps"])),)](
        x,
        _signs(rows.outer_factors, rows.outer.padded, False, x.device),
        _signs(rows.inner_signs, rows.inner_side, True, x.device),
        out,
        *quantized,
        count,
        x.shape[1] // parts,
        **options,
    )


def row_options(
    how: Plan, dtype: torch.dtype, out_dtype: torch.dtype, largest: int, shared_bytes: int
) -> dict[str, Any]:
    """Constants of `rows_kernel` for a plan, and how it is launched."""
    rows = how.rows
    assert rows is not None
    wide = dtype == torch.float32
    return {
        "A": rows.outer.order,
        "A1": rows.outer.first,
        "A2": rows.outer.second,
        "B": rows.inner.order,
        "B1": rows.inner.first >> rows.levels,
        "B2": rows.inner.second,
        "LEVELS": rows.levels,
        "INNER_FIRST": rows.inner_first,
        "TERMS_IN": 3 if wide else 1,
        "TERMS": 3 if wide or out_dtype == torch.float32 else 2,
        "FACTOR": how.width**-0.5 if rows.width == how.width else 1.0,
        "LARGEST": largest,
        "num_warps": rows.num_warps,
        "num_stages": rows.num_stages(dtype.itemsize, shared_bytes),
    }


def _run_stage(stage: Stage, x: Tensor, out: Tensor, factor: float) -> None:
    """One pass over memory."""
    vectors = x.shape[0] * stage.groups * stage.stride
    if vectors == 0:
        return
    size = max(triton.next_power_of_2(stage.order), MIN_TILE)
    block_rows, block_k = min(size, STAGE_ROWS), min(size, STAGE_K)
    terms = 1 if x.dtype != torch.float32 else 3 if out.dtype == torch.float32 else 2
    stage_kernel[triton.cdiv(vectors, STAGE_COLUMNS), triton.cdiv(stage.order, block_rows)](
        x,
        _signs(stage.factors, stage.order, False, x.device),
        out,
        vectors,
        x.shape[1],
        factor,
        GROUPS=stage.groups,
        ORDER=stage.order,
        STRIDE=stage.stride,
        TERMS=terms,
        BLOCK_ROWS=block_rows,
        BLOCK_VECTORS=STAGE_COLUMNS,
        BLOCK_K=block_k,
        num_warps=4,
    )


@lru_cache(maxsize=256)
def _signs(factors: tuple[int, ...], padded: int, transposed: bool, device: torch.device) -> Tensor:
    """(padded, padded) int8, zeros beyond the order."""
    matrix = signs(factors)
    if transposed:
        matrix = matrix.T
    missing = padded - len(matrix)
    with torch.inference_mode(False):
        return torch.from_numpy(np.pad(np.ascontiguousarray(matrix), ((0, missing), (0, missing)))).to(device)


def _num_programs(device: torch.device, num_warps: int) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return WARPS_PER_SM // num_warps * torch.cuda.get_device_properties(device).multi_processor_count


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may take."""
    if device.type != "cuda":
        return SHARED_BYTES
    return FAMILIES[family_of(torch.cuda.get_device_capability(device))].shared_memory_bytes
