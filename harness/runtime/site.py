"""What happens to rows on their way into a linear: online transform, then rounding to levels, or neither."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mqbench.harness.runtime.rows import Rows
from mqbench.kernels import api

FLOAT8_DTYPE = torch.float8_e4m3fn
MIN_FLOAT8_SCALE = 1e-12
"""Of rows of zeros."""


@dataclass(frozen=True)
class Levels:
    """Quantized rows between an operation that made them and the linear that reads them.

    Attributes:
        levels: (M, K) int8, or float8.
        row_scale: (M,) per token; or static: (1,) for all rows, (S,) with ``row_index``.
        row_index: (M,) uint8 index of each row's static scale, or None.
        x0: (M,) input channel 0 in floating point, where RMS keeps it out of the levels, or None.
    """

    levels: Tensor
    row_scale: Tensor
    row_index: Tensor | None = None
    x0: Tensor | None = None


class FloatSite(nn.Module):
    """Rows stay in floating point.

    Args:
        transform: Exact online transform of the last dimension, or None.
    """

    fuses = False

    def __init__(self, transform: nn.Module | None = None) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        return x if self.transform is None else self.transform(x).contiguous()

    def shares(self, other: nn.Module) -> bool:
        """One input serves both."""
        return isinstance(other, FloatSite) and self.transform is None and other.transform is None


class Float8Site(nn.Module):
    """Rows become E4M3 with one dynamic scale per row."""

    fuses = False

    def forward(self, x: Tensor) -> Levels:
        scale = x.abs().amax(-1, keepdim=True).float() / torch.finfo(FLOAT8_DTYPE).max
        scale = scale.clamp_min(MIN_FLOAT8_SCALE)
        return Levels((x / scale).to(FLOAT8_DTYPE), scale[:, 0])

    def shares(self, other: nn.Module) -> bool:
        """One input serves both."""
        return isinstance(other, Float8Site)


class IntegerSite(nn.Module):
    """Rows become integers.

    Args:
        num_bits: Of the levels.
        scale: (1,) static, or (2,) static as (text, visual); None for one dynamic scale per row.
        rows: Modality of the rows, for two scales.
        hadamard: Online Hadamard transform in front.
        transform: Another exact online transform in front, or None.
        takes_x0: Channel 0, behind the transform, passes by in floating point.
        sliced: Rows of two modalities are gathered, and quantized apart.
    """

    scale: Tensor | None

    def __init__(
        self,
        num_bits: int,
        scale: Tensor | None = None,
        rows: Rows | None = None,
        *,
        hadamard: bool = False,
        transform: nn.Module | None = None,
        takes_x0: bool = False,
        sliced: bool = False,
    ) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.register_buffer("scale", scale, persistent=False)
        self.rows = rows
        self.hadamard = hadamard
        self.transform = transform
        self.takes_x0 = takes_x0
        self.sliced = sliced and scale is not None and len(scale) > 1

    @property
    def fuses(self) -> bool:
        """The operation in front may quantize its result itself."""
        return not (self.hadamard or self.takes_x0 or self.sliced) and self.transform is None

    def slices(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Indices of the rows that each static scale quantizes, when they are to be gathered; else None."""
        return self.rows.slices(x.device) if self.sliced and self.rows is not None else None

    def forward(self, x: Tensor) -> Levels:
        return self.quantize(x, *self.static(x.device))

    def static(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Static scales of the running pass and each row's index into them; (None, None) when dynamic."""
        if self.scale is None or len(self.scale) == 1 or self.rows is None:
            return self.scale, None
        index = self.rows.index(device)
        return (self.scale[:1], None) if index is None else (self.scale, index)

    def quantize(self, x: Tensor, scale: Tensor | None, row_index: Tensor | None) -> Levels:
        """Transforms and rounds rows (M, K) under given scales."""
        if self.hadamard:
            levels, row_scale, taken = api.hadamard_quantize(x, scale, row_index, self.takes_x0, self.num_bits)
            return self.levels(levels, row_scale, scale, row_index, taken if self.takes_x0 else None)
        if self.transform is not None:
            x = self.transform(x).contiguous()
        x0: Tensor | None = None
        if self.takes_x0:
            x0, x = x[:, 0].clone(), x.clone()
            x[:, 0] = 0
        if scale is None:
            return Levels(*api.quantize_token(x, self.num_bits), None, x0)
        return Levels(api.quantize_static(x, scale, row_index, self.num_bits), scale, row_index, x0)

    def levels(
        self, levels: Tensor, row_scale: Tensor, scale: Tensor | None, index: Tensor | None, x0: Tensor | None = None
    ) -> Levels:
        """The result of a fused operation: its row scales when dynamic, else the static ones."""
        return Levels(levels, row_scale if scale is None else scale, index, x0)

    def shares(self, other: nn.Module) -> bool:
        """One input serves both: the same grid and scales, and nothing in front."""
        if not isinstance(other, IntegerSite) or not self._is_plain or not other._is_plain:
            return False
        if self.num_bits != other.num_bits or self.sliced != other.sliced or self.rows is not other.rows:
            return False
        if self.scale is None or other.scale is None:
            return self.scale is other.scale
        return torch.equal(self.scale, other.scale)

    @property
    def _is_plain(self) -> bool:
        return self.transform is None and not self.hadamard and not self.takes_x0

    def extra_repr(self) -> str:
        kind = "per token" if self.scale is None else f"{len(self.scale)} static"
        return f"A{self.num_bits} {kind}{', hadamard' if self.hadamard else ''}{', x0' if self.takes_x0 else ''}"


class OnlineHadamardRows(nn.Module):
    """The online Hadamard transform of floating-point rows, by the operation of ``kernels.api``."""

    def forward(self, x: Tensor) -> Tensor:
        return api.hadamard(x)


Site = FloatSite | Float8Site | IntegerSite
