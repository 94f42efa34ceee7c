"""Exact building blocks that methods put into a model, describable as data so that a saved model can be rebuilt.

Each class has ``config()``, a JSON-ready dict with its ``kind``; ``build_module`` is the inverse. Any new class goes
into ``MODULES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.kv_cache import KVQuantizer
from mqbench.kernels.hadamard import hadamard_transform, padded_size


class Describable(Protocol):
    """A module that can be written as data and rebuilt by ``build_module``."""

    def config(self) -> dict[str, Any]: ...


class OnlineHadamard(nn.Module):
    """Orthonormal Hadamard transform of the last dimension at run time (paper Sec. 3.4, QuaRot).

    Widths without a known Hadamard matrix are padded with zeros, so the output can be wider than the input; the
    linear behind it then has as many input columns as the padded width.

    Shapes: (..., n) -> (..., padded_n).
    """

    kind = "online_hadamard"

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.padded_n = padded_size(n)

    def forward(self, x: Tensor) -> Tensor:
        if self.padded_n > self.n:
            x = F.pad(x, (0, self.padded_n - self.n))
        return hadamard_transform(x)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "n": self.n}

    def extra_repr(self) -> str:
        return str(self.n) if self.padded_n == self.n else f"{self.n}, padded to {self.padded_n}"


class HeadHadamard(nn.Module):
    """Orthonormal Hadamard transform across attention heads at run time (QuaRot's online transform of o_proj's input).

    Mixes channel c of all heads, for every c; a number of heads without a known Hadamard matrix is padded with heads
    of zeros.

    Shapes: (..., num_heads * head_dim) -> (..., padded_heads * head_dim).
    """

    kind = "head_hadamard"

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.across = OnlineHadamard(num_heads)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-1, -2)
        return self.across(heads.contiguous()).transpose(-1, -2).flatten(-2)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "num_heads": self.num_heads, "head_dim": self.head_dim}

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim}"


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension, without an affine map.

    Computes in float32 (float64 stays float64) and returns the dtype of its input.
    """

    kind = "rms_norm"

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "eps": self.eps}

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class CentredNorm(nn.Module):
    """LayerNorm without an affine map of a stream in any orthonormal basis: RMSNorm of what is left of x once its part
    along ``direction`` is taken out.

    In the original basis the direction is (1, ..., 1) / sqrt(n) and this is LayerNorm; in a rotated one it is the image
    of that vector. For streams whose mean somebody reads, so that their writers cannot be centred.

    Args:
        n: Width of the input.
        eps: Added to the variance.

    Attributes:
        direction: (n,) of length 1.
    """

    kind = "centred_norm"
    direction: Tensor

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.n = n
        self.eps = eps
        self.register_buffer("direction", torch.full((n,), n**-0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        direction = self.direction.to(wide.dtype)
        wide = wide - (wide @ direction)[..., None] * direction
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "n": self.n, "eps": self.eps}

    def extra_repr(self) -> str:
        return f"{self.n}, eps={self.eps}"


class AffineNorm(nn.Module):
    """A norm that writes the residual stream: normalize, scale, change the basis, shift.

    It stands behind the branches of a post-norm block and in front of block 0 (CLIP), where its affine map cannot move
    into a reader. With ``rotate`` the stream's basis changes in between by a fast Hadamard transform; signs of the
    rotation are part of ``gain``, and ``shift`` is rotated already.

    Args:
        n: Width of input and output.
        eps: Added to the variance.
        centre: Subtract the mean first (LayerNorm); without, the input is known to have none.
        rotate: Hadamard transform behind the gain.

    Attributes:
        gain: (n,).
        shift: (n,).
    """

    kind = "affine_norm"
    gain: Tensor
    shift: Tensor

    def __init__(self, n: int, eps: float, centre: bool = True, rotate: bool = False) -> None:
        super().__init__()
        self.n = n
        self.eps = eps
        self.centre = centre
        self.rotate = rotate
        self.register_buffer("gain", torch.ones(n))
        self.register_buffer("shift", torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centre:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.gain
        if self.rotate:
            wide = hadamard_transform(wide)
        return (wide + self.shift).to(x.dtype)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "n": self.n, "eps": self.eps, "centre": self.centre, "rotate": self.rotate}

    def extra_repr(self) -> str:
        return f"{self.n}, eps={self.eps}, centre={self.centre}, rotate={self.rotate}"


MODULES: Mapping[str, type[nn.Module]] = MappingProxyType(
    {cls.kind: cls for cls in (OnlineHadamard, HeadHadamard, RMSNorm, CentredNorm, AffineNorm, KVQuantizer)}
)


def build_module(config: Mapping[str, Any]) -> nn.Module:
    """Rebuilds a module from its ``config()``.

    Raises:
        UnknownNameError: the config's ``kind`` is not in ``MODULES``.
    """
    kind = config["kind"]
    if kind not in MODULES:
        raise UnknownNameError("module kind", kind, MODULES)
    return MODULES[kind](**{key: value for key, value in config.items() if key != "kind"})
