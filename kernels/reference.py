"""Naive references: one function per operation of ``api``, one row at a time, with nothing taken from the kernels.

Floating-point steps run in ``dtype``. With float64 the result is the truth that kernels are compared with; with a
kernel's own dtype it shows the error that this dtype cannot avoid.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mqbench.kernels.hadamard import hadamard_matrix, padded_size


def quantize_static(x: Tensor, scale: Tensor, row_index: Tensor | None = None, num_bits: int = 8) -> Tensor:
    """(M, K) int8."""
    rows = [0] * len(x) if row_index is None else row_index.tolist()
    levels = [_levels(row, scale[index], num_bits) for row, index in zip(x, rows, strict=True)]
    return torch.stack(levels) if levels else torch.empty(x.shape, dtype=torch.int8)


def quantize_token(x: Tensor, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    """(M, K) int8 and (M,) float32."""
    scales = torch.tensor([_token_scale(row, num_bits) for row in x], dtype=torch.promote_types(x.dtype, torch.float32))
    levels = [_levels(row, scale, num_bits) for row, scale in zip(x, scales, strict=True)]
    return torch.stack(levels) if levels else torch.empty(x.shape, dtype=torch.int8), scales


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``(x + residual) / rms * weight``, (M, K), every step in ``dtype``."""
    total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    rows = [row / torch.sqrt((row * row).sum() / len(row) + eps) for row in total]
    y = torch.stack(rows) if rows else total
    return y if weight is None else y * weight.to(dtype)


