"""The integer backend: quantized linears store and multiply integers, with the operations of ``kernels.api``.

A linear computes ``acc * s_a[row] * s_w[n] + bias + x0[row] * w0[n]`` from int8 activations and int8 or packed 4-bit
weights, or, where only the weight is quantized, from packed 4-bit weights in groups. That is what the simulated backend
computes, but for the rounding of floating-point sums. What the operations do not cover stays simulated, with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mqbench.harness.quant.activation import InputQuantizer
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.scheme import Strategy, Tokens
from mqbench.harness.quant.transforms import OnlineHadamard
from mqbench.harness.quant.weight import WeightGrid, dequantize, exact_levels
from mqbench.kernels import api
from mqbench.kernels.checks import FLOAT_DTYPES, MAX_BITS
from mqbench.kernels.packing import unpack_int4

PACKED_BITS = 4
"""Weights of up to so many bits are packed, two per byte."""


@dataclass(frozen=True)
class BackendReport:
    """What runs in integers.

    Attributes:
        integer: Linears with integer weights in memory.
        simulated: Linears that stay simulated, with the reason.
        floating: Linears that are not quantized.
    """

    integer: tuple[str, ...]
    simulated: Mapping[str, str]
    floating: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Something runs in integers, and nothing that is quantized is simulated."""
        return bool(self.integer) and not self.simulated


