"""Products for a handful of rows, where reading the weight is all the time there is.

Each program owns a few rows of the weight and the whole of K (or a split of it), reads 16 bytes per thread and
instruction, and adds up in registers until one reduction at the end. The widths are compile-time constants, so that
loops unroll and the loads of several steps are under way together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mqbench.kernels.gemm_configs import GemvConfig
from mqbench.kernels.triton_epilogue import (
    INTERPRETED,
    NIBBLE_SCALE,
    Epilogue,
    finish,
    reduce_splits,
    target,
    to_dtype,
)

WORD_BYTES = 4
MAX_ROWS = 8
"""More rows than this would not fit the registers; tensor cores are better at them anyway."""

MAGIC_BITS, MAGIC = tl.constexpr(0x4B000008), tl.constexpr(float(2**23 + 8))
"""A nibble xor the bits, read as a float, is ``MAGIC + level``: no integer conversion."""

WORDS_FIRST = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Loads that are contiguous along no axis, as those of scales, get a layout whose first axis runs fastest before Triton
3.7, and whose last one does since. Where words are that axis, all operands of a loop share a layout."""


@triton.jit
def dot4(a, b, acc):
    """Adds the product of four signed bytes with four others, in every int32 word."""
    if INTERPRETED:
        for shift in tl.static_range(0, 32, 8):
            acc += ((a << shift) >> 24) * ((b << shift) >> 24)
    else:
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    return acc


@triton.jit
def int_gemv_kernel(
    x, w, out, row_scale, w_scale, row_index, bias, x0, w0, scale_stride, M, N,
    WORDS: tl.constexpr, IS_INT4: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, ACC_SCALE: tl.constexpr,
):  # fmt: skip
    """x, w of int32 words that hold four levels (eight in w when ``IS_INT4``, one plane each in the nibbles).

    w is (N, WORDS), x is (M, WORDS) or (M, 2 WORDS). Tiles have three axes, row, column and word, so that every load
    has its final layout.
    """
    CHUNK: tl.constexpr = (WORDS + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_tile = w + (columns % N).to(tl.int64)[None, :, None] * WORDS
    x_tile = x + (rows % M)[:, None, None] * (WORDS * (2 if IS_INT4 else 1))
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.int32)
    for start in tl.static_range(0, CHUNK, BLOCK_K):
        k = split * CHUNK + start + tl.arange(0, BLOCK_K)[None, None, :]
        inside = (k < WORDS) | ((SPLIT_K == 1) & (start + BLOCK_K <= WORDS))
        levels = tl.load(w_tile + k, mask=inside, other=0, eviction_policy="evict_first")
        if IS_INT4:
            acc = dot4((levels << 4) & -0x0F0F0F10, tl.load(x_tile + k, mask=inside, other=0), acc)
            acc = dot4(levels & -0x0F0F0F10, tl.load(x_tile + WORDS + k, mask=inside, other=0), acc)
        else:
            acc = dot4(levels, tl.load(x_tile + k, mask=inside, other=0), acc)
    finish(
        tl.sum(acc, axis=2), rows, columns, split, out, M, N, row_scale, w_scale, row_index, bias, x0, w0,
        scale_stride, SPLIT_K, ACC_SCALE,
    )  # fmt: skip


@triton.jit
def dequantize(nibbles, scale, zero, dtype: tl.constexpr):
    """``(level - zero) * scale`` in float32, rounded to ``dtype``; float32."""
    y = ((nibbles ^ MAGIC_BITS).to(tl.float32, bitcast=True) - (MAGIC + zero)) * scale
    return to_dtype(y, dtype).to(tl.float32)


