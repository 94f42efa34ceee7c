"""Integer matrix products on tensor cores: W8A8, and W4A8 that unpacks in registers.

Both walk the output in groups of tile rows, so that programs running together share their operands in L2. ``M``, ``N``
and ``K`` may be anything; widths that are no multiple of 16 bytes lose wide loads, not correctness.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mqbench.kernels.gemm_configs import GemmConfig
from mqbench.kernels.triton_epilogue import INTERPRETED, NIBBLE_SCALE, Epilogue, finish, reduce_splits, target


@triton.jit
def grouped_tile(pid, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of a program: down ``GROUP_M`` tile rows, then on to the next column."""
    group = pid // (GROUP_M * num_tiles_n)
    first = group * GROUP_M
    height = tl.minimum(num_tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * num_tiles_n)
    return first + inside % height, inside // height


@triton.jit
def int8_gemm_kernel(
    x, w, out, row_scale, w_scale, row_index, bias, x0, w0, scale_stride, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, ACC_SCALE: tl.constexpr,
):  # fmt: skip
    """x (M, K) int8, w (N, K) int8 -> out (M, N), or (SPLIT_K, M, N) partial sums."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    # Rows past the end read a row again and are not stored: no mask in the loop.
    x_tile = x + (rows % M).to(tl.int64)[:, None] * K + k[None, :]
    w_tile = w + (columns % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(split * BLOCK_K, K, BLOCK_K * SPLIT_K):
        if EVEN_K:
            x_block, w_block = tl.load(x_tile), tl.load(w_tile)
        else:
            inside = tl.arange(0, BLOCK_K) < K - start
            x_block = tl.load(x_tile, mask=inside[None, :], other=0)
            w_block = tl.load(w_tile, mask=inside[:, None], other=0)
        acc = tl.dot(x_block, w_block, acc, out_dtype=tl.int32)
        x_tile += BLOCK_K * SPLIT_K
        w_tile += BLOCK_K * SPLIT_K
    finish(
        acc, rows, columns, split, out, M, N, row_scale, w_scale, row_index, bias, x0, w0, scale_stride,
        SPLIT_K, ACC_SCALE,
    )  # fmt: skip


@triton.jit
def low_nibbles(packed):
    """The lower levels of uint8 bytes, 16 times too large, int8: shift and mask of four bytes at once."""
    if INTERPRETED:
        levels = ((packed.to(tl.int32) << 4) & 0xF0).to(tl.int8)
    else:
        levels = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [packed],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return levels


@triton.jit
def high_nibbles(packed):
    """The upper levels of uint8 bytes, 16 times too large, int8."""
    if INTERPRETED:
        levels = (packed.to(tl.int32) & 0xF0).to(tl.int8)
    else:
        levels = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return levels


@triton.jit
def int4_gemm_kernel(
    x, w, out, row_scale, w_scale, row_index, bias, x0, w0, scale_stride, M, N, HALF,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, ACC_SCALE: tl.constexpr,
):  # fmt: skip
    """x (M, 2 HALF) int8, w (N, HALF) uint8 -> out (M, N), or (SPLIT_K, M, N) partial sums.

    Computes the transpose: the first operand of a tensor core may come from registers, where the levels are unpacked.
    ``BLOCK_K`` counts bytes; each is one column of the first half of K and one of the second.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    split = tl.program_id(1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    w_tile = w + (columns % N).to(tl.int64)[:, None] * HALF + k[None, :]
    x_tile = x + (rows % M).to(tl.int64)[None, :] * (2 * HALF) + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in range(split * BLOCK_K, HALF, BLOCK_K * SPLIT_K):
        if EVEN_K:
            packed = tl.load(w_tile)
            x_low, x_high = tl.load(x_tile), tl.load(x_tile + HALF)
        else:
            inside = tl.arange(0, BLOCK_K) < HALF - start
            packed = tl.load(w_tile, mask=inside[None, :], other=0)
            x_low = tl.load(x_tile, mask=inside[:, None], other=0)
            x_high = tl.load(x_tile + HALF, mask=inside[:, None], other=0)
        acc = tl.dot(low_nibbles(packed), x_low, acc, out_dtype=tl.int32)
        acc = tl.dot(high_nibbles(packed), x_high, acc, out_dtype=tl.int32)
        w_tile += BLOCK_K * SPLIT_K
        x_tile += BLOCK_K * SPLIT_K
    finish(
        tl.trans(acc), rows, columns, split, out, M, N, row_scale, w_scale, row_index, bias, x0, w0, scale_stride,
        SPLIT_K, ACC_SCALE,
    )  # fmt: skip


def int8_gemm(
    x_q: Tensor, w_q: Tensor, epilogue: Epilogue, out: Tensor, config: GemmConfig, acc_scale: float = 1.0
) -> None:
    """W8A8: writes ``x_q @ w_q.T`` with its epilogue into ``out``.

    Args:
        x_q: (M, K) int8, M at least 1.
        w_q: (N, K) int8.
        epilogue: Scales and terms that are added.
        out: (M, N) float16, bfloat16 or float32.
        config: Tile sizes.
        acc_scale: A power of two for the accumulator.
    """
    _launch(int8_gemm_kernel, x_q, w_q, epilogue, out, config, acc_scale)


def int4_gemm(x_q: Tensor, w_packed: Tensor, epilogue: Epilogue, out: Tensor, config: GemmConfig) -> None:
    """W4A8, unpacking on the fly: ``int8_gemm`` with w_packed (N, K/2) uint8 in planar halves."""
    _launch(int4_gemm_kernel, x_q, w_packed, epilogue, out, config, NIBBLE_SCALE)


def _launch(
    kernel: triton.JITFunction,
    x_q: Tensor,
    w: Tensor,
    epilogue: Epilogue,
    out: Tensor,
    config: GemmConfig,
    acc_scale: float,
) -> None:
    (num_rows, num_out), width = out.shape, w.shape[1]
    first = target(out, config.split_k)
    grid = triton.cdiv(num_rows, config.block_m) * triton.cdiv(num_out, config.block_n), config.split_k
    kernel[grid](
        x_q,
        w,
        first,
        *epilogue.arguments,
        epilogue.scale_stride(num_rows),
        num_rows,
        num_out,
        width,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        SPLIT_K=config.split_k,
        EVEN_K=width % config.block_k == 0,
        ACC_SCALE=acc_scale,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    reduce_splits(first, out, epilogue, acc_scale)
