"""A linear layer that every method shares: float, observing or quantized, without a change of its callers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mqbench.harness.quant.activation import InputQuantizer
from mqbench.harness.quant.scheme import QuantArgs

Transform = Callable[[Tensor], Tensor]


class QuantLinear(nn.Module):
    """Linear (or non-overlapping patch convolution) whose input and weight can be quantized.

    In order: flatten (patch convolution) -> ``input_transform`` (online Hadamard) -> split off input channel 0 when
    ``x0_weight`` is set (RMS) -> ``input_quantizer`` -> matrix product -> + bias -> + x0 * x0_weight.

    Attributes:
        weight: (out_features, in_features). Methods rewrite it; after rounding it holds dequantized values.
        bias: (out_features,) or None.
        input_transform: Exact online transform of the input's last dimension, or None.
        x0_weight: (out_features,) weights of input channel 0 kept out of the matrix product (RMS), or None.
        input_quantizer: Activation quantizer, or None for floating-point activations.
        weight_scale: (out_features, groups) scales of the rounded weight, or None while it is in floating point.
        weight_zero_point: Zero points of an asymmetric grid, same shape, or None.
        weight_args: Grid of the rounded weight, or None while the weight is in floating point.
    """

    x0_weight: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, name: str, flatten: bool = False) -> None:
        super().__init__()
        self.name = name
        self.flatten = flatten
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.input_transform: Transform | None = None
        self.input_quantizer: InputQuantizer | None = None
        self.register_buffer("x0_weight", None)
        self.register_buffer("weight_scale", None)
        self.register_buffer("weight_zero_point", None)
        self.weight_args: QuantArgs | None = None

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> QuantLinear:
        """Takes over a Linear, or a convolution whose stride equals its kernel (patch embedding).

        Raises:
            TypeError: the module is neither.
        """
        if isinstance(module, nn.Linear):
            return cls(module.weight.detach(), _detached(module.bias), name=name)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and _takes_one_patch(module):
            return cls(module.weight.detach().flatten(1), _detached(module.bias), name=name, flatten=True)
        raise TypeError(f"'{name}' is a {type(module).__name__}; only Linear and patch convolutions can be quantized")

    @property
    def weight_num_bits(self) -> int | None:
        """Bits of the rounded weight, or None while the weight is in floating point."""
        return None if self.weight_args is None else self.weight_args.num_bits

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def prepare_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input as the matrix product sees it before quantization, and x0 when RMS is on.

        Shapes: x (..., in_features) -> (..., in_features), (..., 1) or None.
        """
        if self.flatten:
            x = x.flatten(1)
        if self.input_transform is not None:
            x = self.input_transform(x)
        if self.x0_weight is None:
            return x, None
        x0 = x[..., :1]
        return torch.cat([torch.zeros_like(x0), x[..., 1:]], dim=-1), x0

    def forward(self, x: Tensor) -> Tensor:
        x, x0 = self.prepare_input(x)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        y = F.linear(x, self.weight, self.bias)
        return y if x0 is None or self.x0_weight is None else y + x0 * self.x0_weight

    def extra_repr(self) -> str:
        bits = "float" if self.weight_num_bits is None else f"W{self.weight_num_bits}"
        return f"{self.in_features} -> {self.out_features}, {bits}"


def wrap_linears(model: nn.Module, names: list[str]) -> dict[str, QuantLinear]:
    """Replaces the named modules by ``QuantLinear`` in place and returns them by name. Outputs do not change."""
    wrapped = {}
    for name in names:
        parent_name, _, attribute = name.rpartition(".")
        wrapped[name] = QuantLinear.from_module(model.get_submodule(name), name)
        setattr(model.get_submodule(parent_name), attribute, wrapped[name])
    return wrapped


def _takes_one_patch(module: nn.Conv2d | nn.Conv3d) -> bool:
    """A convolution that equals a linear over each patch handed to it."""
    padded = isinstance(module.padding, str) or any(module.padding)
    return module.stride == module.kernel_size and module.groups == 1 and not padded and set(module.dilation) == {1}


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
