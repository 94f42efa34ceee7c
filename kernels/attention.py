"""Causal attention over tokens that stand in another order than they were written in (AIFS, paper Sec. 3.1).

Query i sees key j iff ``position[j] <= position[i]`` and neither is padding, where ``position`` is the index in the
original sequence. Any order is allowed, so any number of images, padding and permuted caches are.

A forward pass asks who sees whom once, not in every layer: `plan_attention` answers, `attend` runs a layer, and
`aifs_attention` does both. The operation is ``torch.ops.mqbench.aifs_attention``.

Variant "auto" looks at the device and at whether queries and keys are the same tokens (`attention_plan.AUTO`). On CUDA
a whole sequence is sorted, attended by torch's causal kernel and sorted back, because four copies of a row should cost
less than leaving that kernel; queries after a cache go to our own kernel, which alone splits few queries over many
keys and shares key heads under a mask. Both are unmeasured choices: no GPU has timed the variants yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.kernels.attention_plan import (
    FLEX_BLOCK,
    VARIANTS,
    AttentionPlan,
    check_positions,
    choose_variant,
    plan_attention,
)
from mqbench.kernels.checks import FLOAT_DTYPES, check_dtype

__all__ = ["VARIANTS", "AttentionPlan", "aifs_attention", "attend", "plan_attention"]

MAX_HEAD_DIM = 256
"""Largest head dimension of the variant ``triton``."""


def aifs_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    valid: Tensor | None = None,
    *,
    query_position: Tensor | None = None,
    scale: float | None = None,
    variant: str = "auto",
) -> Tensor:
    """Attention of permuted tokens, as causal attention would be in the original order (paper Eq. 4).

    Args:
        q: (B, H, T_q, D) float16, bfloat16, float32 or (not ``triton``) float64.
        k: (B, H_kv, T_k, D), H a multiple of H_kv. Values at padding must be finite, but for ``triton``.
        v: (B, H_kv, T_k, D), likewise.
        position: (B, T_k) int32, the original sequence index of each key, from 0; indices of one sequence differ.
        valid: (B, T_k) bool, False at padding; None when nothing is padded.
        query_position: (B, T_q) int32, the original index of each query, -1 at padding. None: the queries are the last
            T_q tokens, a chunk after a cache or, with T_q = T_k, the whole sequence.
        scale: Factor of the scores, 1 / sqrt(D) by default.
        variant: One of `VARIANTS`, or "auto". ``unpermute`` needs T_q = T_k and no ``query_position``.

    Returns:
        (B, H, T_q, D), stored as (B, T_q, H, D); zeros for queries that are padding or see no key. Not differentiable.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: an argument of another shape or device, or a variant that cannot serve these arguments.
    """
    _check_tensors(q, k, v)
    check_positions(position, valid, query_position, q.shape[2])
    if position.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"position must have shape {(k.shape[0], k.shape[2])} as k has, got {tuple(position.shape)}")
    if variant == "auto":
        takes_triton = q.dtype in FLOAT_DTYPES and q.shape[3] <= MAX_HEAD_DIM
        variant = choose_variant(position, q.shape[2], query_position, takes_triton)
    plan = plan_attention(position, valid, num_queries=q.shape[2], query_position=query_position, variant=variant)
    return attend(q, k, v, plan, scale=scale)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float | None = None) -> Tensor:
    """One layer under a plan: `aifs_attention` without its planning. Arguments, result and errors are the same."""
    _check_tensors(q, k, v)
    for name, x, positions in (("q", q, plan.query_position), ("k", k, plan.key_position)):
        expected = positions.shape[0], positions.shape[1]
        if (x.shape[0], x.shape[2]) != expected or x.device != positions.device:
            got = f"batch {x.shape[0]} and {x.shape[2]} tokens on {x.device}"
            raise ValueError(f"{name} must have batch {expected[0]} and {expected[1]} tokens as the plan has, on "
                             f"{positions.device}; got {got}")  # fmt: skip
    if plan.variant == "triton":
        _check_triton(q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _operation(
        q, k, v, plan.query_position, plan.key_position, plan.blind, list(plan.tables), plan.variant, scale
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, x, (*FLOAT_DTYPES, torch.float64))
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must be {_dtype_name(q)} as q is, got {_dtype_name(x)}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, head_dim), got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {x.device}")
    batch, heads, _, head_dim = q.shape
    if not head_dim:
        raise ValueError("q must have a head_dim of at least 1, got 0")
    if not k.shape[1] or heads % k.shape[1] or k.shape[0] != batch or k.shape[3] != head_dim:
        expected = f"({batch}, a divisor of {heads}, keys, {head_dim})"
        raise ValueError(f"k must have shape {expected} to go with q, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have shape {tuple(k.shape)} as k has, got {tuple(v.shape)}")


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _check_triton(q: Tensor) -> None:
    if q.dtype not in FLOAT_DTYPES or q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"variant 'triton' needs q in 16 or 32 bits with a head_dim of at most {MAX_HEAD_DIM},"
            f" got {_dtype_name(q)} and {q.shape[3]}; take another variant"
        )
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"variant 'triton' needs Triton ({error}); install triton or take another variant") from error
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"variant 'triton' needs q on a GPU, got {q.device}; take another variant")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    blind: Tensor | None,
    tables: list[Tensor],
    variant: str,
    scale: float,
) -> Tensor:
    out = _empty_result(q)
    if not q.numel() or not k.numel():
        return out.zero_()
    if variant == "triton":
        from mqbench.kernels.triton_attention import attention

        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        with torch.cuda.device_of(q):
            attention(q, k, v, query_position, key_position, tables[0], tables[1], scale, out.transpose(1, 2))
        return out
    if variant == "unpermute":
        _unpermuted(q, k, v, tables[0], scale, out)
    elif variant == "mask":
        out.copy_(_stock_attention(q, k, v, scale, tables[0]))
    else:
        out.copy_(_flex(q, k, v, query_position, key_position, tables, scale))
    return out if blind is None else out.masked_fill_(blind[:, None, :, None], 0)


def _fake_attend(q: Tensor, *_: Any) -> Tensor:
    return _empty_result(q)


_operation = torch.library.custom_op(
    "mqbench::aifs_attention",
    _attend,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor query_position, Tensor key_position, Tensor? blind, Tensor[] tables,"
    " str variant, float scale) -> Tensor",
)
_operation.register_fake(_fake_attend)


def _empty_result(q: Tensor) -> Tensor:
    """(B, H, T, D) stored as (B, T, H, D), which the output projection reads without a copy."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _unpermuted(q: Tensor, k: Tensor, v: Tensor, order: Tensor, scale: float, out: Tensor) -> None:
    """Sorts, attends, sorts back. Padding stands last, where no causal query sees it."""
    rows = torch.arange(len(order), device=order.device)[:, None]
    q, k, v = (x.transpose(1, 2)[rows, order].transpose(1, 2) for x in (q, k, v))
    out.transpose(1, 2)[rows, order] = _stock_attention(q, k, v, scale, None).transpose(1, 2)


def _stock_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Torch's attention, causal without a mask. Its fast kernels share key heads in 16-bit causal attention only."""
    if q.shape[1] != k.shape[1] and (mask is not None or q.element_size() > 2):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, query_position: Tensor, key_position: Tensor, tables: list[Tensor], scale: float
) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key_position[batch, key] <= query_position[batch, query]

    counts, indices, whole_counts, whole_indices = tables
    blocks = BlockMask.from_kv_blocks(
        counts,
        indices,
        whole_counts,
        whole_indices,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=sees,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,  # gradients alone need them
    )
    return _flex_function(q.is_cuda)(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@cache
def _flex_function(is_cuda: bool) -> Callable[..., Tensor]:
    """Compiled for GPUs alone; elsewhere it is a reference."""
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return torch.compile(function) if is_cuda else function
