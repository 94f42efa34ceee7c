"""GPTQ: rounds a weight column by column and lets the columns to come make up for the error (Frantar et al. 2023).

``METHOD`` is GPTQ alone, without any transform; other methods take ``round_weights_gptq`` as one of their steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mqbench.harness.errors import CalibrationError, NonFiniteError
from mqbench.harness.quant import kv_cache
from mqbench.harness.quant.calibrate import (
    ACTIVATION_OPTIONS,
    WEIGHT_CLIP,
    ZERO_POINT,
    attach_input_quantizers,
    calibrate_activations,
    store_and_report,
)
from mqbench.harness.quant.capture import Replay, visit_groups
from mqbench.harness.quant.kv_cache import kv_cache_steps
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.options import Option
from mqbench.harness.quant.scheme import QuantArgs, Recipe
from mqbench.harness.quant.session import Session, Step
from mqbench.harness.quant.weight import (
    Clip,
    RoundedWeight,
    WeightGrid,
    check_finite,
    dequantize,
    group_index,
    round_to_levels,
    weight_scale,
)

BLOCK_SIZE = 128
DAMPING = 0.01
DAMPING_GROWTH = 10.0
DAMPING_TRIES = 6

OPTIONS = (
    replace(WEIGHT_CLIP, default="mse"),
    ZERO_POINT,
    Option("act_order", True, kind=bool, help="GPTQ rounds the columns of large inputs first"),
    Option("percdamp", DAMPING, kind=float, minimum=1e-8, help="GPTQ's damping, as a share of the mean diagonal"),
    Option("block_size", BLOCK_SIZE, kind=int, minimum=1, help="GPTQ's columns between two updates of the rest"),
)


def round_weights_gptq(session: Session) -> None:
    """Rounds every weight by GPTQ, each on the inputs that the already rounded layers before it produce.

    Options: ``weight_clip`` (default ``mse``), ``act_order`` (True), ``percdamp`` (0.01), ``block_size`` (128),
    ``zero_point`` (False).

    Raises:
        CalibrationError: no calibration row reaches a layer that is to be rounded.
        NonFiniteError: a weight or a calibration input is NaN or Inf.
    """
    visit_groups(session, partial(_round_group, session))


def _round_group(session: Session, names: tuple[str, ...], replay: Replay) -> None:
    hessian = input_hessian(replay, names[0])
    for name in names:
        linear, args = session.linears[name], session.weight_args(name)
        assert args is not None
        check_finite(linear.weight, name)
        rounded = gptq_round(
            linear.weight,
            hessian,
            args,
            clip=session.option("weight_clip", Clip.MSE),
            act_order=session.option("act_order", True),
            percdamp=session.option("percdamp", DAMPING),
            block_size=session.option("block_size", BLOCK_SIZE),
            name=name,
        )
        store_and_report(session, name, rounded, args)


def input_hessian(replay: Replay, name: str) -> Tensor:
    """H = 2 / N sum x x^T over the calibration rows, (in_features, in_features) in float32 or wider.

    Raises:
        CalibrationError: there is no row.
    """
    total: list[Tensor] = []
    num_rows = 0

    def add(rows: Tensor) -> None:
        nonlocal num_rows
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not total:
            total.append(wide.new_zeros(wide.shape[1], wide.shape[1]))
        total[0].addmm_(wide.T, wide)
        num_rows += len(rows)

    replay(add)
    if not total:
        raise CalibrationError(f"no calibration sample reaches '{name}'; add samples with images")
    return total[0].mul_(2 / num_rows)


@torch.no_grad()
def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    args: QuantArgs,
    *,
    clip: str = Clip.MSE,
    act_order: bool = True,
    percdamp: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    grid: WeightGrid | None = None,
    name: str = "weight",
) -> RoundedWeight:
    """Rounds one weight.

    Args:
        weight: (out_features, in_features).
        hessian: (in_features, in_features), proportional to sum x x^T. Its scale does not matter. Not changed.
        args: Per-channel or grouped; groups are those of the original column order.
        clip: Range of the grid, when ``grid`` is not given.
        act_order: Rounds columns by falling Hessian diagonal.
        percdamp: Share of the mean diagonal that is added to the diagonal.
        block_size: Columns between two updates of the rest of the matrix.
        grid: Scales to use; None takes ``weight_scale(weight, args, clip)``.
        name: Layer name, for messages.

    Raises:
        NonFiniteError: the Hessian stays without a Cholesky factor however much it is damped.
    """
    grid = grid or weight_scale(weight, args, clip)
    order = _column_order(hessian, act_order)
    work = weight.detach().to(grid.scale.dtype)[:, order]
    ordered = hessian.to(work.dtype)[order][:, order]
    dead = ordered.diagonal() == 0
    work[:, dead] = 0
    factor = inverse_factor(ordered, percdamp, name)
    columns = grid.columns(group_index(weight.shape[1], args, weight.device)[order])
    levels = torch.empty_like(work)
    for start in range(0, work.shape[1], block_size):
        stop = min(start + block_size, work.shape[1])
        window = (columns[0][:, start:stop], None if columns[1] is None else columns[1][:, start:stop])
        levels[:, start:stop], error = _round_block(work[:, start:stop], factor[start:stop, start:stop], *window, args)
        work[:, stop:] -= error @ factor[start:stop, stop:]
    levels = levels[:, torch.argsort(order)].to(torch.int32)
    return RoundedWeight(dequantize(levels, grid, args, weight.dtype), levels, grid)


def inverse_factor(hessian: Tensor, percdamp: float = DAMPING, name: str = "weight") -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian; dead channels count as 1 on the diagonal.

    When damping by ``percdamp`` is not enough, it is multiplied by 10 up to five times.

    Raises:
        NonFiniteError: even that was not enough, which only NaN or Inf can cause.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean()
    for trial in range(DAMPING_TRIES):
        damped = hessian.clone()
        damped.diagonal().add_(percdamp * DAMPING_GROWTH**trial * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if info == 0 and torch.isfinite(upper).all():
                return upper
    raise NonFiniteError(f"the calibration Hessian of '{name}' cannot be factorized; its inputs hold NaN or Inf")


def _column_order(hessian: Tensor, act_order: bool) -> Tensor:
    if act_order:
        return torch.argsort(hessian.diagonal(), descending=True)
    return torch.arange(len(hessian), device=hessian.device)


def _round_block(
    block: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor | None, args: QuantArgs
) -> tuple[Tensor, Tensor]:
    """Levels and scaled errors of one block of columns, each (out_features, columns)."""
    # Column-major copies: every step below touches one column and the columns behind it.
    block, scale = block.T.clone(), scale.T.contiguous()
    zero_point = None if zero_point is None else zero_point.T.contiguous()
    levels, errors = torch.empty_like(block), torch.empty_like(block)
    for i in range(len(block)):
        zero = None if zero_point is None else zero_point[i]
        level = round_to_levels(block[i], scale[i], zero, args)
        value = (level if zero is None else level - zero) * scale[i]
        levels[i] = level
        errors[i] = (block[i] - value) / factor[i, i]
        block[i:] -= factor[i, i:, None] * errors[i]
    return levels.T, errors.T.contiguous()


def gptq_steps(recipe: Recipe) -> Sequence[Step]:
    """Round with GPTQ, calibrate."""
    return (round_weights_gptq, attach_input_quantizers, calibrate_activations, *kv_cache_steps(recipe))


METHOD = StepMethod(
    name="gptq",
    aliases=(),
    summary="GPTQ weights without any transform; static per-tensor activations where they are rounded",
    steps=gptq_steps,
    uses_data=True,
    options=(*OPTIONS, *ACTIVATION_OPTIONS, *kv_cache.OPTIONS),
)
