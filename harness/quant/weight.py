"""Weight grids: scales by minmax or by an MSE clip search, and round-to-nearest."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.harness.errors import NonFiniteError, UnknownNameError
from mqbench.harness.quant.activation import all_finite
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.scheme import QuantArgs, Strategy

SHRINK_STEPS = 80
SHRINK_GRID = 100
CLIP_NORM = 2.4
CHUNK_ELEMENTS = 1 << 17


class Clip(StrEnum):
    """How the range of a weight group is chosen."""

    MINMAX = "minmax"
    MSE = "mse"


@dataclass(frozen=True)
class WeightGrid:
    """Scales (and zero points) of one weight.

    Attributes:
        scale: (out_features, groups), groups = 1 per channel. float32, or float64 for float64 weights.
        zero_point: Same shape, whole numbers in the dtype of ``scale``; None when symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None

    def columns(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of each column, given its group (``index``: (columns,)) -> (out_features, columns)."""
        zero_point = None if self.zero_point is None else self.zero_point[:, index]
        return self.scale[:, index], zero_point


@dataclass(frozen=True)
class RoundedWeight:
    """A weight on its grid.

    Attributes:
        weight: Dequantized values in the dtype of the original, (out_features, in_features).
        levels: Integer levels, same shape, int32.
        grid: The scales.
    """

    weight: Tensor
    levels: Tensor
    grid: WeightGrid


def group_index(in_features: int, args: QuantArgs, device: torch.device | None = None) -> Tensor:
    """(in_features,) group of each input channel: zeros per channel. The last group may be shorter than the others."""
    if args.strategy is Strategy.CHANNEL:
        return torch.zeros(in_features, dtype=torch.long, device=device)
    if args.strategy is not Strategy.GROUP or args.group_size is None:
        raise UnknownNameError("weight strategy", args.strategy, (Strategy.CHANNEL, Strategy.GROUP))
    return torch.arange(in_features, device=device) // args.group_size


def weight_scale(weight: Tensor, args: QuantArgs, clip: str = Clip.MINMAX) -> WeightGrid:
    """Chooses the grid of a weight.

    ``minmax`` covers every value. ``mse`` shrinks the range to p = 1, 0.99, ..., 0.21 of that and keeps, per group, the
    p with the least sum of |rounding error|^2.4 (the search of the GPTQ reference).

    Args:
        weight: (out_features, in_features).
        args: Per-channel or grouped, symmetric or not.
        clip: A ``Clip`` value.

    Raises:
        UnknownNameError: ``clip`` is unknown.
    """
    if clip not in list(Clip):
        raise UnknownNameError("weight clip", clip, Clip)
    num_groups = int(group_index(weight.shape[1], args).max()) + 1
    rows = group_rows(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), args)
    low, high = _range(rows, args)
    if clip == Clip.MSE:
        shrink = torch.cat([_best_shrink(args, *chunk) for chunk in _chunks(rows, low, high)])
        low, high = low * shrink, high * shrink
    scale, zero_point = _grid(low, high, args)
    shape = (len(weight), num_groups)
    return WeightGrid(scale.view(shape), None if zero_point is None else zero_point.view(shape))


def round_to_levels(x: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantArgs) -> Tensor:
    """Integer levels of ``x`` as floats: clamp(round(x / scale) + zero_point)."""
    level = torch.round(x / scale)
    if zero_point is not None:
        level += zero_point
    return level.clamp_(args.quant_min, args.quant_max)


def dequantize(levels: Tensor, grid: WeightGrid, args: QuantArgs, dtype: torch.dtype) -> Tensor:
    """(out_features, in_features) weight that integer levels stand for; the one place where this product is formed."""
    scale, zero_point = grid.columns(group_index(levels.shape[1], args, levels.device))
    wide = levels.to(scale.dtype, memory_format=torch.contiguous_format)
    return ((wide if zero_point is None else wide - zero_point) * scale).to(dtype)


def exact_levels(linear: QuantLinear) -> Tensor | None:
    """Integer levels, int32, that give the rounded weight of a linear back to the last bit.

    None when the weight is in floating point, or a later step moved it off its grid.
    """
    args, weight_grid = linear.weight_args, linear.weight_scale
    if args is None or weight_grid is None:
        return None
    grid = WeightGrid(weight_grid, linear.weight_zero_point)
    scale, zero_point = grid.columns(group_index(linear.in_features, args, linear.weight.device))
    levels = round_to_levels(linear.weight.detach().to(scale.dtype), scale, zero_point, args).to(torch.int32)
    return levels if torch.equal(dequantize(levels, grid, args, linear.weight.dtype), linear.weight) else None


def round_to_nearest(weight: Tensor, args: QuantArgs, clip: str = Clip.MINMAX, name: str = "weight") -> RoundedWeight:
    """Rounds a weight to its grid.

    Raises:
        NonFiniteError: the weight holds NaN or Inf.
    """
    check_finite(weight, name)
    grid = weight_scale(weight, args, clip)
    scale, zero_point = grid.columns(group_index(weight.shape[1], args, weight.device))
    levels = round_to_levels(weight.detach().to(scale.dtype), scale, zero_point, args).to(torch.int32)
    return RoundedWeight(dequantize(levels, grid, args, weight.dtype), levels, grid)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises ``NonFiniteError`` when ``weight`` holds NaN or Inf."""
    if not all_finite(weight):
        raise NonFiniteError(f"the weight of '{name}' holds NaN or Inf; load a checkpoint with finite weights")


def store_rounded(linear: QuantLinear, rounded: RoundedWeight, args: QuantArgs) -> float:
    """Puts a rounded weight into a linear.

    Returns:
        The relative Frobenius error of the weight.
    """
    before = linear.weight.detach().to(torch.promote_types(linear.weight.dtype, torch.float32))
    error = torch.linalg.norm(rounded.weight.to(before.dtype) - before)
    linear.weight.data = rounded.weight
    linear.weight_scale = rounded.grid.scale
    linear.weight_zero_point = rounded.grid.zero_point
    linear.weight_args = args
    return (error / torch.linalg.norm(before).clamp_min(torch.finfo(before.dtype).tiny)).item()


def group_rows(weight: Tensor, args: QuantArgs) -> Tensor:
    """A row per group: (out_features, in_features) -> (out_features * groups, group size).

    A shorter last group is filled up with zeros: every range holds zero, and every grid has it as a level.
    """
    size = args.group_size or weight.shape[1]
    missing = -weight.shape[1] % size
    return (F.pad(weight, (0, missing)) if missing else weight).reshape(-1, size)


def _range(rows: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor]:
    """(N, 1) low and high, zero included, mirrored when symmetric."""
    low = rows.amin(1, keepdim=True).clamp_max(0)
    high = rows.amax(1, keepdim=True).clamp_min(0)
    if args.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


def _grid(low: Tensor, high: Tensor, args: QuantArgs) -> tuple[Tensor, Tensor | None]:
    scale = (high if args.symmetric else high - low) / args.quant_max
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, None if args.symmetric else torch.round(-low / scale)


def _best_shrink(args: QuantArgs, rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(N, 1) factor of the range that rounds each row best; the first of equals."""
    best = torch.full_like(low, torch.inf)
    chosen = torch.ones_like(low)
    for step in range(SHRINK_STEPS):
        shrink = 1 - step / SHRINK_GRID
        scale, zero_point = _grid(low * shrink, high * shrink, args)
        level = round_to_levels(rows, scale, zero_point, args)
        error = (level if zero_point is None else level.sub_(zero_point)).mul_(scale).sub_(rows)
        total = error.abs_().pow_(CLIP_NORM).sum(1, keepdim=True)
        better = total < best
        best = torch.where(better, total, best)
        chosen = torch.where(better, torch.full_like(chosen, shrink), chosen)
    return chosen


def _chunks(rows: Tensor, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Row chunks small enough for the cache: the search passes over each of them 80 times."""
    size = max(1, CHUNK_ELEMENTS // rows.shape[1])
    return list(zip(rows.split(size), low.split(size), high.split(size), strict=True))
