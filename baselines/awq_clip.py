"""AWQ's search for clipped weight ranges, and rounding inside them (Lin et al. 2023, arXiv 2306.00978).

Per output channel and group: the range max|w| shrinks by 0, 5, ..., 45 %, and the shrinkage whose clamped and rounded
weights change the group's share of the output least, mean over rows of ((Q(clamp(w)) - w) . x)^2, is kept. The original
samples about 512 rows; X^T X of each group holds all rows at less cost, so here all count. Queries and keys are not
clipped (their product hides what an error does); of a fused qkv only the values are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mqbench.harness.errors import CalibrationError
from mqbench.harness.quant.calibrate import store_and_report
from mqbench.harness.quant.capture import Replay, visit_groups
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.options import Option
from mqbench.harness.quant.scheme import QuantArgs, Strategy
from mqbench.harness.quant.session import Session
from mqbench.harness.quant.weight import RoundedWeight, group_index, group_rows, round_to_nearest

SHRINKS = tuple(1 - step / 20 for step in range(10))

OPTIONS = (Option("clip", True, kind=bool, help="AWQ searches clipped ranges after scaling"),)


@torch.no_grad()
def round_weights_clipped(session: Session) -> None:
    """Rounds every weight to nearest inside the ranges that the search found on the float model.

    Option ``clip`` (True); without it the range is that of the weights.

    Raises:
        CalibrationError: no calibration row reaches a layer.
        NonFiniteError: a weight or a calibration input is NaN or Inf.
    """
    limits: dict[str, Tensor] = {}
    if session.option("clip", True):
        visit_groups(session, partial(_find_limits, session, limits))
    for name, linear in session.linears.items():
        args = session.weight_args(name)
        if args is not None:
            store_and_report(session, name, round_clipped(linear.weight, limits.get(name), args, name), args)


def round_clipped(weight: Tensor, limit: Tensor | None, args: QuantArgs, name: str = "weight") -> RoundedWeight:
    """Clamps to +-limit, (out_features, groups), and rounds to nearest; None clamps nothing."""
    if limit is not None:
        limit = limit.to(weight.dtype)[:, group_index(weight.shape[1], args, weight.device)]
        weight = torch.minimum(torch.maximum(weight, -limit), limit)
    return round_to_nearest(weight, args, name=name)


def _find_limits(session: Session, limits: dict[str, Tensor], names: tuple[str, ...], replay: Replay) -> None:
    declared = clipped_rows(session.layout)
    clipped = {name: rows for name in names if (rows := declared.get(name, slice(None))) is not None}
    if not clipped:
        return
    args = session.weight_args(names[0])
    assert args is not None
    hessians = group_hessians(replay, args, names[0])
    for name, rows in clipped.items():
        weight = session.linears[name].weight.detach()
        limit = torch.full((len(weight), len(hessians)), torch.inf, dtype=hessians.dtype, device=weight.device)
        limit[rows] = clip_limits(weight[rows], hessians, args)
        limits[name] = limit


def clipped_rows(layout: Layout) -> Mapping[str, slice | list[int] | None]:
    """What is clipped of each reader of an attention norm: the values; None where it makes queries or keys only."""
    rows: dict[str, slice | list[int] | None] = {}
    for path in (path for tower in layout.towers for block in tower.blocks for path in block.paths):
        rows |= dict.fromkeys(path.attention_readers)
        rows[path.attention.value] = path.attention.value_index
    return rows


def group_hessians(replay: Replay, args: QuantArgs, name: str) -> Tensor:
    """Mean of x x^T over the rows for each group's channels, (groups, group size, group size); a short group is padded.

    Raises:
        CalibrationError: there is no row.
    """
    total: Tensor | None = None
    num_rows = 0

    def add(rows: Tensor) -> None:
        nonlocal total, num_rows
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        parts = group_rows(wide, args).view(len(rows), -1, args.group_size or rows.shape[1]).transpose(0, 1)
        product = parts.transpose(1, 2) @ parts
        total = product if total is None else total.add_(product)
        num_rows += len(rows)

    replay(add)
    if total is None:
        raise CalibrationError(f"no calibration sample reaches '{name}'; add samples with images")
    return total.div_(num_rows)


def clip_limits(weight: Tensor, hessians: Tensor, args: QuantArgs) -> Tensor:
    """The best range of every output channel and group; the widest of equals.

    Shapes: (out_features, in_features), (groups, size, size) -> (out_features, groups).
    """
    groups, size, _ = hessians.shape
    rows = group_rows(weight.to(hessians.dtype), args)
    row_args = replace(args, strategy=Strategy.CHANNEL, group_size=None)
    peak = rows.abs().amax(1, keepdim=True)
    best, least = peak, torch.full_like(peak, torch.inf)
    for shrink in SHRINKS:
        limit = peak * shrink
        rounded = round_clipped(rows, limit, row_args).weight
        change = (rounded - rows).view(-1, groups, size).transpose(0, 1)
        error = ((change @ hessians) * change).sum(-1).T.reshape(-1, 1)
        better = error < least
        best, least = torch.where(better, limit, best), torch.where(better, error, least)
    return best.view(-1, groups)
