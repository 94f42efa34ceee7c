"""Chooses kernel and tile sizes for a product, and the CUDA side of the linear operations of ``ops``.

``choose`` and ``choose_weight_only`` are pure functions of the shape and the GPU's compute capability: nothing is tuned
at run time, so results, times and CUDA graphs are reproducible. Their thresholds are unmeasured (see ``gemm_configs``).
Triton is imported when a product runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.kernels.gemm_configs import (
    FAMILIES,
    GEMV_BLOCK_K,
    GEMV_BLOCK_N,
    GEMV_MAX_M,
    UNPACK_MIN_M,
    Family,
    GemmConfig,
    GemvConfig,
    family_of,
)

FLOAT_ACTIVATIONS = 16
"""Stands for W4A16 in tables by ``num_bits``."""

MAX_SPLIT_K, MIN_STEPS_PER_SPLIT = 16, 4


class Kernel(StrEnum):
    """Ways to multiply."""

    GEMV = "gemv"
    GEMM = "gemm"
    FUSED = "fused"
    """4-bit weights are unpacked in registers."""
    UNPACK = "unpack"
    """4-bit weights are unpacked into memory, then multiplied by ``GEMM`` (or by torch, in floating point)."""


@dataclass(frozen=True)
class Choice:
    """A kernel and its tile sizes; ``config`` is None where torch multiplies."""

    kernel: Kernel
    config: GemmConfig | GemvConfig | None = None


@cache
def choose(num_rows: int, num_out: int, width: int, num_bits: int, capability: tuple[int, int]) -> Choice:
    """The kernel for 8-bit activations.

    Args:
        num_rows: M; 0 is chosen for like 1 (and nothing is launched).
        num_out: N.
        width: K.
        num_bits: Of the weight: 8, or 4 packed.
        capability: The GPU's, as ``torch.cuda.get_device_capability`` gives it.

    Raises:
        ValueError: other bits, or a GPU older than 8.0.
    """
    if num_bits not in (4, 8):
        raise ValueError(f"num_bits must be 4 or 8, got {num_bits}")
    key = family_of(capability)
    num_rows, row_bytes = max(num_rows, 1), width * num_bits // 8
    if num_rows <= GEMV_MAX_M[num_bits] and row_bytes % 4 == 0 and row_bytes:
        return Choice(Kernel.GEMV, _gemv_config(num_rows, num_out, row_bytes // 4, FAMILIES[key]))
    if num_bits == 4 and num_rows < UNPACK_MIN_M[key]:
        return Choice(Kernel.FUSED, _gemm_config(FAMILIES[key].int4, num_rows, num_out, row_bytes, FAMILIES[key]))
    kernel = Kernel.GEMM if num_bits == 8 else Kernel.UNPACK
    return Choice(kernel, _gemm_config(FAMILIES[key].int8, num_rows, num_out, width, FAMILIES[key]))


@cache
def choose_weight_only(num_rows: int, num_out: int, width: int, group_size: int, capability: tuple[int, int]) -> Choice:
    """The kernel for floating-point activations and 4-bit weights in groups; arguments as in ``choose``."""
    family = FAMILIES[family_of(capability)]
    if max(num_rows, 1) <= GEMV_MAX_M[FLOAT_ACTIVATIONS] and width and width % 8 == 0 and group_size % 4 == 0:
        config = _gemv_config(max(num_rows, 1), num_out, width // 8, family)
        return Choice(Kernel.GEMV, replace(config, split_k=1))
    return Choice(Kernel.UNPACK)


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
    choice: Choice | None = None,
) -> Tensor:
    """``api.linear_int8`` on CUDA; ``choice`` overrides the table (benchmarks and tests)."""
    return _linear(x_q, w_q, 8, (row_scale, w_scale, row_index, bias, x0, w0), out_dtype, choice)


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
    choice: Choice | None = None,
) -> Tensor:
    """``api.linear_int4`` on CUDA; ``choice`` overrides the table (benchmarks and tests)."""
    return _linear(x_q, w_packed, 4, (row_scale, w_scale, row_index, bias, x0, w0), out_dtype, choice)


def weight_only_int4(
    x: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    choice: Choice | None = None,
) -> Tensor:
    """``api.weight_only_int4`` on CUDA; ``choice`` overrides the table.

    torch's own `_weight_int4pack_mm` is no choice here: it reads another layout, and its scales and zero points are
    rounded to bfloat16, which is another function.
    """
    num_rows, num_out = x.shape[0], w_packed.shape[0]
    out = torch.empty(num_rows, num_out, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if choice is None:
        choice = choose_weight_only(num_rows, num_out, x.shape[1], group_size, _capability(x.device))
    if isinstance(choice.config, GemvConfig):
        from mqbench.kernels.triton_gemv import weight_only_gemv

        weight_only_gemv(x, w_packed, w_scale, zero_point, group_size, bias, out, choice.config)
        return out
    from mqbench.kernels.triton_unpack import dequantize_int4

    weight = dequantize_int4(w_packed, w_scale, zero_point, group_size, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _linear(
    x_q: Tensor,
    w: Tensor,
    num_bits: int,
    terms: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    out_dtype: torch.dtype,
    choice: Choice | None,
) -> Tensor:
    from mqbench.kernels import triton_gemm, triton_gemv, triton_unpack
    from mqbench.kernels.triton_epilogue import NIBBLE_SCALE, Epilogue

    (num_rows, width), num_out = x_q.shape, w.shape[0]
    out = torch.empty(num_rows, num_out, dtype=out_dtype, device=x_q.device)
    if not out.numel():
        return out
    choice = choice or choose(num_rows, num_out, width, num_bits, _capability(x_q.device))
    epilogue, config = Epilogue(*terms), choice.config
    if isinstance(config, GemvConfig):
        (triton_gemv.int8_gemv if num_bits == 8 else triton_gemv.int4_gemv)(x_q, w, epilogue, out, config)
    elif config is None:
        raise ValueError(f"choice must have a config for {num_bits}-bit weights, got {choice}")
    elif choice.kernel is Kernel.FUSED:
        triton_gemm.int4_gemm(x_q, w, epilogue, out, config)
    elif choice.kernel is Kernel.UNPACK:
        triton_gemm.int8_gemm(x_q, triton_unpack.unpack_int4_x16(w), epilogue, out, config, NIBBLE_SCALE)
    else:
        triton_gemm.int8_gemm(x_q, w, epilogue, out, config)
    return out


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _gemm_config(
    table: tuple[tuple[int, GemmConfig], ...], num_rows: int, num_out: int, row_bytes: int, family: Family
) -> GemmConfig:
    """The first line of the table that ``num_rows`` fits, split along K where its tiles leave the GPU idle."""
    config = next(config for largest, config in table if num_rows <= largest)
    tiles = -(-num_rows // config.block_m) * -(-num_out // config.block_n)
    steps = -(-row_bytes // config.block_k)
    return replace(config, split_k=_splits(tiles, steps // MIN_STEPS_PER_SPLIT, family))


def _gemv_config(num_rows: int, num_out: int, words: int, family: Family) -> GemvConfig:
    block_n = next((block_n for largest, block_n in GEMV_BLOCK_N if num_rows <= largest), GEMV_BLOCK_N[-1][1])
    return GemvConfig(block_n, GEMV_BLOCK_K, _splits(-(-num_out // block_n), words // GEMV_BLOCK_K, family))


def _splits(num_programs: int, most: int, family: Family) -> int:
    """The largest power of two that does not ask for more than one round of programs."""
    splits = 1
    while 2 * splits <= min(most, MAX_SPLIT_K) and 2 * splits * num_programs <= family.num_sms:
        splits *= 2
    return splits
