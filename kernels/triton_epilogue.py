"""What all integer products share: the epilogue, and the second pass of a product split along K.

Partial sums of a split product are whole numbers, added in a fixed order: any split gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""True under TRITON_INTERPRET=1, which knows no inline assembly and cuts off float32 on its way to bfloat16."""

NIBBLE_SCALE = 1 / 16
"""Unpacked 4-bit levels stay in the upper half of their byte, 16 times too large; the epilogue undoes it exactly."""

REDUCE_BLOCK_M, REDUCE_BLOCK_N = 4, 256


@dataclass(frozen=True)
class Epilogue:
    """``acc * row_scale[row] * w_scale[n] + bias[n] + x0[row] * w0[n]``, as in ``api.linear_int8``."""

    row_scale: Tensor
    w_scale: Tensor
    row_index: Tensor | None
    bias: Tensor | None
    x0: Tensor | None
    w0: Tensor | None

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """Pointers in the order in which every kernel takes them."""
        return self.row_scale, self.w_scale, self.row_index, self.bias, self.x0, self.w0

    def scale_stride(self, num_rows: int) -> int:
        """How far apart the scales of neighbouring rows are: 0 where all rows share one."""
        return int(self.row_index is None and self.row_scale.shape[0] == num_rows)


@triton.jit
def to_dtype(y, dtype: tl.constexpr):
    """Float32 rounded half to even, also by the interpreter."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        y = tl.where(y == y, rounded.to(tl.float32, bitcast=True), y)
    return y.to(dtype)


@triton.jit
def apply_epilogue(
    acc, rows, columns, M, N, row_scale, w_scale, row_index, bias, x0, w0, scale_stride, ACC_SCALE: tl.constexpr
):
    """(rows, columns) int32 -> float32; ``ACC_SCALE`` is a power of two."""
    row_mask, column_mask = rows < M, columns < N
    if row_index is None:
        scale_a = tl.load(row_scale + rows * scale_stride, mask=row_mask, other=0.0)
    else:
        index = tl.load(row_index + rows, mask=row_mask, other=0).to(tl.int32)
        scale_a = tl.load(row_scale + index, mask=row_mask, other=0.0)
    scale_w = tl.load(w_scale + columns, mask=column_mask, other=0.0)
    y = acc.to(tl.float32)
    if ACC_SCALE != 1.0:
        y *= ACC_SCALE
    y = y * scale_a[:, None] * scale_w[None, :]
    if bias is not None:
        y += tl.load(bias + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if x0 is not None:
        kept_x = tl.load(x0 + rows, mask=row_mask, other=0.0).to(tl.float32)
        kept_w = tl.load(w0 + columns, mask=column_mask, other=0.0).to(tl.float32)
        y += kept_x[:, None] * kept_w[None, :]
    return y


@triton.jit
def finish(
    acc, rows, columns, split, out, M, N, row_scale, w_scale, row_index, bias, x0, w0, scale_stride,
    SPLIT_K: tl.constexpr, ACC_SCALE: tl.constexpr,
):  # fmt: skip
    """Stores a tile: the result, or with ``SPLIT_K`` > 1 this split's sums into ``out`` (SPLIT_K, M, N) int32."""
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if SPLIT_K == 1:
        y = apply_epilogue(
            acc, rows, columns, M, N, row_scale, w_scale, row_index, bias, x0, w0, scale_stride, ACC_SCALE
        )
        tl.store(out + offsets, to_dtype(y, out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + split.to(tl.int64) * M * N + offsets, acc, mask=mask)


@triton.jit
def reduce_kernel(
    partial, out, row_scale, w_scale, row_index, bias, x0, w0, scale_stride, M, N,
    SPLIT_K: tl.constexpr, ACC_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Second pass: partial (SPLIT_K, M, N) int32 -> out (M, N)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tile = partial + rows.to(tl.int64)[:, None] * N + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in tl.static_range(SPLIT_K):
        acc += tl.load(tile, mask=mask, other=0)
        tile += M.to(tl.int64) * N
    y = apply_epilogue(acc, rows, columns, M, N, row_scale, w_scale, row_index, bias, x0, w0, scale_stride, ACC_SCALE)
    tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], to_dtype(y, out.dtype.element_ty), mask=mask)


def target(out: Tensor, split_k: int) -> Tensor:
    """Where the first pass writes: the result, or fresh memory for partial sums.

    Fresh memory comes from torch's caching allocator: layer after layer gets the same block back, every stream has its
    own, and a CUDA graph keeps what it captured. A buffer of ours could promise none of this.
    """
    return out if split_k == 1 else torch.empty(split_k, *out.shape, dtype=torch.int32, device=out.device)


def reduce_splits(partial: Tensor, out: Tensor, epilogue: Epilogue, acc_scale: float) -> None:
    """Adds (SPLIT_K, M, N) int32 partial sums and writes the result; nothing to do where ``partial`` is the result."""
    if partial is out:
        return
    num_rows, num_out = out.shape
    grid = triton.cdiv(num_rows, REDUCE_BLOCK_M), triton.cdiv(num_out, REDUCE_BLOCK_N)
    reduce_kernel[grid](
        partial,
        out,
        *epilogue.arguments,
        epilogue.scale_stride(num_rows),
        num_rows,
        num_out,
        SPLIT_K=partial.shape[0],
        ACC_SCALE=acc_scale,
        BLOCK_M=REDUCE_BLOCK_M,
        BLOCK_N=REDUCE_BLOCK_N,
        num_warps=4,
    )
