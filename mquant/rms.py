"""Rotation Magnitude Suppression (MQuant Sec. 3.4, Eq. 8 and 9).

An online Hadamard turns a weight W (rows w_:j over the n input channels of output column j) into H W, whose row 0 is
sqrt(n) * mean_i(w_ij), Eq. 8: where the mean is large, rotation creates an outlier instead of removing one. Eq. 9 says
where: |sqrt(n) * mean_i(w_ij)| > max_i |w_ij|. There, input channel 0 leaves the matrix product and returns as the
rank-1 term x0 * w0, which also takes the large x0 out of the activation's range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType

import torch
from torch import Tensor

from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.activation import fake_quantize
from mqbench.harness.quant.calibrate import layer_report
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.options import Option
from mqbench.harness.quant.scheme import QuantArgs
from mqbench.harness.quant.session import Session
from mqbench.harness.quant.transforms import OnlineHadamard
from mqbench.kernels.hadamard import hadamard_transform


class Side(StrEnum):
    """What input channel 0 leaves: x0 the activation's range and rounding, w0 the weight's, or both."""

    BOTH = "both"
    WEIGHT = "weight"
    ACTIVATION = "activation"


ROWS_PER_BLOCK = 1024
"""Weight rows in float64 at a time."""

RULES: Mapping[str, Callable[[Tensor, Tensor], bool]] = MappingProxyType(
    {
        "median": lambda spike, peak: _margin(spike, peak) > 1,
        "any": lambda spike, peak: bool((spike > peak).any()),
        "norm": lambda spike, peak: bool(spike.norm() > peak.norm()),
    }
)
"""How Eq. 9, stated per output column j, decides for a whole layer; the paper leaves it unsaid."""

OPTIONS = (
    Option("rms_rule", "median", tuple(RULES), help="how Eq. 9, which is per output column, decides for a layer"),
    Option("rms_side", "both", tuple(map(str, Side)), help="what channel 0 leaves: weight grid, input range, both"),
    Option("rms_x0_bits", None, (None, 4, 8), help="bits of w0 outside the weight; no use with rms_side=activation"),
)


@torch.no_grad()
def split_spikes(session: Session) -> None:
    """Takes input channel 0 out of the matrix product of each layer behind an online Hadamard that satisfies Eq. 9.

    Runs on the final transformed float weights: after rotation (which mixes output columns), before rounding. The
    layer's ``eq9_margin`` is reported whether it is split or not: the median over output columns j of
    |sqrt(n) mean_i(w_ij)| / max_i |w_ij|.

    Options of the recipe:
        rms_rule: ``median`` (the default): the margin above exceeds 1, that is, Eq. 9 holds for at least half of
            the columns; ``any``: for one column; ``norm``: the Euclidean norm over j of the left sides exceeds that of
            the right sides.
        rms_side: What a split layer computes, with Q the rounding of activations and R that of weights, x', W' the
            input and weight with zeros in channel 0. The range of Q (calibrated or per token) is that of its argument,
            the grid of R that of its argument.
            ``both`` (the default): Q(x') R(W') + x0 w0, x0 in floating point.
            ``weight``: the weight's grid is not widened by w0, but x0 is rounded as a channel like all others:
            Q(x) R(W') + Q(x)_0 w0. GPTQ's Hessian is that of x'.
            ``activation``: the activation's range is not widened by x0, but w0 is rounded with the other weights:
            Q(x') R(W) + x0 R(W)_0, x0 in floating point. GPTQ's Hessian is that of x.
        rms_x0_bits: Bits of w0 under ``both`` and ``weight``, symmetric, one scale per layer; None (the default) keeps
            it in floating point. Under ``activation`` w0 has the bits of the weight. x0 itself has no bits of its own:
            it is in floating point, or under ``weight`` in those of the activations.

    Raises:
        UnknownNameError: ``rms_rule`` or ``rms_side`` is unknown.
    """
    rule = _rule(session.option("rms_rule", "median"))
    side = _side(session.option("rms_side", Side.BOTH))
    for name, linear in session.linears.items():
        if not isinstance(linear.input_transform, OnlineHadamard):
            continue
        report = layer_report(session, name)
        spike, peak = eq9_sides(linear)
        report.eq9_margin = _margin(spike, peak)
        report.eq9_rules = {name: holds(spike, peak) for name, holds in RULES.items()}
        report.rms_split = rule(spike, peak)
        if report.rms_split:
            split_channel0(linear, session.option("rms_x0_bits", None), side)


def eq9_sides(linear: QuantLinear) -> tuple[Tensor, Tensor]:
    """Left and right side of Eq. 9 for every output column, in float64.

    Shapes: (out_features,) |sqrt(n) mean_i(w_ij)|, which stands in the transformed weight as channel 0, and
    (out_features,) max_i |w_ij| of the weight before the online Hadamard.
    """
    weight = linear.weight.detach()
    peaks = [_untransformed(linear, rows.double()).abs().amax(1) for rows in weight.split(ROWS_PER_BLOCK)]
    return weight[:, 0].double().abs(), torch.cat(peaks)


def split_channel0(linear: QuantLinear, x0_bits: int | None = None, side: Side = Side.BOTH) -> None:
    """Takes input channel 0 out of the activation's range, the weight or both; exact unless ``x0_bits`` rounds w0."""
    linear.x0_bypass = side is not Side.WEIGHT
    if side is Side.ACTIVATION:
        return
    weight = linear.weight.detach().clone()
    linear.x0_weight = _rounded(weight[:, 0].clone(), x0_bits)
    weight[:, 0] = 0
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)


def _untransformed(linear: QuantLinear, rows: Tensor) -> Tensor:
    """Weight rows before the online Hadamard. Shapes: (rows, padded_n) -> (rows, n)."""
    transform = linear.input_transform
    assert isinstance(transform, OnlineHadamard)
    return hadamard_transform(rows, inverse=True)[:, : transform.n]


def _margin(spike: Tensor, peak: Tensor) -> float:
    ratio = spike / peak.clamp_min(torch.finfo(peak.dtype).tiny)
    return ratio.quantile(0.5).item()


def _rounded(values: Tensor, num_bits: int | None) -> Tensor:
    """Symmetric round-to-nearest with one scale. Shapes: (out_features,) -> the same."""
    largest = values.abs().max()
    if num_bits is None or largest == 0:
        return values
    args = QuantArgs(num_bits)
    return fake_quantize(values, largest / args.quant_max, args)


def _side(name: str) -> Side:
    if name not in list(Side):
        raise UnknownNameError("RMS side", name, Side)
    return Side(name)


def _rule(name: str) -> Callable[[Tensor, Tensor], bool]:
    if name not in RULES:
        raise UnknownNameError("RMS rule", name, RULES)
    return RULES[name]
