"""Exact CPU implementations of the operations in ``api``, in plain torch.

Integer products are float32 matrix products over chunks of the inner dimension, short enough that every partial sum is
a whole number below 2^24: exact whatever the order of summation, unlike oneDNN's int8, which saturates without VNNI.

Where the operations say float32, float64 tensors are computed in float64: two backends that agree there compute the
same function, and what they differ by in float32 is rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.kernels.hadamard import hadamard_transform, padded_size
from mqbench.kernels.packing import unpack_int4

EXACT_FLOAT32 = 1 << 24
"""Whole numbers up to this are exact in float32."""

INT8_LEVELS, INT4_LEVELS = 128, 8
"""Largest magnitude of a level."""

GELU_TANH, QUICK_GELU = "gelu_tanh", "quick_gelu"
QUICK_GELU_SLOPE = 1.702


def quantize_static(x: Tensor, scale: Tensor, row_index: Tensor | None, num_bits: int) -> Tensor:
    return _to_levels(x, _rows(scale, row_index), num_bits)


def quantize_token(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    quant_max = 2 ** (num_bits - 1) - 1
    amax = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    scale = _wide(amax) / quant_max
    scale = torch.where(scale == 0, 1.0, scale)  # not "> 0 keeps": a NaN must stay one
    return _to_levels(x, scale[:, None], num_bits), scale


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None,
    row_index: Tensor | None,
    residual: Tensor | None,
    num_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = _wide(total)
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight is not None:
        y = y * weight
    levels, row_scale = _quantize(y, scale, row_index, num_bits)
    return levels, row_scale, x.new_empty(0) if residual is None else total


def silu_mul_quantize(
    gate: Tensor, up: Tensor, scale: Tensor | None, row_index: Tensor | None, num_bits: int
) -> tuple[Tensor, Tensor]:
    return _quantize(F.silu(gate) * up, scale, row_index, num_bits)


def gelu_quantize(
    x: Tensor, kind: str, scale: Tensor | None, row_index: Tensor | None, num_bits: int
) -> tuple[Tensor, Tensor]:
    return _quantize(_gelu(x, kind), scale, row_index, num_bits)


def hadamard(x: Tensor) -> Tensor:
    missing = padded_size(x.shape[1]) - x.shape[1]
    return hadamard_transform(F.pad(x, (0, missing)) if missing else x)


def hadamard_quantize(
    x: Tensor, scale: Tensor | None, row_index: Tensor | None, take_x0: bool, num_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    y = hadamard(x)
    x0 = y.new_empty(0)
    if take_x0:
        x0 = y[:, 0].clone()
        y[:, 0] = 0
    levels, row_scale = _quantize(y, scale, row_index, num_bits)
    return levels, row_scale, x0


def linear_int8(
    x_q: Tensor,
    w_q: Tensor,
    row_scale: Tensor,
    w_scale: Tensor,
    row_index: Tensor | None,
    bias: Tensor | None,
    x0: Tensor | None,
    w0: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    accumulator = int_matmul(x_q, w_q, INT8_LEVELS)
    return _epilogue(accumulator, row_scale, w_scale, row_index, bias, x0, w0, out_dtype)


def linear_int4(
    x_q: Tensor,
    w_packed: Tensor,
    row_scale: Tensor,
    w_scale: Tensor,
    row_index: Tensor | None,
    bias: Tensor | None,
    x0: Tensor | None,
    w0: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    accumulator = int_matmul(x_q, unpack_int4(w_packed), INT4_LEVELS)
    return _epilogue(accumulator, row_scale, w_scale, row_index, bias, x0, w0, out_dtype)


def weight_only_int4(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, zero_point: Tensor | None, group_size: int, bias: Tensor | None
) -> Tensor:
    weight = dequantize_int4(w_packed, w_scale, zero_point, group_size, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def dequantize_int4(
    w_packed: Tensor, w_scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """(N, K) weight ``(level - zero_point) * scale`` in the scale's dtype, rounded once to ``dtype``; on any device."""
    levels = unpack_int4(w_packed).to(w_scale.dtype)
    group = torch.arange(levels.shape[1], device=levels.device) // group_size
    if zero_point is not None:
        levels -= zero_point[:, group]
    return (levels * w_scale[:, group]).to(dtype)


def int_matmul(x_q: Tensor, w_q: Tensor, largest_weight: int) -> Tensor:
    """``x_q @ w_q.T`` in exact int32.

    Args:
        x_q: (M, K) int8.
        w_q: (N, K) int8 of magnitude at most ``largest_weight``.
        largest_weight: A smaller bound allows longer, faster chunks.
    """
    step = EXACT_FLOAT32 // (INT8_LEVELS * largest_weight)
    accumulator = torch.zeros(len(x_q), len(w_q), dtype=torch.int32, device=x_q.device)
    for start in range(0, x_q.shape[1], step):
        columns = slice(start, start + step)
        accumulator += (x_q[:, columns].float() @ w_q[:, columns].float().T).to(torch.int32)
    return accumulator


def _quantize(y: Tensor, scale: Tensor | None, row_index: Tensor | None, num_bits: int) -> tuple[Tensor, Tensor]:
    if scale is None:
        return quantize_token(y, num_bits)
    return quantize_static(y, scale, row_index, num_bits), _wide(y.new_empty(0))


def _rows(scale: Tensor, row_index: Tensor | None) -> Tensor:
    """(1,) for all rows, or (M, 1)."""
    return scale if row_index is None else scale[row_index.int()][:, None]


def _to_levels(x: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    largest = 2 ** (num_bits - 1)
    wide = _wide(x)
    levels = (wide / scale.to(wide.dtype)).round_().nan_to_num_(0.0, largest - 1, -largest)
    return levels.clamp_(-largest, largest - 1).to(torch.int8)


def _gelu(x: Tensor, kind: str) -> Tensor:
    if kind == QUICK_GELU:
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    return F.gelu(x, approximate="tanh" if kind == GELU_TANH else "none")


def _epilogue(
    accumulator: Tensor,
    row_scale: Tensor,
    w_scale: Tensor,
    row_index: Tensor | None,
    bias: Tensor | None,
    x0: Tensor | None,
    w0: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """In float32, rounded once at the end."""
    wide = torch.promote_types(out_dtype, torch.float32)
    rows = _rows(row_scale, row_index) if row_index is not None else row_scale[:, None]
    y = accumulator.to(wide).mul_(rows).mul_(w_scale)
    if bias is not None:
        y += bias
    if x0 is not None and w0 is not None:
        y.addcmul_(x0[:, None].to(wide), w0.to(wide))
    return y.to(out_dtype)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
