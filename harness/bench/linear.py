"""Linear layers: BF16, our integer products, and what others offer, on the same random input and weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mqbench.harness.bench.contender import (
    Check,
    Contender,
    Makers,
    Unavailable,
    check_equal,
    check_norm,
    check_rounded,
    need_cuda,
)
from mqbench.harness.bench.spec import SEED, Case
from mqbench.kernels import api, cpu

DTYPE = torch.bfloat16
GROUP_SIZE = 128
WEIGHT_SIZE = 0.02
"""Standard deviation of the random weight."""

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
FP8_CAPABILITY = (8, 9)
INT_MM_MIN_ROWS = 17
"""torch._int_mm takes no fewer on a GPU."""

QUANTIZED_LIMIT = 5e-2
"""Relative error of peers that quantize by rules of their own."""


@dataclass(frozen=True)
class Problem:
    """``y = x W^T + b`` in bfloat16 and on integer grids; everything is made once and on first use."""

    case: Case
    device: torch.device

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.case.rows, self.case.shape["n"], self.case.shape["k"]

    @cached_property
    def _random(self) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, num_out, width = self.sizes
        make = partial(torch.randn, generator=torch.Generator(self.device).manual_seed(SEED), device=self.device)
        bias = make(num_out).to(DTYPE) if self.case.shape["bias"] else None
        return make(rows, width).to(DTYPE), (make(num_out, width) * WEIGHT_SIZE).to(DTYPE), bias

    @property
    def x(self) -> Tensor:
        return self._random[0]

    @property
    def w(self) -> Tensor:
        return self._random[1]

    @property
    def bias(self) -> Tensor | None:
        return self._random[2]

    @cached_property
    def static(self) -> tuple[Tensor, Tensor]:
        """(M, K) int8 and its one static scale."""
        scale = (self.x.abs().amax().float() / 127).reshape(1)
        return cpu.quantize_static(self.x, scale, None, 8), scale

    def levels(self, num_bits: int) -> tuple[Tensor, Tensor]:
        """(N, K) int8 and (N,) scales of the weight, symmetric, one scale per output channel."""
        return cpu.quantize_token(self.w, num_bits)

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """(N, K) int8 levels of four bits and (N, K / 128) scales."""
        _, num_out, width = self.sizes
        if width % GROUP_SIZE:
            raise Unavailable(f"width {width} is no multiple of {GROUP_SIZE}")
        levels, scale = cpu.quantize_token(self.w.reshape(-1, GROUP_SIZE), 4)
        return levels.reshape(num_out, width), scale.reshape(num_out, -1)

    def contender(self, run: Callable[..., Any], inputs: tuple[Any, ...], check: Any, weight_bits: int) -> Contender:
        """With the bytes of its matrices as they stand in memory; scales and bias are not counted."""
        rows, num_out, width = self.sizes
        activation = inputs[0].element_size() if isinstance(inputs[0], Tensor) else DTYPE.itemsize
        num_bytes = rows * width * activation + num_out * width * weight_bits // 8 + rows * num_out * DTYPE.itemsize
        return Contender(run, inputs, check, num_bytes, 2 * rows * num_out * width)

    def float_truth(self, rows: slice, weight: Tensor | None = None) -> Tensor:
        """In float32, which products of bfloat16 fit into."""
        y = self.x[rows].float() @ (self.w if weight is None else weight).float().T
        return y if self.bias is None else y + self.bias.float()

    def check_integer(self, y: Tensor, w_q: Tensor, row_scale: Tensor, w_scale: Tensor, x_q: Tensor) -> Check:
        """Against the exact integer product and its epilogue in float64."""

        def truth(rows: slice) -> Tensor:
            scale = row_scale if len(row_scale) == 1 else row_scale[rows]
            product = cpu.int_matmul(x_q[rows], w_q, cpu.INT8_LEVELS).double()
            exact = product * scale.double()[:, None] * w_scale.double()
            return exact if self.bias is None else exact + self.bias.double()

        return check_rounded(y, truth)


def linear(case: Case, device: torch.device) -> Makers:
    """Everyone's linear layer; BF16 is what they are compared with."""
    problem = Problem(case, device)
    makers: dict[str, Callable[[Problem], Contender]] = {
        "bf16": _bf16,
        "w8a8": partial(_integer, num_bits=8),
        "w8a8_dynamic": _dynamic,
        "w4a8": partial(_integer, num_bits=4),
        "w4a8_fused": partial(_forced, kernel="fused"),
        "w4a8_unpack": partial(_forced, kernel="unpack"),
        "w4a16": _weight_only,
        "fp8": _fp8,
        "int_mm": _int_mm,
        "tinygemm": _tinygemm,
        "torchao": _torchao,
        "gemlite": _gemlite,
    }
    return {name: partial(make, problem) for name, make in makers.items()}


