"""Who sees whom in AIFS attention, worked out once for all layers of a forward pass.

Padding is coded into the positions, -1 for queries and `NEVER` for keys, so that one comparison decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.kernels.checks import check_dtype

VARIANTS = ("unpermute", "mask", "flex", "triton")
"""``unpermute`` sorts the tokens, runs torch's causal attention and sorts back; ``mask`` gives torch an explicit mask;
``flex`` is FlexAttention, compiled on GPUs; ``triton`` is our own kernel."""

AUTO: Mapping[tuple[str, bool], tuple[str, ...]] = MappingProxyType(
    {
        ("cuda", True): ("unpermute",),
        ("cuda", False): ("triton", "mask"),
        ("cpu", True): ("unpermute",),
        ("cpu", False): ("mask",),
    }
)
"""What "auto" stands for: the first that can serve the arguments, by device (others count as ``cpu``) and by whether
queries and keys are the same tokens. Unmeasured choices."""

NEVER = 2**31 - 1
"""Position of a key that nobody sees."""

BLIND = -1
"""Position of a query that sees nothing."""

TRITON_BLOCK_N, FLEX_BLOCK = 64, 128
TRITON_BLOCKS_M = (16, 128)
"""Blocks of queries for at most 16 of them, and for more."""


def triton_block_m(num_queries: int) -> int:
    """Queries per block in the lists of the variant ``triton``."""
    return TRITON_BLOCKS_M[num_queries > TRITON_BLOCKS_M[0]]


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom, for all layers of one forward pass; made by `plan_attention`.

    Attributes:
        variant: One of `VARIANTS`.
        query_position: (B, T_q) int32, `BLIND` at padding.
        key_position: (B, T_k) int32, `NEVER` at padding.
        blind: (B, T_q) bool, True at queries that see no key; None when there can be none.
        tables: What the variant needs besides.
    """

    variant: str
    query_position: Tensor
    key_position: Tensor
    blind: Tensor | None
    tables: tuple[Tensor, ...]


def plan_attention(
    position: Tensor,
    valid: Tensor | None = None,
    *,
    num_queries: int | None = None,
    query_position: Tensor | None = None,
    variant: str = "auto",
) -> AttentionPlan:
    """What `attend` needs to know, computed once for all layers; arguments are those of `aifs_attention`.

    ``num_queries`` (T_q) is needed without ``query_position`` where it differs from T_k. "auto" chooses by `AUTO`.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: an argument of another shape or device, or a variant that cannot serve these arguments.
    """
    num_queries = check_positions(position, valid, query_position, num_queries)
    if variant == "auto":
        variant = choose_variant(position, num_queries, query_position, takes_triton=True)
    _check_variant(variant, position, num_queries, query_position)
    blind = None
    keys = position if valid is None else position.masked_fill(~valid, NEVER)
    queries = query_position
    if queries is None:
        last = slice(position.shape[1] - num_queries, None)
        queries = position[:, last] if valid is None else position[:, last].masked_fill(~valid[:, last], BLIND)
    if (valid is not None or query_position is not None) and position.shape[1]:
        blind = queries < keys.amin(1, keepdim=True)
    queries, keys = queries.contiguous(), keys.contiguous()
    return AttentionPlan(variant, queries, keys, blind, _TABLES[variant](queries, keys))


def choose_variant(position: Tensor, num_queries: int, query_position: Tensor | None, takes_triton: bool) -> str:
    """The first variant of `AUTO` that can serve; ``takes_triton`` says whether our kernel takes q, k and v."""
    has_triton = takes_triton and find_spec("triton") is not None
    same_tokens = query_position is None and num_queries == position.shape[1]
    variants = AUTO["cuda" if position.is_cuda else "cpu", same_tokens]
    return next(variant for variant in variants if has_triton or variant != "triton")