class IntegerWeight(nn.Module):
    """Integer levels of a linear's weight, with what its output needs.

    Its buffers are not saved: ``serialize`` writes levels of its own.

    Attributes:
        levels: (out_features, in_features) int8, or packed by ``pack_int4`` with half as many columns, uint8.
        scale: (out_features, groups) float32, or float64 in a float64 model.
        zero_point: The same shape and dtype, on the grid of the stored levels; None when symmetric.
        w0: (out_features,) weights of the input channel 0 that the layer adds as a rank-1 term, or None.
    """

    levels: Tensor
    scale: Tensor
    zero_point: Tensor | None
    w0: Tensor | None

    def __init__(self, linear: QuantLinear, levels: Tensor) -> None:
        super().__init__()
        assert linear.weight_args is not None and linear.weight_scale is not None
        self.packed = linear.weight_args.num_bits <= PACKED_BITS and linear.in_features % 2 == 0
        self.offset = 0 if linear.weight_args.symmetric else 2 ** (PACKED_BITS - 1)
        stored = (levels - self.offset).to(torch.int8).contiguous()
        zero_point, w0 = linear.weight_zero_point, linear.x0_weight
        if w0 is None and linear.x0_bypass:
            w0 = linear.weight.detach()[:, 0].clone()
        for name, tensor in (
            ("levels", api.pack_int4(stored) if self.packed else stored),
            ("scale", linear.weight_scale),
            ("zero_point", None if zero_point is None else zero_point - self.offset),
            ("w0", w0),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, linear: QuantLinear, x: Tensor) -> Tensor:
        """The output of ``linear`` for rows (see ``QuantLinear.as_rows``).

        Shapes: (..., in_features before the transform) -> (..., out_features).
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        compute = self._weight_only if linear.input_quantizer is None else self._integer
        return compute(linear, rows).view(*x.shape[:-1], -1)

    def unpacked(self) -> Tensor:
        """Levels on the grid of the linear, (out_features, in_features) int32."""
        levels = unpack_int4(self.levels) if self.packed else self.levels
        return levels.int() + self.offset

    def _integer(self, linear: QuantLinear, rows: Tensor) -> Tensor:
        quantizer = linear.input_quantizer
        assert quantizer is not None
        scale, row_index = static_scale(quantizer)
        levels, row_scale, x0 = _quantize(linear, rows, scale, row_index, quantizer.args.num_bits)
        row_scale = row_scale if scale is None else scale
        if self.w0 is not None and not linear.x0_bypass:  # x0 as the quantizer left it
            x0 = levels[:, 0] * (row_scale if row_index is None else row_scale[row_index.int()])
        multiply = api.linear_int4 if self.packed else api.linear_int8
        return multiply(
            levels, self.levels, row_scale, self.scale[:, 0], row_index, linear.bias, x0, self.w0, rows.dtype
        )

    def _weight_only(self, linear: QuantLinear, rows: Tensor) -> Tensor:
        x = rows if linear.input_transform is None else linear.input_transform(rows)
        x0 = x[:, :1]
        if linear.x0_bypass:
            x = _without_channel0(x)
        assert linear.weight_args is not None
        group_size = linear.weight_args.group_size or x.shape[1]
        y = api.weight_only_int4(x, self.levels, self.scale, self.zero_point, group_size, linear.bias)
        return y if self.w0 is None else y + x0 * self.w0


def use_integer_backend(model: nn.Module) -> BackendReport:
    """Turns every quantized linear that the operations cover into integers, in place, and frees its float weight.

    Linears that run in integers already stay as they are.
    """
    linears = quant_linears(model)
    reasons: dict[str, str] = {}
    for name, linear in linears.items():
        if linear.integer is None and (reason := _turn_into_integers(linear)) is not None:
            reasons[name] = reason
    floating = tuple(name for name in reasons if _is_floating(linears[name]))
    return BackendReport(
        integer=tuple(name for name in linears if name not in reasons),
        simulated={name: reason for name, reason in reasons.items() if name not in floating},
        floating=floating,
    )


def use_simulated_backend(model: nn.Module) -> None:
    """The inverse of ``use_integer_backend``: every float weight is back, to the last bit."""
    for linear in quant_linears(model).values():
        if linear.integer is not None:
            linear.weight = nn.Parameter(_float_weight(linear), requires_grad=False)
            linear.integer = None


@contextmanager
def simulated_weights(model: nn.Module) -> Iterator[None]:
    """While this is open, all linears are simulated and have float weights."""
    kept = {name: linear.integer for name, linear in quant_linears(model).items() if linear.integer is not None}
    use_simulated_backend(model)
    try:
        yield
    finally:
        for name, integer in kept.items():
            _install(quant_linears(model)[name], integer)


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every ``QuantLinear`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def static_scale(quantizer: InputQuantizer) -> tuple[Tensor | None, Tensor | None]:
    """Static scales for the running pass and each row's index into them; (None, None) for per-token scales.

    Shapes: (1,) and None, or (2,) as (text, visual) and (rows,) uint8.
    """
    if quantizer.args.dynamic:
        return None, None
    if len(quantizer.scale) == 1 or quantizer.context is None or quantizer.visual is None:
        return quantizer.scale[:1], None
    return quantizer.scale, quantizer.context.row_index()


def why_not_integer(linear: QuantLinear) -> str | None:
    """Why a linear cannot run in integers, as far as its settings say; None when it can."""
    args, quantizer = linear.weight_args, linear.input_quantizer
    if args is None:
        return "its weight is in floating point"
    if linear.weight.dtype not in FLOAT_DTYPES and linear.weight.device.type != "cpu":
        return f"its dtype is {str(linear.weight.dtype).removeprefix('torch.')}"
    if quantizer is None:
        if args.num_bits > PACKED_BITS or linear.in_features % 2:
            return f"its activations are in floating point, and weights of {args.num_bits} bits are not packed"
        return None
    if args.strategy is not Strategy.CHANNEL or not args.symmetric or args.num_bits > MAX_BITS:
        return "its weight is not on a symmetric grid of up to 8 bits with one scale per output channel"
    return _why_not_quantizable(quantizer)


def _why_not_quantizable(quantizer: InputQuantizer) -> str | None:
    if quantizer.args.num_bits > MAX_BITS:
        return f"its activations have {quantizer.args.num_bits} bits"
    if quantizer.tokens is not Tokens.ALL:
        return f"only its {quantizer.tokens} tokens have quantized activations"
    if quantizer.observing or not quantizer.enabled or not (quantizer.args.dynamic or len(quantizer.scale)):
        return "its activations are not calibrated"
    return None


def _turn_into_integers(linear: QuantLinear) -> str | None:
    """Returns the reason when it cannot."""
    reason = why_not_integer(linear)
    if reason is not None:
        return reason
    levels = exact_levels(linear)
    if levels is None:
        return "a later step moved its weight off its grid"
    _install(linear, IntegerWeight(linear, levels))
    return None


def _install(linear: QuantLinear, integer: IntegerWeight) -> None:
    """Puts the integers in and frees the float weight: one NaN, seen with the weight's shape, remains of it."""
    missing = torch.full((), torch.nan, dtype=linear.weight.dtype, device=linear.weight.device)
    linear.weight = nn.Parameter(missing.expand(linear.weight.shape), requires_grad=False)
    linear.integer = integer


def _float_weight(linear: QuantLinear) -> Tensor:
    assert linear.integer is not None and linear.weight_args is not None and linear.weight_scale is not None
    grid = WeightGrid(linear.weight_scale, linear.weight_zero_point)
    return dequantize(linear.integer.unpacked(), grid, linear.weight_args, linear.weight.dtype)


def _quantize(
    linear: QuantLinear, rows: Tensor, scale: Tensor | None, row_index: Tensor | None, num_bits: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels, per-token scales (empty when static) and, where it passes by the quantizer, x0."""
    transform = linear.input_transform
    if isinstance(transform, OnlineHadamard):
        levels, row_scale, channel0 = api.hadamard_quantize(rows, scale, row_index, linear.x0_bypass, num_bits)
        return levels, row_scale, channel0 if linear.x0_bypass else None
    x = rows if transform is None else transform(rows).contiguous()
    x0 = x[:, 0].clone() if linear.x0_bypass else None
    x = x if x0 is None else _without_channel0(x)
    if scale is None:
        return *api.quantize_token(x, num_bits), x0
    return api.quantize_static(x, scale, row_index, num_bits), scale.new_empty(0), x0


def _without_channel0(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1)


def _is_floating(linear: QuantLinear) -> bool:
    return linear.weight_args is None and linear.input_quantizer is None