def fp8_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 and its one scale, a float32 scalar."""
    scale = x.abs().amax().float() / FP8_MAX
    return (x.float() / scale).to(FP8), scale


def scaled_product(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """FP8 (M, K) times (N, K), one scale each, in bfloat16."""
    return torch._scaled_mm(x, w.T, x_scale, w_scale, bias=bias, out_dtype=DTYPE, use_fast_accum=True)


def _bf16(problem: Problem) -> Contender:
    inputs = problem.x, problem.w, problem.bias
    return problem.contender(F.linear, inputs, lambda y: check_norm(y, problem.float_truth), 16)


def _integer(problem: Problem, num_bits: int) -> Contender:
    x_q, row_scale = problem.static
    w_q, w_scale = problem.levels(num_bits)
    operation, weight = (api.linear_int8, w_q) if num_bits == 8 else (api.linear_int4, api.pack_int4(w_q))

    def run(x_q: Tensor, weight: Tensor, row_scale: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
        return operation(x_q, weight, row_scale, w_scale, bias=bias, out_dtype=DTYPE)

    inputs = x_q, weight, row_scale, w_scale, problem.bias
    check = partial(problem.check_integer, w_q=w_q, row_scale=row_scale, w_scale=w_scale, x_q=x_q)
    return problem.contender(run, inputs, check, num_bits)


def _dynamic(problem: Problem) -> Contender:
    w_q, w_scale = problem.levels(8)
    x_q, row_scale = cpu.quantize_token(problem.x, 8)

    def run(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
        levels, scale = api.quantize_token(x)
        return api.linear_int8(levels, w_q, scale, w_scale, bias=bias, out_dtype=DTYPE)

    check = partial(problem.check_integer, w_q=w_q, row_scale=row_scale, w_scale=w_scale, x_q=x_q)
    return problem.contender(run, (problem.x, w_q, w_scale, problem.bias), check, 8)


def _forced(problem: Problem, kernel: str) -> Contender:
    """W4A8 by one of the two ways of large M, whatever ``dispatch`` would choose."""
    need_cuda(problem.device)
    from mqbench.kernels import dispatch
    from mqbench.kernels.gemm_configs import GEMV_MAX_M, UNPACK_MIN_M, family_of

    rows, num_out, width = problem.sizes
    capability = torch.cuda.get_device_capability(problem.device)
    if rows <= max(GEMV_MAX_M[4], GEMV_MAX_M[8]):
        raise Unavailable("so few rows are a matrix-vector product")
    if kernel == "fused":
        last = UNPACK_MIN_M[family_of(capability)] - 1
        choice = dispatch.choose(min(rows, last), num_out, width, 4, capability)
    else:
        choice = dispatch.Choice(dispatch.Kernel.UNPACK, dispatch.choose(rows, num_out, width, 8, capability).config)
    usual = _integer(problem, 4)

    def run(x_q: Tensor, weight: Tensor, row_scale: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
        return dispatch.linear_int4(x_q, weight, row_scale, w_scale, None, bias, None, None, DTYPE, choice)

    return problem.contender(run, usual.inputs, usual.check, 4)


def _weight_only(problem: Problem) -> Contender:
    levels, scale = problem.groups
    packed = api.pack_int4(levels)
    weight = cpu.dequantize_int4(packed, scale, None, GROUP_SIZE, DTYPE)

    def run(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return api.weight_only_int4(x, packed, scale, group_size=GROUP_SIZE, bias=bias)

    check = partial(check_norm, truth=partial(problem.float_truth, weight=weight))
    return problem.contender(run, (problem.x, packed, scale, problem.bias), check, 4)


def _fp8(problem: Problem) -> Contender:
    need_cuda(problem.device)
    if torch.cuda.get_device_capability(problem.device) < FP8_CAPABILITY:
        raise Unavailable("this GPU has no FP8")
    x, x_scale = fp8_inputs(problem.x)
    w, w_scale = fp8_inputs(problem.w)

    def truth(rows: slice) -> Tensor:
        y = x[rows].float() @ w.float().T * (x_scale * w_scale)
        return y if problem.bias is None else y + problem.bias.float()

    inputs = x, w, x_scale, w_scale, problem.bias
    return problem.contender(scaled_product, inputs, lambda y: check_norm(y, truth), 8)


def _int_mm(problem: Problem) -> Contender:
    if problem.sizes[0] < INT_MM_MIN_ROWS:
        raise Unavailable(f"takes at least {INT_MM_MIN_ROWS} rows")
    (x_q, _), (w_q, _) = problem.static, problem.levels(8)
    exact = cpu.int_matmul(x_q, w_q, cpu.INT8_LEVELS)
    return problem.contender(lambda x, w: torch._int_mm(x, w.T), (x_q, w_q), partial(check_equal, expected=exact), 8)


def _tinygemm(problem: Problem) -> Contender:
    """torch's W4A16 kernel. Two levels a byte, even columns in the high nibble; ``(level - 8) * scale + zero``."""
    need_cuda(problem.device)
    levels, scale = problem.groups
    unsigned = (levels + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack((unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous(), 8)
    rounded = scale.to(DTYPE)
    scale_and_zero = torch.stack([rounded.T, torch.zeros_like(rounded.T)], -1).contiguous()
    weight = cpu.dequantize_int4(api.pack_int4(levels), rounded.float(), None, GROUP_SIZE, DTYPE)

    def run(x: Tensor, packed: Tensor, scale_and_zero: Tensor, bias: Tensor | None) -> Tensor:
        y = torch._weight_int4pack_mm(x, packed, GROUP_SIZE, scale_and_zero)
        return y if bias is None else y + bias

    check = partial(check_norm, truth=partial(problem.float_truth, weight=weight))
    return problem.contender(run, (problem.x, packed, scale_and_zero, problem.bias), check, 4)


def _module(problem: Problem) -> nn.Linear:
    _, num_out, width = problem.sizes
    module = nn.Linear(width, num_out, bias=problem.bias is not None, device=problem.device, dtype=DTYPE)
    module.weight.data.copy_(problem.w)
    if problem.bias is not None:
        module.bias.data.copy_(problem.bias)
    return module.requires_grad_(False)


def _call(x: Tensor, layer: Any) -> Tensor:
    return layer(x)


def _foreign(problem: Problem, module: Any, run: Callable[..., Any] = _call) -> Contender:
    """A layer of another library, which quantizes the same weight by its own rule."""
    check = partial(check_norm, truth=problem.float_truth, limit=QUANTIZED_LIMIT)
    return problem.contender(run, (problem.x, module), check, 8)


def _torchao(problem: Problem) -> Contender:
    need_cuda(problem.device)
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise Unavailable("not installed") from error
    module = _module(problem)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return _foreign(problem, module, torch.compile(_call))


def _gemlite(problem: Problem) -> Contender:
    need_cuda(problem.device)
    try:
        from gemlite.helper import A8W8_int8_dynamic
    except ImportError as error:
        raise Unavailable("not installed") from error
    return _foreign(problem, A8W8_int8_dynamic(device=str(problem.device)).from_linear(_module(problem)))
