"""What the device can do at best, measured: copying, and large matrix products of every kind."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mqbench.harness.bench.contender import Check, Contender, Makers, check_equal, check_norm, need_cuda
from mqbench.harness.bench.linear import fp8_inputs, scaled_product
from mqbench.harness.bench.spec import SEED, Case
from mqbench.kernels import api, cpu

MIB = 1 << 20


def peaks(case: Case, device: torch.device) -> Makers:
    """A copy within the device's memory and square matrix products."""
    side, num_bytes = case.shape["side"], case.shape["copy_mib"] * MIB
    generator = torch.Generator(device).manual_seed(SEED)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    def floats() -> Tensor:
        return torch.randn(side, side, generator=generator, device=device, dtype=torch.bfloat16)

    def product(run, x: Tensor, w: Tensor, check, *more: Tensor) -> Contender:  # type: ignore[no-untyped-def]
        num_bytes = x.numel() * x.element_size() + w.numel() * w.element_size() + 2 * side * side
        return Contender(run, (x, w, *more), check, num_bytes, 2 * side**3)

    def copy() -> Contender:
        source = integers(-128, 128, num_bytes)
        return Contender(torch.clone, (source,), partial(check_equal, expected=source), 2 * num_bytes)

    def bf16() -> Contender:
        x, w = floats(), floats()
        return product(torch.mm, x, w, lambda y: check_norm(y, lambda rows: x[rows].float() @ w.float()))

    def int8_torch() -> Contender:
        x, w = integers(-128, 128, side, side), integers(-128, 128, side, side)
        return product(_int_mm, x, w, lambda y: check_equal(y, cpu.int_matmul(x, w, cpu.INT8_LEVELS)))

    def int8_ours() -> Contender:
        x, w = integers(-128, 128, side, side), integers(-128, 128, side, side)
        one, ones = torch.ones(1, device=device), torch.ones(side, device=device)
        return product(_int8_linear, x, w, partial(_check_int8, x=x, w=w), one, ones)

    def fp8() -> Contender:
        need_cuda(device)
        x, x_scale = fp8_inputs(floats())
        w, w_scale = fp8_inputs(floats())
        scale = x_scale * w_scale
        truth = lambda rows: x[rows].float() @ w.float().T * scale  # noqa: E731
        return product(scaled_product, x, w, lambda y: check_norm(y, truth), x_scale, w_scale)

    return {
        "copy": copy,
        "bf16_matmul": bf16,
        "int8_matmul": int8_torch,
        "int8_linear": int8_ours,
        "fp8_matmul": fp8,
    }


def _int_mm(x: Tensor, w: Tensor) -> Tensor:
    return torch._int_mm(x, w.T)


def _int8_linear(x: Tensor, w: Tensor, row_scale: Tensor, w_scale: Tensor) -> Tensor:
    return api.linear_int8(x, w, row_scale, w_scale, out_dtype=torch.bfloat16)


def _check_int8(y: Tensor, x: Tensor, w: Tensor) -> Check:
    return check_norm(y, lambda rows: cpu.int_matmul(x[rows], w, cpu.INT8_LEVELS).double())
