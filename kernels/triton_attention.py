"""AIFS attention on our own kernel: FlashAttention-2's forward pass over lists of the blocks that can be seen.

A list names the key blocks of a block of queries: first those seen whole, which need no mask and no positions, then
those seen in part. Nothing else is read. Few queries over many keys (decoding) are split along the keys, and a second
kernel joins the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from mqbench.kernels.attention_plan import NEVER, TRITON_BLOCK_N, triton_block_m
from mqbench.kernels.triton_epilogue import INTERPRETED, to_dtype

UNSEEN = tl.constexpr(NEVER)
LOG2_E = 1.4426950408889634
MIN_TILE = 16
"""Smallest side of a matrix product."""

MAX_PACKED_ROWS = 64
"""Up to here the queries of all heads that share a key head stand in one tile, and its keys are read once."""

MIN_BLOCKS_PER_SPLIT, MAX_SPLITS = 4, 32
SMALLEST_HEAD_DIM = 64
"""Head dimension of the first lines of the tables, which serve smaller ones too."""


@dataclass(frozen=True)
class AttentionConfig:
    """Largest tile and how it runs; ``block_n`` divides `TRITON_BLOCK_N`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


CONFIGS: Mapping[tuple[int, int], AttentionConfig] = MappingProxyType(
    {
        (2, 64): AttentionConfig(128, 64, 8, 3),
        (2, 128): AttentionConfig(128, 64, 8, 2),
        (2, 256): AttentionConfig(64, 32, 8, 2),
        (4, 64): AttentionConfig(16, 32, 4, 2),
        (4, 128): AttentionConfig(32, 32, 8, 2),
        (4, 256): AttentionConfig(16, 16, 8, 1),
    }
)
"""By bytes per element and padded head dimension. They fit in the 99 KiB of shared memory of compute capability 8.9,
and in 16 bits no register spills. Speeds are unmeasured."""

PADDED_CONFIGS: Mapping[tuple[int, int], AttentionConfig] = MappingProxyType(
    {**CONFIGS, (2, 128): AttentionConfig(128, 32, 8, 2)}
)
"""For head dimensions that are no power of two, whose masks take registers too."""