def check_positions(
    position: Tensor, valid: Tensor | None, query_position: Tensor | None, num_queries: int | None
) -> int:
    """T_q; ``num_queries`` None takes the shape of ``query_position``, else that of ``position``.

    Values are not looked at: a GPU would wait.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: arguments that do not fit each other.
    """
    check_dtype("position", position, (torch.int32,))
    if position.dim() != 2:
        raise ValueError(f"position must have shape (batch, keys), got {tuple(position.shape)}")
    if valid is not None:
        check_dtype("valid", valid, (torch.bool,))
        _check_like("valid", valid, tuple(position.shape), position)
    if query_position is not None:
        check_dtype("query_position", query_position, (torch.int32,))
        if num_queries is None:
            num_queries = query_position.shape[-1] if query_position.dim() else 0
        _check_like("query_position", query_position, (position.shape[0], num_queries), position)
        return num_queries
    num_queries = position.shape[1] if num_queries is None else num_queries
    if not 0 <= num_queries <= position.shape[1]:
        raise ValueError(
            f"query_position is needed for more queries than keys, got {num_queries} and {position.shape[1]}"
        )
    return num_queries


def _check_like(name: str, x: Tensor, shape: tuple[int, ...], position: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.device != position.device:
        raise ValueError(f"{name} must be on {position.device} as position is, got {x.device}")


def _check_variant(variant: str, position: Tensor, num_queries: int, query_position: Tensor | None) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be auto, {', '.join(VARIANTS)}, got {variant!r}")
    if variant == "unpermute" and (query_position is not None or num_queries != position.shape[1]):
        raise ValueError(
            "variant 'unpermute' needs as many queries as keys and no query_position; after a cache take another one"
        )


def _order(queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """(B, T): the slot of the p-th token of the original sequence; padding comes last."""
    return (torch.argsort(keys, dim=1, stable=True),)


def _mask(queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """(B, 1, T_q, T_k) bool; a blind query sees all keys, and its row becomes zero afterwards."""
    sees = keys[:, None, :] <= queries[:, :, None]
    return ((sees | ~sees.any(-1, keepdim=True))[:, None],)


def _triton_tables(queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """(B, Q, 2) counts of blocks seen whole and seen at all, and (B, Q, N) their indices in this order."""
    whole, seen = _visible_blocks(queries, keys, triton_block_m(queries.shape[1]), TRITON_BLOCK_N)
    counts = torch.stack([whole.sum(-1), seen.sum(-1)], -1)
    return counts.int(), _first(whole.int() + seen.int())


def _flex_tables(queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """Counts (B, 1, Q) and indices (B, 1, Q, N) of blocks seen in part, then of blocks seen whole."""
    whole, seen = (blocks[:, None] for blocks in _visible_blocks(queries, keys, FLEX_BLOCK, FLEX_BLOCK))
    return tuple(x for kind in (seen & ~whole, whole) for x in (kind.sum(-1).int(), _first(kind.int())))


def _first(rank: Tensor) -> Tensor:
    """Indices along the last dimension, largest rank first, else in order."""
    return torch.argsort(rank, dim=-1, descending=True, stable=True).int()


def _visible_blocks(queries: Tensor, keys: Tensor, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """(B, Q, N) bool each: every query of the block sees every key of the block, and some query sees some key."""
    key_blocks = _blocks(keys, block_n, NEVER)  # past the end nobody sees: the last block is masked where it is short
    lowest, highest = _blocks(queries, block_m, NEVER).amin(-1), _blocks(queries, block_m, BLIND).amax(-1)
    whole = key_blocks.amax(-1)[:, None, :] <= lowest[:, :, None]
    return whole, key_blocks.amin(-1)[:, None, :] <= highest[:, :, None]


def _blocks(positions: Tensor, size: int, filling: int) -> Tensor:
    """(B, T) -> (B, ceil(T / size), size)."""
    return F.pad(positions, (0, -positions.shape[1] % size), value=filling).unflatten(1, (-1, size))


_TABLES: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = MappingProxyType(
    {
        "unpermute": _order,
        "mask": _mask,
        "flex": _flex_tables,
        "triton": _triton_tables,
    }
)
