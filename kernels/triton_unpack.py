"""4-bit weights unpacked into memory, for products with so many rows that this costs little."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mqbench.kernels.triton_gemv import WORD_BYTES, dequantize

BLOCK_N, BLOCK_K = 4, 512
HIGH_NIBBLES = {torch.int32: -0x0F0F0F10, torch.uint8: 0xF0}


@triton.jit
def unpack_kernel(packed, out, N, WIDTH, MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """packed (N, WIDTH) -> out (N, 2 WIDTH), in int32 words or in uint8 bytes; every level 16 times too large."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < N)[:, None] & (k < WIDTH)[None, :]
    row = rows.to(tl.int64)[:, None] * WIDTH
    levels = tl.load(packed + row + k[None, :], mask=mask, other=0, eviction_policy="evict_first")
    tile = out + 2 * row + k[None, :]
    tl.store(tile, (levels << 4) & MASK, mask=mask)
    tl.store(tile + WIDTH, levels & MASK, mask=mask)


@triton.jit
def dequantize_kernel(
    packed, out, scale, zero_point, N, HALF, GROUP, GROUPS, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """packed (N, HALF) uint8, scale (N, GROUPS) -> out (N, 2 HALF) in its dtype."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < N)[:, None] & (k < HALF)[None, :]
    row = rows.to(tl.int64)[:, None]
    levels = tl.load(packed + row * HALF + k[None, :], mask=mask, other=0).to(tl.int32)
    for plane in tl.static_range(2):
        group = row * GROUPS + ((plane * HALF + k) // GROUP)[None, :]
        zero = 0.0 if zero_point is None else tl.load(zero_point + group, mask=mask, other=0.0)
        factor = tl.load(scale + group, mask=mask, other=0.0)
        weight = dequantize((levels >> (4 * plane)) & 15, factor, zero, out.dtype.element_ty)
        tile = out + row * (2 * HALF) + plane * HALF + k[None, :]
        tl.store(tile, weight.to(out.dtype.element_ty), mask=mask)


def unpack_int4_x16(w_packed: Tensor) -> Tensor:
    """(N, K/2) uint8 in planar halves -> (N, K) int8 of 16 times the level; the product's scale takes the 16 back.

    The result is fresh memory of torch's caching allocator, for the reasons in ``triton_epilogue.target``.
    """
    num_out, half = w_packed.shape
    out = torch.empty(num_out, 2 * half, dtype=torch.int8, device=w_packed.device)
    words = half % WORD_BYTES == 0 and w_packed.data_ptr() % WORD_BYTES == 0
    unit = torch.int32 if words else torch.uint8
    width = half // WORD_BYTES if words else half
    unpack_kernel[_grid(num_out, width)](
        w_packed.view(unit),
        out.view(unit),
        num_out,
        width,
        MASK=HIGH_NIBBLES[unit],
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
    )
    return out


def dequantize_int4(
    w_packed: Tensor, w_scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """(N, K) weight of ``api.weight_only_int4`` in ``dtype``."""
    num_out, half = w_packed.shape
    out = torch.empty(num_out, 2 * half, dtype=dtype, device=w_packed.device)
    dequantize_kernel[_grid(num_out, half)](
        w_packed,
        out,
        w_scale,
        zero_point,
        num_out,
        half,
        group_size,
        w_scale.shape[1],
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
    )
    return out


def _grid(num_out: int, width: int) -> tuple[int, int]:
    return triton.cdiv(num_out, BLOCK_N), triton.cdiv(width, BLOCK_K)