@triton.jit
def weight_only_gemv_kernel(
    x, w, out, scale, zero_point, bias, M, N,
    WORDS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WORDS_FIRST: tl.constexpr,
):  # fmt: skip
    """x (M, 2, 4, WORDS) float32 by plane, byte and word; w (N, WORDS) int32; scale (N, groups) -> out (M, N).

    ``GROUP`` is a multiple of 4: a word lies in one group per plane. Axes of the tiles are row, column and word, or
    word, column and row (``WORDS_FIRST``).
    """
    GROUPS: tl.constexpr = (8 * WORDS + GROUP - 1) // GROUP
    dtype: tl.constexpr = out.dtype.element_ty
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (columns % N).to(tl.int64)[None, :, None]
    if WORDS_FIRST:
        row, word = rows[None, None, :], tl.arange(0, BLOCK_K)[:, None, None]
        acc = tl.zeros((BLOCK_K, BLOCK_N, BLOCK_M), tl.float32)
    else:
        row, word = rows[:, None, None], tl.arange(0, BLOCK_K)[None, None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    x_tile = x + row % M * (8 * WORDS)
    for start in range(0, WORDS, BLOCK_K):
        k = start + word
        inside = k < WORDS
        packed = tl.load(w + column * WORDS + k, mask=inside, other=0, eviction_policy="evict_first")
        for plane in tl.static_range(2):
            group = column * GROUPS + (plane * WORDS + k) // (GROUP // 4)
            factor = tl.load(scale + group, mask=inside, other=0.0)
            zero = 0.0 if zero_point is None else tl.load(zero_point + group, mask=inside, other=0.0)
            for byte in tl.static_range(4):
                weight = dequantize((packed >> (8 * byte + 4 * plane)) & 15, factor, zero, dtype)
                acc += weight * tl.load(x_tile + (4 * plane + byte) * WORDS + k, mask=inside, other=0.0)
    y = tl.sum(acc, axis=0).trans() if WORDS_FIRST else tl.sum(acc, axis=2)
    if bias is not None:
        added = tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
        y += to_dtype(added, dtype).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out + rows[:, None].to(tl.int64) * N + columns[None, :], to_dtype(y, dtype), mask=mask)


def int8_gemv(x_q: Tensor, w_q: Tensor, epilogue: Epilogue, out: Tensor, config: GemvConfig) -> None:
    """W8A8 for up to ``MAX_ROWS`` rows: x_q (M, K) int8, w_q (N, K) int8, K a multiple of 4 -> out (M, N)."""
    _launch_integer(x_q, w_q, epilogue, out, config, is_int4=False)


def int4_gemv(x_q: Tensor, w_packed: Tensor, epilogue: Epilogue, out: Tensor, config: GemvConfig) -> None:
    """W4A8 for up to ``MAX_ROWS`` rows: w_packed (N, K/2) uint8 in planar halves, K a multiple of 8."""
    _launch_integer(x_q, w_packed, epilogue, out, config, is_int4=True)


def weight_only_gemv(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    out: Tensor,
    config: GemvConfig,
) -> None:
    """W4A16 for up to ``MAX_ROWS`` rows, K a multiple of 8, ``group_size`` of 4; as ``api.weight_only_int4``."""
    num_rows, num_out = out.shape
    words = w_packed.shape[1] // WORD_BYTES
    by_byte = torch.empty(num_rows, 2, WORD_BYTES, words, dtype=torch.float32, device=x.device)
    by_byte.copy_(x.view(num_rows, 2, words, WORD_BYTES).transpose(2, 3))
    weight_only_gemv_kernel[(triton.cdiv(num_out, config.block_n),)](
        by_byte,
        _words(w_packed),
        out,
        w_scale,
        zero_point,
        bias,
        num_rows,
        num_out,
        WORDS=words,
        GROUP=group_size,
        BLOCK_M=triton.next_power_of_2(num_rows),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        WORDS_FIRST=WORDS_FIRST,
        num_warps=config.num_warps,
    )


def _launch_integer(x_q: Tensor, w: Tensor, epilogue: Epilogue, out: Tensor, config: GemvConfig, is_int4: bool) -> None:
    num_rows, num_out = out.shape
    acc_scale = NIBBLE_SCALE if is_int4 else 1.0
    first = target(out, config.split_k)
    int_gemv_kernel[(triton.cdiv(num_out, config.block_n), config.split_k)](
        _words(x_q),
        _words(w),
        first,
        *epilogue.arguments,
        epilogue.scale_stride(num_rows),
        num_rows,
        num_out,
        WORDS=w.shape[1] // WORD_BYTES,
        IS_INT4=is_int4,
        BLOCK_M=triton.next_power_of_2(num_rows),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        ACC_SCALE=acc_scale,
        num_warps=config.num_warps,
    )
    reduce_splits(first, out, epilogue, acc_scale)


def _words(x: Tensor) -> Tensor:
    """Four bytes as one int32; a matrix that starts amid a word is copied."""
    return (x.clone() if x.data_ptr() % WORD_BYTES else x).view(torch.int32)