def silu_mul(gate: Tensor, up: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``gate / (1 + exp(-gate)) * up``, (M, K), every step in ``dtype``."""
    wide = gate.to(dtype)
    return wide / (1 + torch.exp(-wide)) * up.to(dtype)


def gelu(x: Tensor, kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """(M, K), every step in ``dtype``; ``kind`` as in ``api.gelu_quantize``."""
    wide = x.to(dtype)
    if kind == "quick_gelu":
        return wide / (1 + torch.exp(-1.702 * wide))
    if kind == "gelu_tanh":
        return 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    return 0.5 * wide * (1 + torch.erf(wide / math.sqrt(2)))


def hadamard(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """(M, padded K): the product with the dense matrix, in ``dtype``."""
    padded = torch.zeros(x.shape[0], padded_size(x.shape[1]), dtype=dtype, device=x.device)
    padded[:, : x.shape[1]] = x
    return padded @ hadamard_matrix(padded.shape[1], dtype, x.device).T


def quantize(
    y: Tensor, scale: Tensor | None = None, row_index: Tensor | None = None, num_bits: int = 8
) -> tuple[Tensor, Tensor]:
    """What every fused operation does with its floating-point result: levels, and row scales or an empty tensor."""
    if scale is None:
        return quantize_token(y, num_bits)
    return quantize_static(y, scale, row_index, num_bits), torch.empty(0)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    row_index: Tensor | None = None,
    residual: Tensor | None = None,
    num_bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, row scales or empty, ``x + residual`` or empty."""
    total = x if residual is None else x + residual
    y = rms_norm(total, None, eps, dtype=torch.float32).to(x.dtype)
    levels, row_scale = quantize(y if weight is None else y * weight, scale, row_index, num_bits)
    return levels, row_scale, torch.empty(0, dtype=x.dtype) if residual is None else total


def silu_mul_quantize(
    gate: Tensor, up: Tensor, scale: Tensor | None = None, row_index: Tensor | None = None, num_bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Levels, row scales or empty."""
    activated = silu_mul(gate, torch.ones_like(gate), torch.float32).to(gate.dtype)
    return quantize(activated * up, scale, row_index, num_bits)


def gelu_quantize(
    x: Tensor, kind: str = "gelu", scale: Tensor | None = None, row_index: Tensor | None = None, num_bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Levels, row scales or empty."""
    return quantize(gelu(x, kind, torch.float32).to(x.dtype), scale, row_index, num_bits)


def hadamard_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    row_index: Tensor | None = None,
    take_x0: bool = False,
    num_bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, row scales or empty, channel 0 or empty."""
    y = hadamard(x, torch.float32).to(x.dtype)
    x0 = y[:, 0].clone() if take_x0 else y.new_empty(0)
    if take_x0:
        y[:, 0] = 0
    return *quantize(y, scale, row_index, num_bits), x0


def pack_int4(levels: Tensor) -> Tensor:
    """(N, K) int8 -> (N, K/2) uint8, byte by byte."""
    half = levels.shape[1] // 2
    rows = [[(row[j] & 15) | ((row[j + half] & 15) << 4) for j in range(half)] for row in levels.tolist()]
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(levels), half)


def unpack_int4(packed: Tensor) -> Tensor:
    """(N, K/2) uint8 -> (N, K) int8, nibble by nibble."""
    rows = [[byte & 15 for byte in row] + [byte >> 4 for byte in row] for row in packed.tolist()]
    signed = [[nibble - 16 if nibble > 7 else nibble for nibble in row] for row in rows]
    return torch.tensor(signed, dtype=torch.int8).reshape(len(packed), 2 * packed.shape[1])


def int_matmul(x_q: Tensor, w_q: Tensor) -> Tensor:
    """(M, N) int64 ``x_q @ w_q.T``."""
    rows = [(row.long() * w_q.long()).sum(1) for row in x_q]
    return torch.stack(rows) if rows else torch.empty(0, len(w_q), dtype=torch.int64)


def linear_int8(
    x_q: Tensor,
    w_q: Tensor,
    row_scale: Tensor,
    w_scale: Tensor,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    x0: Tensor | None = None,
    w0: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``acc * s_a[row] * s_w[n] + bias + x0[row] * w0[n]``, the epilogue in ``dtype``."""
    rows = row_scale if row_index is None else row_scale[row_index.long()]
    y = int_matmul(x_q, w_q).to(dtype) * rows.to(dtype)[:, None] * w_scale.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if x0 is not None and w0 is not None:
        y = y + x0.to(dtype)[:, None] * w0.to(dtype)
    return y


def linear_int4(
    x_q: Tensor,
    w_packed: Tensor,
    row_scale: Tensor,
    w_scale: Tensor,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    x0: Tensor | None = None,
    w0: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``linear_int8`` on the unpacked weight."""
    return linear_int8(x_q, unpack_int4(w_packed), row_scale, w_scale, row_index, bias, x0, w0, dtype)


def weight_only_int4(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    zero_point: Tensor | None = None,
    group_size: int = 128,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``x @ W.T + bias`` in ``dtype``, W in the dtype of ``x``, column by column."""
    levels = unpack_int4(w_packed).float()
    columns = []
    for k in range(levels.shape[1]):
        zero = 0 if zero_point is None else zero_point[:, k // group_size]
        columns.append(((levels[:, k] - zero) * w_scale[:, k // group_size]).to(x.dtype))
    y = x.to(dtype) @ torch.stack(columns).to(dtype)
    return y if bias is None else y + bias.to(dtype)


def aifs_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    query_valid: Tensor,
    key_valid: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """(B, H, T_q, D): softmax attention in ``dtype``, one query of one head at a time."""
    out = torch.zeros(q.shape, dtype=dtype)
    group = q.shape[1] // k.shape[1]
    for batch, head, query in np.ndindex(*q.shape[:3]):
        seen = key_valid[batch] & (key_position[batch] <= query_position[batch, query])
        if query_valid[batch, query] and seen.any():
            keys, values = (x[batch, head // group, seen].to(dtype) for x in (k, v))
            weights = torch.exp((scores := keys @ q[batch, head, query].to(dtype) * q.shape[3] ** -0.5) - scores.max())
            out[batch, head, query] = weights / weights.sum() @ values
    return out


def _levels(row: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """(K,) int8; numpy divides in float32 (float64 in its own) and rounds half to even."""
    largest = 2 ** (num_bits - 1)
    wide = _wide_array(row)
    levels = np.rint(wide / wide.dtype.type(scale.item()))
    return torch.from_numpy(np.clip(np.nan_to_num(levels), -largest, largest - 1).astype(np.int8))


def _token_scale(row: Tensor, num_bits: int) -> float:
    amax = np.abs(_wide_array(row)).max()
    return 1.0 if amax == 0 else float(amax / amax.dtype.type(2 ** (num_bits - 1) - 1))


def _wide_array(row: Tensor) -> np.ndarray:
    return row.to(torch.promote_types(row.dtype, torch.float32)).numpy()
