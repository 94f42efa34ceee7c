"""A linear layer that every method shares: float, observing or quantized, without a change of its callers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mqbench.harness.quant.activation import InputQuantizer
from mqbench.harness.quant.scheme import QuantArgs

if TYPE_CHECKING:
    from mqbench.harness.quant.integer import IntegerWeight

Transform = Callable[[Tensor], Tensor]


class QuantLinear(nn.Module):
    """Linear (or non-overlapping patch convolution) whose input and weight can be quantized.

    In order: patches as rows (convolution) -> ``input_transform`` (online Hadamard) -> take x0, input channel 0, out
    under ``x0_bypass`` -> ``input_quantizer`` Q -> matrix product -> + bias -> + x0 * w0 (RMS):

    ================  =========  ============================================
    ``x0_weight``     bypass     rank-1 term
    ================  =========  ============================================
    None              no         none: channel 0 is a channel like all others
    set               yes        x0 * x0_weight, x0 in floating point
    set               no         Q(x)_0 * x0_weight, x0 as the quantizer left it
    None              yes        x0 * weight[:, 0], x0 in floating point
    ================  =========  ============================================

    Attributes:
        weight: (out_features, in_features). Methods rewrite it; after rounding it holds dequantized values.
        bias: (out_features,) or None.
        kernel: Height and width of a 2-d convolution's patches, or None. Its input is a map of patches and so is its
            output, as the convolution's: (N, C, h * height, w * width) -> (N, out_features, h, w).
        flatten: The module was a 3-d convolution that is called with one patch per sample.
        input_transform: Exact online transform of the input's last dimension, or None.
        x0_weight: (out_features,) weights of input channel 0 kept out of ``weight``, which holds zeros there, or None.
        x0_bypass: x0 passes by the input quantizer, whose range does not see it.
        input_quantizer: Activation quantizer, or None for floating-point activations.
        weight_scale: (out_features, groups) scales of the rounded weight, or None while it is in floating point.
        weight_zero_point: Zero points of an asymmetric grid, same shape, or None.
        weight_args: Grid of the rounded weight, or None while the weight is in floating point.
        integer: The weight in integers and what computes with it (see ``integer.use_integer_backend``); ``weight`` is
            then not in memory, and reads as NaN. None while the layer is simulated.
    """

    x0_weight: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, name: str, flatten: bool = False) -> None:
        super().__init__()
        self.name = name
        self.flatten = flatten
        self.kernel: tuple[int, int] | None = None
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.input_transform: Transform | None = None
        self.input_quantizer: InputQuantizer | None = None
        self.register_buffer("x0_weight", None)
        self.register_buffer("weight_scale", None)
        self.register_buffer("weight_zero_point", None)
        self.weight_args: QuantArgs | None = None
        self.x0_bypass = False
        self.integer: IntegerWeight | None = None

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> QuantLinear:
        """Takes over a Linear, or a convolution whose stride equals its kernel (patch embedding).

        Raises:
            TypeError: the module is neither.
        """
        if isinstance(module, nn.Linear):
            return cls(module.weight.detach(), _detached(module.bias), name=name)
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and _takes_patches(module):
            is_map = isinstance(module, nn.Conv2d)
            linear = cls(module.weight.detach().flatten(1), _detached(module.bias), name=name, flatten=not is_map)
            linear.kernel = tuple(module.kernel_size) if is_map else None  # type: ignore[assignment]
            return linear
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
        """The input as the quantizer sees it, and x0 where it passes by.

        Shapes: x (..., in_features) -> (..., in_features), (..., 1) or None.
        """
        x = self._transformed(x)
        return (_without_channel0(x), x[..., :1]) if self.x0_bypass else (x, None)

    def weight_input(self, x: Tensor) -> Tensor:
        """The input that multiplies ``weight``, before quantization: channel 0 is zero where its weights are elsewhere.

        Shapes: (..., in_features) -> the same.
        """
        x = self._transformed(x)
        return x if self.x0_weight is None else _without_channel0(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x) if self.integer is None else self.integer(self, self.as_rows(x))
        return y if self.kernel is None else self._as_map(y, x)

    def as_rows(self, x: Tensor) -> Tensor:
        """Patches of a convolution's input as vectors; any other input as it is.

        Shapes: (N, C, h * height, w * width) -> (N, h * w, C * height * width) with ``kernel``.
        """
        if self.kernel is None:
            return x.flatten(1) if self.flatten else x
        height, width = self.kernel
        patches = x.unfold(2, height, height).unfold(3, width, width)  # (N, C, h, w, height, width)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def _as_map(self, y: Tensor, x: Tensor) -> Tensor:
        assert self.kernel is not None
        return y.transpose(1, 2).unflatten(2, (x.shape[2] // self.kernel[0], x.shape[3] // self.kernel[1]))

    def _product(self, x: Tensor) -> Tensor:
        x, x0 = self.prepare_input(x)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        y = F.linear(x, self.weight, self.bias)
        if x0 is None and self.x0_weight is None:
            return y
        weight = self.weight[:, 0] if self.x0_weight is None else self.x0_weight
        return y + (x[..., :1] if x0 is None else x0) * weight

    def _transformed(self, x: Tensor) -> Tensor:
        x = self.as_rows(x)
        return x if self.input_transform is None else self.input_transform(x)

    def extra_repr(self) -> str:
        bits = "float" if self.weight_num_bits is None else f"W{self.weight_num_bits}"
        return f"{self.in_features} -> {self.out_features}, {bits}{'' if self.integer is None else ', integer'}"


def wrap_linears(model: nn.Module, names: list[str]) -> dict[str, QuantLinear]:
    """Replaces the named modules by ``QuantLinear`` in place and returns them by name. Outputs do not change."""
    wrapped = {}
    for name in names:
        parent_name, _, attribute = name.rpartition(".")
        wrapped[name] = QuantLinear.from_module(model.get_submodule(name), name)
        setattr(model.get_submodule(parent_name), attribute, wrapped[name])
    return wrapped


def _without_channel0(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:]], dim=-1)


def _takes_patches(module: nn.Conv2d | nn.Conv3d) -> bool:
    """A convolution that equals a linear over patches that do not overlap."""
    padded = module.padding == "same" or (module.padding != "valid" and any(module.padding))
    return module.stride == module.kernel_size and module.groups == 1 and not padded and set(module.dilation) == {1}


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
