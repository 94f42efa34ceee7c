"""Attention of one pass, chosen once for all layers: who sees whom, and over which keys.

Its classes are not frozen: torch 2.11's compiler loses the fields of a frozen dataclass that a compiled pass makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.kernels.attention import AttentionPlan, attend

MAX_SPLITS, MIN_KEYS_PER_SPLIT = 16, 128
KV_BLOCK = MAX_SPLITS * MIN_KEYS_PER_SPLIT // 8
"""Capacities of the static cache are multiples of this, so that decoding can split the keys."""


class PassAttention(Protocol):
    """What a layer calls with its queries, the keys and values of the chunk and all that are cached.

    Shapes: q (B, H, T, D), chunk (B, H_kv, T, D), cached (B, H_kv, S, D) -> (B, H, T, D).
    """

    def __call__(self, q: Tensor, chunk: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor]) -> Tensor: ...

    def to(self, device: torch.device) -> PassAttention:
        """The same for a layer on another device."""
        ...


@dataclass
class Causal:
    """The first chunk, unpadded and in its original order."""

    def __call__(self, q: Tensor, chunk: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor]) -> Tensor:
        return stock_attention(q, *chunk, is_causal=True)

    def to(self, device: torch.device) -> Causal:
        return self


@dataclass
class Masked:
    """Any chunk; (B or 1, 1, T, S) mask, True or 0 where attention is allowed; None allows all."""

    mask: Tensor | None

    def __call__(self, q: Tensor, chunk: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor]) -> Tensor:
        return stock_attention(q, *cached, mask=self.mask)

    def to(self, device: torch.device) -> Masked:
        return Masked(None if self.mask is None else self.mask.to(device))


@dataclass
class Planned:
    """AIFS attention: any order, padding, later turns.

    Attributes:
        plan: Over the first ``num_keys`` cached keys, or over the chunk.
        num_keys: None for the chunk alone.
    """

    plan: AttentionPlan
    num_keys: int | None = None

    def __call__(self, q: Tensor, chunk: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor]) -> Tensor:
        if self.num_keys is None:
            return attend(q, *chunk, self.plan)
        key, value = (x[:, :, : self.num_keys] for x in cached)
        return attend(q, key, value, self.plan)

    def to(self, device: torch.device) -> Planned:
        return Planned(with_tensors(self.plan, [x.to(device) for x in plan_tensors(self.plan)]), self.num_keys)


@dataclass
class Decoding:
    """One query per row; valid (B, S) bool says which slots of the cache hold a token."""

    valid: Tensor

    def __call__(self, q: Tensor, chunk: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor]) -> Tensor:
        return decode_attention(q, *cached, self.valid)

    def to(self, device: torch.device) -> Decoding:
        return Decoding(self.valid.to(device))


def plan_tensors(plan: AttentionPlan) -> list[Tensor]:
    """All tensors of a plan in a fixed order."""
    return [plan.query_position, plan.key_position, *([] if plan.blind is None else [plan.blind]), *plan.tables]


def with_tensors(plan: AttentionPlan, tensors: Sequence[Tensor]) -> AttentionPlan:
    """The plan with other tensors in its places, in the order of ``plan_tensors``."""
    num_fixed = 2 if plan.blind is None else 3
    blind = None if plan.blind is None else tensors[2]
    return AttentionPlan(plan.variant, tensors[0], tensors[1], blind, tuple(tensors[num_fixed:]))


def stock_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Torch's attention; key heads are repeated where its fast kernels do not share them."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and (mask is not None or q.element_size() > 2):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    is_causal = is_causal and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Attention of one query per row: query heads that share keys are rows of one product, and keys are split.

    Scores and softmax are in float32 at least. Splitting the second product along the keys keeps a GPU busy with the
    few heads of one row.

    Shapes: q (B, H, 1, D), k and v (B, H_kv, S, D), valid (B, S) bool -> (B, H, 1, D).
    """
    batch, heads, _, width = q.shape
    kv_heads, num_keys = k.shape[1:3]
    rows = q.reshape(batch * kv_heads, heads // kv_heads, width)
    scores = _wide_product(rows, k.reshape(batch * kv_heads, num_keys, width).mT) * width**-0.5
    scores = scores.view(batch, -1, num_keys).masked_fill(~valid[:, None], -torch.inf)
    weights = scores.softmax(-1).to(v.dtype)
    splits = num_splits(num_keys)
    weights = weights.view(batch * kv_heads, -1, splits, num_keys // splits).transpose(1, 2)
    parts = weights @ v.reshape(batch * kv_heads, splits, num_keys // splits, width)
    out = parts.sum(1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return out.view(batch, heads, 1, width)


def num_splits(num_keys: int) -> int:
    """The largest power of two that divides the keys into parts that are long enough."""
    splits = 1
    while splits < MAX_SPLITS and num_keys % (2 * splits) == 0 and num_keys // (2 * splits) >= MIN_KEYS_PER_SPLIT:
        splits *= 2
    return splits


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """A batch of products that is not rounded to 16 bits."""
    if a.is_cuda and a.element_size() == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)
