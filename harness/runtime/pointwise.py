"""Norms and activation functions on rows, in floating point, as the modules of Transformers compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.layout import NormKind

SILU, GELU, GELU_TANH, QUICK_GELU = "silu", "gelu", "gelu_tanh", "quick_gelu"
QUICK_GELU_SLOPE = 1.702

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        SILU: F.silu,
        GELU: F.gelu,
        GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
        QUICK_GELU: lambda x: x * torch.sigmoid(QUICK_GELU_SLOPE * x),
    }
)
"""Activation functions by name."""

ACTIVATION_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "SiLU": SILU,
        "SiLUActivation": SILU,
        "GELU": GELU,
        "GELUActivation": GELU,
        "GELUTanh": GELU_TANH,
        "PytorchGELUTanh": GELU_TANH,
        "QuickGELUActivation": QUICK_GELU,
    }
)
"""Modules of torch and Transformers by class name."""


def activation_of(module: nn.Module) -> str | None:
    """The name in ``ACTIVATIONS`` of an activation module; None for another module."""
    name = ACTIVATION_CLASSES.get(type(module).__name__)
    return GELU_TANH if name == GELU and getattr(module, "approximate", "none") == "tanh" else name


class RowNorm(nn.Module):
    """LayerNorm or RMSNorm of rows.

    Args:
        kind: Which of the two.
        eps: Added to the variance or the mean square.
        weight: (C,) gains, or None for ones.
        bias: (C,) of a LayerNorm, or None.
    """

    def __init__(self, kind: NormKind, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.weight = None if weight is None else nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> RowNorm:
        """Takes over a norm of torch, Transformers or ``quant.transforms``; gains of one are left out.

        Raises:
            LayoutError: it is no norm that the runtime knows.
        """
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if eps is None:
            raise LayoutError(f"'{name}' is a {type(module).__name__}; the runtime takes LayerNorm and RMSNorm")
        if isinstance(module, nn.LayerNorm):
            return cls(NormKind.LAYERNORM, eps, weight, bias)
        is_plain = weight is None or (not weight.is_meta and bool((weight == 1).all()))
        return cls(NormKind.RMSNORM, eps, None if is_plain else weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is NormKind.LAYERNORM:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.kind}, eps={self.eps}"
