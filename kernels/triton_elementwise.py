"""Quantization to int8, alone or fused with what stands before it: one read of the inputs, one write of the levels.

Under static scales a program takes a piece of a row; per-token scales and RMSNorm need the whole row, which stays in
registers up to `MAX_ROW_BLOCK` columns and is read again beyond. Levels are those of ``cpu``: the division is IEEE's,
ties go to even, and results round to the dtype of the input wherever the modules that are fused here round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mqbench.kernels.triton_epilogue import to_dtype
from mqbench.kernels.triton_levels import INPUT, activate, largest_magnitude, static_scale, to_levels, token_scale

PIECE_BLOCK = 2048
"""Columns per program under static scales."""

MAX_ROW_BLOCK = 32768
"""Longest row that stays in registers: 32 values in each of 1024 threads."""

LOOP_BLOCK = 8192
"""Columns per step through a longer row."""

ELEMENTS_PER_WARP = 512
MAX_WARPS = 32


@triton.jit
def static_kernel(
    x, up, levels, scale, row_index, K, KIND: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (row, piece): levels of ``activate(x, up)`` under the row's static scale."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    offsets = row.to(tl.int64) * K + columns
    y = activate(x, up, offsets, mask, KIND)
    tl.store(levels + offsets, to_levels(y, static_scale(scale, row_index, row), LARGEST), mask=mask)


@triton.jit
def token_kernel(
    x, up, levels, row_scale, K, KIND: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Program (row): levels of ``activate(x, up)`` and the row's scale; ``WHOLE``: BLOCK holds all of it."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * K
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        y = activate(x, up, start + columns, columns < K, KIND)
        scale = token_scale(largest_magnitude(y), LARGEST)
        tl.store(levels + start + columns, to_levels(y, scale, LARGEST), mask=columns < K)
    else:
        peak = tl.full((), 0, tl.int32)
        for first in range(0, K, BLOCK):
            y = activate(x, up, start + first + columns, first + columns < K, KIND)
            peak = tl.maximum(peak, largest_magnitude(y))
        scale = token_scale(peak, LARGEST)
        for first in range(0, K, BLOCK):
            mask = first + columns < K
            y = activate(x, up, start + first + columns, mask, KIND)
            tl.store(levels + start + first + columns, to_levels(y, scale, LARGEST), mask=mask)
    tl.store(row_scale + row, scale)


@triton.jit
def summed(x, residual, offsets, mask):
    """``x + residual`` in float32, rounded to the dtype of ``x``."""
    total = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        total = to_dtype(total, x.dtype.element_ty).to(tl.float32)
    return total


@triton.jit
def normalized(total, reciprocal, weight, columns, mask, dtype: tl.constexpr):
    """``total * reciprocal * weight``, rounded to ``dtype`` after each product; float32."""
    y = to_dtype(total * reciprocal, dtype).to(tl.float32)
    if weight is not None:
        y *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        y = to_dtype(y, dtype).to(tl.float32)
    return y


@triton.jit
def reciprocal_rms(square_sum, K, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square_sum, K * 1.0) + eps))


@triton.jit
def rms_norm_kernel(
    x, residual, weight, total_out, levels, scale, row_index, row_scale, K, eps,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row), with the row in registers."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    offsets = row.to(tl.int64) * K + columns
    total = summed(x, residual, offsets, mask)
    if residual is not None:
        tl.store(total_out + offsets, to_dtype(total, x.dtype.element_ty), mask=mask)
    reciprocal = reciprocal_rms(tl.sum(total * total), K, eps)
    y = normalized(total, reciprocal, weight, columns, mask, x.dtype.element_ty)
    if scale is None:
        divisor = token_scale(largest_magnitude(y), LARGEST)
        tl.store(row_scale + row, divisor)
    else:
        divisor = static_scale(scale, row_index, row)
    tl.store(levels + offsets, to_levels(y, divisor, LARGEST), mask=mask)


@triton.jit
def long_rms_norm_kernel(
    x, residual, weight, total_out, levels, scale, row_index, row_scale, K, eps,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row), for rows longer than BLOCK: sum of squares, largest magnitude, levels."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * K
    square_sum = tl.full((), 0.0, tl.float32)
    for first in range(0, K, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        total = summed(x, residual, start + columns, columns < K)
        if residual is not None:
            tl.store(total_out + start + columns, to_dtype(total, x.dtype.element_ty), mask=columns < K)
        square_sum += tl.sum(total * total)
    reciprocal = reciprocal_rms(square_sum, K, eps)
    if scale is None:
        peak = tl.full((), 0, tl.int32)
        for first in range(0, K, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            total = summed(x, residual, start + columns, columns < K)
            y = normalized(total, reciprocal, weight, columns, columns < K, x.dtype.element_ty)
            peak = tl.maximum(peak, largest_magnitude(y))
        divisor = token_scale(peak, LARGEST)
        tl.store(row_scale + row, divisor)
    else:
        divisor = static_scale(scale, row_index, row)
    for first in range(0, K, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        total = summed(x, residual, start + columns, columns < K)
        y = normalized(total, reciprocal, weight, columns, columns < K, x.dtype.element_ty)
        tl.store(levels + start + columns, to_levels(y, divisor, LARGEST), mask=columns < K)


def quantize_static(x: Tensor, scale: Tensor, row_index: Tensor | None, num_bits: int) -> Tensor:
    """See ``api.quantize_static``; arguments are checked already, here and below."""
    return _quantize(x, None, INPUT, scale, row_index, num_bits)[0]


def quantize_token(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """See ``api.quantize_token``."""
    return _quantize(x, None, INPUT, None, None, num_bits)


def silu_mul_quantize(
    gate: Tensor, up: Tensor, scale: Tensor | None, row_index: Tensor | None, num_bits: int
) -> tuple[Tensor, Tensor]:
    """See ``api.silu_mul_quantize``."""
    return _quantize(gate, up, "silu_mul", scale, row_index, num_bits)


def gelu_quantize(
    x: Tensor, kind: str, scale: Tensor | None, row_index: Tensor | None, num_bits: int
) -> tuple[Tensor, Tensor]:
    """See ``api.gelu_quantize``."""
    return _quantize(x, None, kind, scale, row_index, num_bits)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None,
    row_index: Tensor | None,
    residual: Tensor | None,
    num_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``api.rms_norm_quantize``."""
    rows, columns = x.shape
    levels, row_scale = _results(x, scale)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    if levels.numel():
        block = row_block(columns)
        kernel = rms_norm_kernel if block >= columns else long_rms_norm_kernel
        kernel[(rows,)](
            x,
            residual,
            weight,
            total,
            levels,
            scale,
            row_index,
            row_scale,
            columns,
            eps,
            LARGEST=2 ** (num_bits - 1),
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return levels, row_scale, total


def row_block(columns: int) -> int:
    """Columns that a program takes at once where it needs the whole row."""
    block = triton.next_power_of_2(columns)
    return int(block) if block <= MAX_ROW_BLOCK else LOOP_BLOCK


def num_warps(block: int) -> int:
    """Warps of a program that holds ``block`` columns."""
    return min(max(block // ELEMENTS_PER_WARP, 1), MAX_WARPS)


def _quantize(
    x: Tensor, up: Tensor | None, kind: str, scale: Tensor | None, row_index: Tensor | None, num_bits: int
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    levels, row_scale = _results(x, scale)
    largest = 2 ** (num_bits - 1)
    if not levels.numel():
        return levels, row_scale
    if scale is None:
        block = row_block(columns)
        token_kernel[(rows,)](
            x, up, levels, row_scale, columns, kind, largest, block, block >= columns, num_warps=num_warps(block)
        )
    else:
        block = min(triton.next_power_of_2(columns), PIECE_BLOCK)
        static_kernel[rows, triton.cdiv(columns, block)](
            x, up, levels, scale, row_index, columns, kind, largest, block, num_warps=num_warps(block)
        )
    return levels, row_scale


def _results(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Levels, and row scales, or an empty tensor under static ones."""
    row_scale = x.new_empty(x.shape[0] if scale is None else 0, dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), row_scale if x.shape[1] else row_scale.fill_(1.0)
