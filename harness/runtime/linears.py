"""Weights in the form in which they are multiplied, of one linear or of several that share their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mqbench.harness.runtime.site import Levels
from mqbench.kernels import api


class RuntimeLinear(nn.Module):
    """What all kinds have in common.

    Attributes:
        bias: (N,) or None.
        w0: (N,) weights of input channel 0 as a rank-1 term (RMS), or None.
    """

    bias: nn.Parameter | None
    w0: Tensor | None

    def __init__(self, bias: Tensor | None, w0: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("w0", w0, persistent=False)


class FloatLinear(RuntimeLinear):
    """A weight in floating point.

    Args:
        weight: (N, K).
        bias: (N,) or None.
        w0: (N,) or None: channel 0 comes in addition through a rank-1 term.
        bypass: Channel 0 is left out of the product.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, w0: Tensor | None = None, bypass: bool = False
    ) -> None:
        super().__init__(bias, w0)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bypass = bypass

    def forward(self, x: Tensor) -> Tensor:
        return _with_rank1(x, self.w0, self.bypass, lambda rows: F.linear(rows, self.weight, self.bias))


class WeightOnlyLinear(RuntimeLinear):
    """Packed 4-bit weights in groups, activations in floating point.

    Args:
        levels: (N, K/2) uint8 of ``pack_int4``.
        scale: (N, groups).
        zero_point: The same shape, or None.
        group_size: Input channels per scale.
        bias: (N,) or None.
        w0: As in ``FloatLinear``.
        bypass: As in ``FloatLinear``.
    """

    levels: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        levels: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        group_size: int,
        bias: Tensor | None = None,
        w0: Tensor | None = None,
        bypass: bool = False,
    ) -> None:
        super().__init__(bias, w0)
        self.group_size = group_size
        self.bypass = bypass
        for name, tensor in (("levels", levels), ("scale", scale), ("zero_point", zero_point)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _with_rank1(x, self.w0, self.bypass, self._product)

    def _product(self, x: Tensor) -> Tensor:
        return api.weight_only_int4(x, self.levels, self.scale, self.zero_point, self.group_size, self.bias)


class IntegerLinear(RuntimeLinear):
    """Integer weights for integer activations.

    Args:
        levels: (N, K) int8, or (N, K/2) uint8 of ``pack_int4``.
        scale: (N,).
        dtype: Of the result.
        bias: (N,) or None.
        w0: (N,) or None. Rows without an x0 of their own then give their dequantized channel 0.
    """

    levels: Tensor
    scale: Tensor

    def __init__(
        self,
        levels: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        w0: Tensor | None = None,
    ) -> None:
        super().__init__(bias, w0)
        self.dtype = dtype
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @property
    def packed(self) -> bool:
        return self.levels.dtype == torch.uint8

    def forward(self, x: Levels) -> Tensor:
        x0 = x.x0
        if self.w0 is not None and x0 is None:
            x0 = x.levels[:, 0] * (x.row_scale if x.row_index is None else x.row_scale[x.row_index.int()])
        multiply = api.linear_int4 if self.packed else api.linear_int8
        terms = x.row_scale, self.scale, x.row_index, self.bias, x0, self.w0
        return multiply(x.levels, self.levels, *terms, self.dtype)

    def extra_repr(self) -> str:
        rows, columns = self.levels.shape
        return f"{columns * (2 if self.packed else 1)} -> {rows}, W{4 if self.packed else 8}"


class Float8Linear(RuntimeLinear):
    """E4M3 weights with one scale per output channel, for E4M3 rows (CUDA).

    Args:
        weight: (N, K) float8.
        scale: (N,) float32.
        dtype: Of the result.
        bias: (N,) or None.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        super().__init__(bias)
        self.dtype = dtype
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Levels) -> Tensor:
        scales = x.row_scale[:, None], self.scale[None]
        return torch._scaled_mm(x.levels, self.weight.T, *scales, bias=self.bias, out_dtype=self.dtype)


def merged(linears: Sequence[RuntimeLinear]) -> RuntimeLinear | None:
    """One linear whose output is theirs side by side; None when their kinds do not allow it."""
    first = linears[0]
    if len(linears) == 1:
        return first
    if any(type(linear) is not type(first) or linear.w0 is not None for linear in linears):
        return None
    bias = _merged_bias(linears)
    if isinstance(first, IntegerLinear):
        if len({linear.levels.dtype for linear in linears}) > 1:
            return None
        return IntegerLinear(_cat(linears, "levels"), _cat(linears, "scale"), first.dtype, bias)
    if isinstance(first, WeightOnlyLinear):
        if len({(linear.group_size, linear.zero_point is None, linear.bypass) for linear in linears}) > 1:
            return None
        zero_point = None if first.zero_point is None else _cat(linears, "zero_point")
        return WeightOnlyLinear(_cat(linears, "levels"), _cat(linears, "scale"), zero_point, first.group_size, bias)
    if isinstance(first, FloatLinear) and not any(linear.bypass for linear in linears):
        return FloatLinear(_cat(linears, "weight"), bias)
    return None


def _cat(linears: Sequence[RuntimeLinear], name: str) -> Tensor:
    return torch.cat([getattr(linear, name) for linear in linears])


def _merged_bias(linears: Sequence[RuntimeLinear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    known = next(linear.bias for linear in linears if linear.bias is not None)
    sizes = [_num_out(linear) for linear in linears]
    return torch.cat(
        [
            known.new_zeros(size) if linear.bias is None else linear.bias
            for linear, size in zip(linears, sizes, strict=True)
        ]
    )


def _num_out(linear: RuntimeLinear) -> int:
    weight = linear.weight if isinstance(linear, (FloatLinear, Float8Linear)) else linear.levels
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _with_rank1(x: Tensor, w0: Tensor | None, bypass: bool, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The product, with channel 0 as a rank-1 term beside it or instead of its part in it."""
    x0 = x[:, :1]
    if bypass:
        x = x.clone()
        x[:, 0] = 0
    return product(x) if w0 is None else product(x) + x0 * w0
