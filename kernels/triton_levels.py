"""Device functions that quantizing kernels share: scales, levels and activations. Values are float32 in between."""

from __future__ import annotations

import triton
import triton.language as tl

from mqbench.kernels.triton_epilogue import INTERPRETED, to_dtype

INPUT = "input"
"""The kind of `activate` that takes ``x`` as it is; the others are ``silu_mul`` and ``api.GELU_KINDS``."""

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a number of magnitude up to 2^22 it leaves the number, rounded half to even, in the low bits."""


BOUND = tl.constexpr(4096.0)
"""Dividends are cut off here: with divisors below 4 the quotient is past every level, and infinity stays out."""


@triton.jit
def fused(a, b, c):
    """``a * b + c``, rounded once."""
    if INTERPRETED:
        y = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        y = tl.fma(a, b, c)
    return y


@triton.jit
def quotient(y, scale):
    """``y / scale`` as IEEE rounds it, NaN as 0, quotients past 1024 as something past 1024; ``scale`` > 0 is a scalar.

    Five operations per element where a correctly rounded division takes about fifteen and a branch. Both are multiplied
    by the power of two that takes the scale near 1. The product with the reciprocal is off by two units in the last
    place at most, the first correction leaves less than one, and the second rounds correctly (Markstein, "Computation
    of elementary functions on the IBM RISC System/6000 processor", 1990, theorem 8.3).
    """
    exponent = (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
    power = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    divisor = scale * power
    reciprocal = tl.div_rn(1.0, divisor)
    dividend = y * power
    dividend = tl.where(dividend == dividend, dividend, 0.0)
    dividend = tl.minimum(tl.maximum(dividend, -BOUND), BOUND)
    q = dividend * reciprocal
    q = fused(fused(-q, divisor, dividend), reciprocal, q)
    return fused(fused(-q, divisor, dividend), reciprocal, q)


@triton.jit
def to_levels(y, scale, LARGEST: tl.constexpr):
    """``clamp(round_half_to_even(y / scale), -LARGEST, LARGEST - 1)`` int8; NaN becomes 0. ``scale`` is a scalar."""
    q = tl.minimum(tl.maximum(quotient(y, scale), -LARGEST), LARGEST - 1)  # whole bounds: no rounding changes
    return (q + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)  # the low byte


@triton.jit
def static_scale(scale, row_index, row):
    """The row's entry of a table of scales, or the only one."""
    if row_index is None:
        value = tl.load(scale)
    else:
        value = tl.load(scale + tl.load(row_index + row).to(tl.int32))
    return value


@triton.jit
def largest_magnitude(y):
    """Bits of the largest ``|y|`` as a float32: ordered like the numbers, with NaN above all, which maxima drop."""
    if y.dtype == tl.float32:
        peak = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    else:
        bits = tl.max((y.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32))
        peak = bits.to(tl.int16).to(y.dtype, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return peak


@triton.jit
def token_scale(peak, LARGEST: tl.constexpr):
    """Scale of a row from `largest_magnitude`; 1 for a row of zeros."""
    scale = tl.div_rn(peak.to(tl.float32, bitcast=True), LARGEST - 1.0)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def sigmoid(x):
    """Never overflows."""
    z = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def activate(x, up, offsets, mask, KIND: tl.constexpr):
    """Float32 input of the quantizer, rounded to the dtype of ``x``: x, or an activation of it. 0 where masked."""
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if KIND == "silu_mul":
        value = to_dtype(value * sigmoid(value), x.dtype.element_ty).to(tl.float32)
        value *= tl.load(up + offsets, mask=mask, other=0.0).to(tl.float32)
    elif KIND == "gelu":
        value *= 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        value *= sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    elif KIND == "quick_gelu":
        value *= sigmoid(1.702 * value)
    if KIND != "input":
        value = to_dtype(value, x.dtype.element_ty).to(tl.float32)
    return value
