"""Operations between linear layers: in BF16, with quantization fused into them, and with quantization behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.harness.bench.contender import Check, Contender, Makers, check_levels, check_norm
from mqbench.harness.bench.spec import SEED, Case
from mqbench.kernels import api, cpu

DTYPE = torch.bfloat16
EPS = 1e-6
QUANT_MAX = 127


@dataclass(frozen=True)
class Operation:
    """One operation in all its forms, each a function of the tensors that `inputs` makes.

    Attributes:
        inputs: Made from a function that gives a random (M, K) matrix.
        bf16: What a BF16 model runs; the output comes first where there are several.
        exact: The same in the precision of its inputs, for the truth.
        fused: Ours, with a static scale or None.
        expected: Of ``fused``, in plain torch.
        extra_bytes: Written besides the output, per element of a matrix.
    """

    inputs: Callable[[Callable[[], Tensor]], tuple[Tensor, ...]]
    bf16: Callable[..., Any]
    exact: Callable[..., Tensor]
    fused: Callable[..., Any]
    expected: Callable[..., Any]
    extra_bytes: int = 0


def _weight(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.shape[1], device=x.device).to(x.dtype)


def _normed(make: Callable[[], Tensor], matrices: int) -> tuple[Tensor, ...]:
    xs = tuple(make() for _ in range(matrices))
    return (*xs, _weight(xs[0]))


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[1],), weight, EPS)


def _add_rms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms(total, weight), total


def _rms_exact(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


OPERATIONS: dict[str, Operation] = {
    "rms_norm": Operation(
        inputs=partial(_normed, matrices=1),
        bf16=_rms,
        exact=_rms_exact,
        fused=lambda x, weight, scale: api.rms_norm_quantize(x, weight, EPS, scale),
        expected=lambda x, weight, scale: cpu.rms_norm_quantize(x, weight, EPS, scale, None, None, 8),
    ),
    "add_rms_norm": Operation(
        inputs=partial(_normed, matrices=2),
        bf16=_add_rms,
        exact=lambda x, residual, weight: _rms_exact(x + residual, weight),
        fused=lambda x, residual, weight, scale: api.rms_norm_quantize(x, weight, EPS, scale, residual=residual),
        expected=lambda x, residual, weight, scale: cpu.rms_norm_quantize(x, weight, EPS, scale, None, residual, 8),
        extra_bytes=DTYPE.itemsize,
    ),
    "silu_mul": Operation(
        inputs=lambda make: (make(), make()),
        bf16=lambda gate, up: F.silu(gate) * up,
        exact=lambda gate, up: F.silu(gate) * up,
        fused=api.silu_mul_quantize,
        expected=lambda gate, up, scale: cpu.silu_mul_quantize(gate, up, scale, None, 8),
    ),
    "quick_gelu": Operation(
        inputs=lambda make: (make(),),
        bf16=lambda x: x * torch.sigmoid(1.702 * x),
        exact=lambda x: x * torch.sigmoid(1.702 * x),
        fused=lambda x, scale: api.gelu_quantize(x, "quick_gelu", scale),
        expected=lambda x, scale: cpu.gelu_quantize(x, "quick_gelu", scale, None, 8),
    ),
}
"""By the name of the case."""


def fusion(case: Case, device: torch.device) -> Makers:
    """Static and per-token quantization, fused and separate; the BF16 operation is what they are compared with."""
    operation, rows, width = OPERATIONS[case.name], case.rows, case.shape["k"]
    generator = torch.Generator(device).manual_seed(SEED)
    inputs = operation.inputs(lambda: torch.randn(rows, width, generator=generator, device=device).to(DTYPE))
    matrices = tuple(x for x in inputs if x.dim() == 2)
    scale = (_first(operation.bf16(*inputs)).abs().amax().float() / QUANT_MAX).reshape(1)
    read = sum(x.numel() for x in matrices) * DTYPE.itemsize + rows * width * operation.extra_bytes

    def truth(part: slice) -> Tensor:
        return operation.exact(*(x[part].double() if x.dim() == 2 else x.double() for x in inputs))

    def bf16() -> Contender:
        def check(result: Any) -> Check:
            return check_norm(_first(result), truth)

        return Contender(operation.bf16, inputs, check, read + rows * width * DTYPE.itemsize)

    def quantized(run: Callable[..., Any], scale: Tensor | None, fused: bool = True) -> Contender:
        y = _first(operation.bf16(*inputs))
        separate = cpu.quantize_token(y, 8)[0] if scale is None else cpu.quantize_static(y, scale, None, 8)
        expected = operation.expected(*inputs, scale)[0] if fused else separate

        def check(result: Any) -> Check:
            return check_levels(_first(result), expected)

        return Contender(run, (*inputs, scale), check, read + rows * width + 4 * rows * (scale is None))

    def then_static(*args: Tensor) -> Tensor:
        return api.quantize_static(_first(operation.bf16(*args[:-1])), args[-1])

    def then_token(*args: Any) -> tuple[Tensor, Tensor]:
        return api.quantize_token(_first(operation.bf16(*args[:-1])))

    return {
        "bf16": bf16,
        "static": partial(quantized, operation.fused, scale),
        "token": partial(quantized, operation.fused, None),
        "unfused_static": partial(quantized, then_static, scale, fused=False),
        "unfused_token": partial(quantized, then_token, None, fused=False),
    }


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