@triton.jit
def product(a, b, acc):
    """``a @ b + acc`` in float32; the interpreter's bfloat16 product is wrong."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def attend_block(
    q, k, v, acc, total, peak, start, q_position, key_position, T_K, k_stride, v_stride, scale,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in powers of two: keys ``start`` to ``start + BLOCK_N``."""
    columns, width = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_tile = k + start.to(tl.int64) * k_stride + columns[:, None] * k_stride + width[None, :]
    v_tile = v + start.to(tl.int64) * v_stride + columns[:, None] * v_stride + width[None, :]
    if MASKED:
        position = tl.load(key_position + start + columns, mask=start + columns < T_K, other=UNSEEN)
        mask = (position != UNSEEN)[:, None] & (width < HEAD_DIM)[None, :]  # padding may hold NaN: it is not read
        k_block, v_block = tl.load(k_tile, mask=mask, other=0.0), tl.load(v_tile, mask=mask, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        mask = (width < HEAD_DIM)[None, :]
        k_block, v_block = tl.load(k_tile, mask=mask, other=0.0), tl.load(v_tile, mask=mask, other=0.0)
    else:
        k_block, v_block = tl.load(k_tile), tl.load(v_tile)
    scores = product(q, tl.trans(k_block), tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale
    if MASKED:
        scores = tl.where(position[None, :] <= q_position[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = product(to_dtype(weights, v_block.dtype), v_block, acc * shrink[:, None])
    return acc, total, new_peak


@triton.jit
def attention_kernel(
    q, k, v, out, peaks, totals, query_position, key_position, counts, blocks, scale,
    B, H, T_Q, T_K, Q_BLOCKS, K_BLOCKS,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    GROUP: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SUB_M: tl.constexpr, SUB_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries and heads, split): out (B, T_Q, H, D), or (SPLITS, B, T_Q, H, D) float32 parts.

    ``GROUP`` heads share a key head; ``PACK`` (1 or GROUP) heads stand in one tile. A block of the lists holds
    ``SUB_M`` x ``SUB_N`` tiles.
    """
    lanes = B * (H // PACK)
    tile = tl.cdiv(T_Q * PACK, BLOCK_M) - 1 - tl.program_id(0) // lanes  # late queries see most: they go first
    lane, split = tl.program_id(0) % lanes, tl.program_id(1)
    batch, first_head = (lane // (H // PACK)).to(tl.int64), lane % (H // PACK) * PACK
    rows, width = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads, tokens = first_head + rows % PACK, rows // PACK
    row_mask = tokens < T_Q
    mask = row_mask[:, None] & (width < HEAD_DIM)[None, :]
    row_offsets = heads.to(tl.int64) * q_head + tokens.to(tl.int64) * q_stride
    q_block = tl.load(q + batch * q_batch + row_offsets[:, None] + width[None, :], mask=mask, other=0.0)
    q_position = tl.load(query_position + batch * T_Q + tokens, mask=row_mask, other=-1)
    k += batch * k_batch + (first_head // GROUP).to(tl.int64) * k_head
    v += batch * v_batch + (first_head // GROUP).to(tl.int64) * v_head
    key_position += batch * T_K
    plan = batch * Q_BLOCKS + tile // SUB_M
    whole, seen = tl.load(counts + 2 * plan) * SUB_N, tl.load(counts + 2 * plan + 1) * SUB_N
    blocks += plan * K_BLOCKS

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(split, whole, SPLITS):
        start = tl.load(blocks + i // SUB_N) * (BLOCK_N * SUB_N) + i % SUB_N * BLOCK_N
        acc, total, peak = attend_block(
            q_block, k, v, acc, total, peak, start, q_position, key_position, T_K, k_stride, v_stride, scale,
            BLOCK_N, HEAD_DIM, BLOCK_D, False,
        )  # fmt: skip
    for i in range(split + tl.cdiv(tl.maximum(whole - split, 0), SPLITS) * SPLITS, seen, SPLITS):
        start = tl.load(blocks + i // SUB_N) * (BLOCK_N * SUB_N) + i % SUB_N * BLOCK_N
        acc, total, peak = attend_block(
            q_block, k, v, acc, total, peak, start, q_position, key_position, T_K, k_stride, v_stride, scale,
            BLOCK_N, HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip

    row = ((split * B + batch) * T_Q + tokens) * H + heads
    if SPLITS == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a query that sees no key gets zeros
    else:
        tl.store(peaks + row, peak, mask=row_mask)
        tl.store(totals + row, total, mask=row_mask)
    tl.store(out + row[:, None] * HEAD_DIM + width[None, :], to_dtype(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def join_kernel(
    parts, peaks, totals, out, ROWS, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Program (row): parts (SPLITS, ROWS, D) -> out (ROWS, D)."""
    splits, width = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    rows = splits.to(tl.int64) * ROWS + tl.program_id(0)
    peak = tl.load(peaks + rows)
    top = tl.max(peak, 0)
    weights = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights * tl.load(totals + rows), 0)
    mask = width < HEAD_DIM
    part = tl.load(parts + rows[:, None] * HEAD_DIM + width[None, :], mask=mask[None, :], other=0.0)
    y = tl.sum(part * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + tl.program_id(0).to(tl.int64) * HEAD_DIM + width, to_dtype(y, out.dtype.element_ty), mask=mask)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    counts: Tensor,
    blocks: Tensor,
    scale: float,
    out: Tensor,
    num_splits: int | None = None,
) -> None:
    """Writes softmax(scale * q k^T under the mask) v.

    Args:
        q: (B, H, T_q, D) float16, bfloat16 or float32, D at most 256; any strides, the last being 1.
        k: (B, H_kv, T_k, D), likewise.
        v: (B, H_kv, T_k, D), likewise.
        query_position: (B, T_q) int32; a query sees keys whose position is no larger.
        key_position: (B, T_k) int32, `NEVER` at keys that nobody sees.
        counts: (B, Q, 2) int32: blocks seen whole, and blocks seen at all, of `triton_block_m(T_q)` x `TRITON_BLOCK_N`.
        blocks: (B, Q, N) int32: their indices, those seen whole first.
        scale: Factor of the scores.
        out: (B, T_q, H, D) contiguous.
        num_splits: Parts along the keys, a power of two; None chooses by the shapes and the GPU.
    """
    (batch, heads, num_queries, head_dim), (_, kv_heads, num_keys, _) = q.shape, k.shape
    config, sizes = constants(q.element_size(), head_dim, num_queries, heads // kv_heads)
    num_tiles = triton.cdiv(num_queries * sizes["PACK"], sizes["BLOCK_M"]) * batch * (heads // sizes["PACK"])
    splits = num_splits or _num_splits(num_tiles, blocks.shape[2], q.device)
    parts, peaks, totals = _parts(out, splits)
    attention_kernel[num_tiles, splits](
        q, k, v, parts, peaks, totals, query_position, key_position, counts, blocks, scale * LOG2_E,
        batch, heads, num_queries, num_keys, blocks.shape[1], blocks.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **sizes, SPLITS=splits, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        rows = batch * num_queries * heads
        join_kernel[(rows,)](
            parts, peaks, totals, out, rows, HEAD_DIM=head_dim, BLOCK_D=sizes["BLOCK_D"], SPLITS=splits
        )


def constants(element_size: int, head_dim: int, num_queries: int, group: int) -> tuple[AttentionConfig, dict[str, int]]:
    """The line of the table, and all constants of `attention_kernel` but ``SPLITS``.

    Args:
        element_size: Bytes per element of q, k and v.
        head_dim: D.
        num_queries: T_q.
        group: Heads per key head.
    """
    block_d, plan_m = max(MIN_TILE, triton.next_power_of_2(head_dim)), triton_block_m(num_queries)
    table = CONFIGS if block_d == head_dim else PADDED_CONFIGS
    config = table[element_size, max(SMALLEST_HEAD_DIM, block_d)]
    pack, block_m = _rows(num_queries, group, min(plan_m, config.block_m), config.block_m)
    return config, {
        "GROUP": group, "PACK": pack, "BLOCK_M": block_m, "BLOCK_N": config.block_n,
        "HEAD_DIM": head_dim, "BLOCK_D": block_d,
        "SUB_M": 1 if pack > 1 else plan_m // block_m, "SUB_N": TRITON_BLOCK_N // config.block_n,
    }  # fmt: skip


def _rows(num_queries: int, group: int, block_m: int, max_rows: int) -> tuple[int, int]:
    """Heads per tile, and rows of a tile: packed where all queries of a group fit into one."""
    if group > 1 and num_queries * group <= min(MAX_PACKED_ROWS, max_rows):
        return group, max(MIN_TILE, triton.next_power_of_2(num_queries * group))
    return 1, block_m


def _num_splits(num_tiles: int, num_blocks: int, device: torch.device) -> int:
    """Enough to occupy the GPU, from shapes alone: nothing waits for the positions."""
    if device.type != "cuda":
        return 1
    wanted = torch.cuda.get_device_properties(device).multi_processor_count // num_tiles
    limit = min(wanted, num_blocks // MIN_BLOCKS_PER_SPLIT, MAX_SPLITS)
    return 1 << (limit.bit_length() - 1) if limit > 1 else 1


def _parts(out: Tensor, splits: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Where the first pass writes: the result, or sums with their peaks and totals."""
    if splits == 1:
        return out, None, None
    shape = splits, *out.shape
    parts = torch.empty(shape, dtype=torch.float32, device=out.device)
    peaks, totals = (torch.empty(shape[:-1], dtype=torch.float32, device=out.device) for _ in range(2))
    return parts, peaks, totals
