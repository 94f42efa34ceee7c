"""Quantized operations for inference: each checks its arguments and runs on their device.

Levels are symmetric: ``clamp(round_half_to_even(x / scale), -2^(b-1), 2^(b-1) - 1)`` (paper Eq. 2), divided in
float32. ``scale`` is a static scale, (1,) for all rows or (S,) with ``row_index`` (M,) uint8 below S saying whose a row
is (MSQ: 0 text, 1 visual); ``scale=None`` is one dynamic scale per row (token), ``amax / (2^(b-1) - 1)``, 1 for a row
of zeros. NaN becomes level 0 under a static scale and makes a per-token scale NaN. All tensors are contiguous and on
one device; M may be 0. On the CPU float64 may stand in for float32, scales included, and is then computed in.

Every function raises TypeError (another dtype) or ValueError (another shape or device, not contiguous, a number out of
range), and the message names the argument. None of them is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mqbench.kernels.checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_epilogue,
    check_matrix,
    check_num_bits,
    check_packed,
    check_scale,
    check_transformed,
    check_vector,
)
from mqbench.kernels.ops import OPS

GELU_KINDS = ("gelu", "gelu_tanh", "quick_gelu")


def quantize_static(x: Tensor, scale: Tensor, row_index: Tensor | None = None, num_bits: int = 8) -> Tensor:
    """Levels under static scales, per tensor or per row (MSQ, paper Sec. 3.2).

    Args:
        x: (M, K) float16, bfloat16 or float32.
        scale: (1,) float32, or (S,) with ``row_index``.
        row_index: (M,) uint8, or None.
        num_bits: 2 to 8.

    Returns:
        (M, K) int8.
    """
    check_matrix("x", x, FLOAT_DTYPES)
    check_dtype("scale", scale, (torch.float32,))
    check_scale(x, scale, row_index)
    check_num_bits(num_bits)
    return OPS["quantize_static"](x, scale, row_index, num_bits)


def quantize_token(x: Tensor, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Levels under one dynamic scale per row.

    Args:
        x: (M, K) float16, bfloat16 or float32.
        num_bits: 2 to 8.

    Returns:
        (M, K) int8 and (M,) float32 scales.
    """
    check_matrix("x", x, FLOAT_DTYPES)
    check_num_bits(num_bits)
    return OPS["quantize_token"](x, num_bits)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    row_index: Tensor | None = None,
    residual: Tensor | None = None,
    num_bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """``s = x + residual; y = s / sqrt(mean(s^2) + eps) * weight``, quantized.

    Like the modules that it fuses, it rounds to the dtype of ``x`` after the sum, after normalizing (in float32) and
    after the weight.

    Args:
        x: (M, K) float16, bfloat16 or float32.
        weight: (K,) in the dtype of ``x``, or None for ones.
        eps: Added to the mean square.
        scale: Static scales, or None for per-token ones.
        row_index: Index into ``scale``, or None.
        residual: (M, K) in the dtype of ``x``, or None.
        num_bits: 2 to 8.

    Returns:
        (M, K) int8; (M,) float32 row scales, empty when static; (M, K) ``s``, empty without ``residual``.
    """
    check_matrix("x", x, FLOAT_DTYPES)
    if weight is not None:
        check_vector("weight", weight, (x.dtype,), (x.shape[1],), like=x)
    if residual is not None:
        check_matrix("residual", residual, (x.dtype,), x.shape[0], x.shape[1], like=x)
    check_scale(x, scale, row_index)
    check_num_bits(num_bits)
    return OPS["rms_norm_quantize"](x, weight, eps, scale, row_index, residual, num_bits)


def silu_mul_quantize(
    gate: Tensor, up: Tensor, scale: Tensor | None = None, row_index: Tensor | None = None, num_bits: int = 8
) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up``, quantized; rounds to the dtype of ``gate`` after SiLU (in float32) and after the product.

    Args:
        gate: (M, K) float16, bfloat16 or float32.
        up: The same shape and dtype.
        scale: Static scales, or None for per-token ones.
        row_index: Index into ``scale``, or None.
        num_bits: 2 to 8.

    Returns:
        (M, K) int8; (M,) float32 row scales, empty when static.
    """
    check_matrix("gate", gate, FLOAT_DTYPES)
    check_matrix("up", up, (gate.dtype,), gate.shape[0], gate.shape[1], like=gate)
    check_scale(gate, scale, row_index)
    check_num_bits(num_bits)
    return OPS["silu_mul_quantize"](gate, up, scale, row_index, num_bits)


def gelu_quantize(
    x: Tensor, kind: str = "gelu", scale: Tensor | None = None, row_index: Tensor | None = None, num_bits: int = 8
) -> tuple[Tensor, Tensor]:
    """GELU, quantized; computed in float32 and rounded to the dtype of ``x`` before it is quantized.

    Args:
        x: (M, K) float16, bfloat16 or float32.
        kind: ``gelu`` (erf), ``gelu_tanh``, or ``quick_gelu``: ``x * sigmoid(1.702 x)``.
        scale: Static scales, or None for per-token ones.
        row_index: Index into ``scale``, or None.
        num_bits: 2 to 8.

    Returns:
        (M, K) int8; (M,) float32 row scales, empty when static.
    """
    check_matrix("x", x, FLOAT_DTYPES)
    if kind not in GELU_KINDS:
        raise ValueError(f"kind must be {' or '.join(GELU_KINDS)}, got '{kind}'")
    check_scale(x, scale, row_index)
    check_num_bits(num_bits)
    return OPS["gelu_quantize"](x, kind, scale, row_index, num_bits)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Hadamard transform of each row (paper Sec. 3.4), zero-padded where no Hadamard matrix of K is known.

    Accumulates in float32 and rounds once.

    Args:
        x: (M, K) float16, bfloat16 or float32, K at least 1.

    Returns:
        (M, ``kernels.hadamard.padded_size(K)``) in the dtype of ``x``.
    """
    check_transformed(x)
    return OPS["hadamard"](x)


def hadamard_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    row_index: Tensor | None = None,
    take_x0: bool = False,
    num_bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hadamard transform as in ``hadamard``, rounded to the dtype of ``x`` and quantized.

    Args:
        x: (M, K) float16, bfloat16 or float32, K at least 1.
        scale: Static scales, or None for per-token ones.
        row_index: Index into ``scale``, or None.
        take_x0: Channel 0 of the transformed rows comes out in floating point (RMS, paper Sec. 3.4); it is 0 in the
            levels, and a per-token scale does not see it.
        num_bits: 2 to 8.

    Returns:
        (M, padded K) int8; (M,) float32 row scales, empty when static; (M,) channel 0 in the dtype of ``x``, empty
        unless taken.
    """
    check_transformed(x)
    check_scale(x, scale, row_index)
    check_num_bits(num_bits)
    return OPS["hadamard_quantize"](x, scale, row_index, take_x0, num_bits)


def pack_int4(levels: Tensor) -> Tensor:
    """Two signed 4-bit levels per byte, in planar halves.

    Args:
        levels: (N, K) int8 in [-8, 7], K even. Other values lose their upper bits; nobody looks.

    Returns:
        (N, K/2) uint8; byte j of a row holds column j in its low nibble and column j + K/2 in its high one.
    """
    check_matrix("levels", levels, (torch.int8,))
    if levels.shape[1] % 2:
        raise ValueError(f"levels must have an even number of columns, got {levels.shape[1]}; add one of zeros")
    return OPS["pack_int4"](levels)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of ``pack_int4``.

    Shapes: (N, K/2) uint8 -> (N, K) int8.
    """
    check_matrix("packed", packed, (torch.uint8,))
    return OPS["unpack_int4"](packed)


def linear_int8(
    x_q: Tensor,
    w_q: Tensor,
    row_scale: Tensor,
    w_scale: Tensor,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    x0: Tensor | None = None,
    w0: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Integer matrix product with its epilogue, ``acc * s_a[row] * s_w[n] + bias[n] + x0[row] * w0[n]``.

    ``acc = x_q @ w_q.T`` is exact in int32 for K < 2^17. The epilogue runs in float32 and rounds once.

    Args:
        x_q: (M, K) int8.
        w_q: (N, K) int8.
        row_scale: float32: (M,) one per row, (1,) one for all, or (S,) with ``row_index``.
        w_scale: (N,) float32.
        row_index: (M,) uint8 index of each row into ``row_scale``, or None.
        bias: (N,) floating point, or None.
        x0: (M,) floating point, the input channel that RMS keeps out of the product, or None.
        w0: (N,) floating point, its weights; given with ``x0`` and only with it.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        (M, N) of ``out_dtype``.
    """
    check_matrix("x_q", x_q, (torch.int8,))
    check_matrix("w_q", w_q, (torch.int8,), columns=x_q.shape[1], like=x_q)
    check_epilogue(x_q, w_q.shape[0], row_scale, w_scale, row_index, bias, x0, w0, out_dtype)
    return OPS["linear_int8"](x_q, w_q, row_scale, w_scale, row_index, bias, x0, w0, out_dtype)


def linear_int4(
    x_q: Tensor,
    w_packed: Tensor,
    row_scale: Tensor,
    w_scale: Tensor,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    x0: Tensor | None = None,
    w0: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """``linear_int8`` with 4-bit weights; what is not listed here is the same.

    Args:
        x_q: (M, K) int8, K even.
        w_packed: (N, K/2) uint8, written by ``pack_int4``.
    """
    check_matrix("x_q", x_q, (torch.int8,))
    check_packed(w_packed, "x_q", x_q)
    check_epilogue(x_q, w_packed.shape[0], row_scale, w_scale, row_index, bias, x0, w0, out_dtype)
    return OPS["linear_int4"](x_q, w_packed, row_scale, w_scale, row_index, bias, x0, w0, out_dtype)


def weight_only_int4(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    zero_point: Tensor | None = None,
    group_size: int = 128,
    bias: Tensor | None = None,
) -> Tensor:
    """Product with 4-bit weights in groups along K and floating-point activations (AWQ, GPTQ).

    The weight is ``(level - zero_point) * scale`` in float32, rounded once to the dtype of ``x``.

    Args:
        x: (M, K) float16, bfloat16 or float32, K even.
        w_packed: (N, K/2) uint8, written by ``pack_int4``. An unsigned level u in [0, 15] is stored as u - 8.
        w_scale: (N, ceil(K / group_size)) float32; the last group may be shorter.
        zero_point: The same shape, whole float32 numbers on the grid of the stored levels (an unsigned zero point
            minus 8), or None for a symmetric grid.
        group_size: Input channels per scale, at least 1.
        bias: (N,) floating point, or None.

    Returns:
        (M, N) in the dtype of ``x``.
    """
    check_matrix("x", x, FLOAT_DTYPES)
    check_packed(w_packed, "x", x)
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    shape = w_packed.shape[0], -(-x.shape[1] // group_size)
    check_matrix("w_scale", w_scale, (torch.float32,), *shape, like=x)
    if zero_point is not None:
        check_matrix("zero_point", zero_point, (torch.float32,), *shape, like=x)
    if bias is not None:
        check_vector("bias", bias, FLOAT_DTYPES, shape[:1], like=x)
    return OPS["weight_only_int4"](x, w_packed, w_scale, zero_point, group_size, bias)
