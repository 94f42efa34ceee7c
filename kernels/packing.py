"""Signed 4-bit levels, two per byte, in planar halves: byte j of a row holds column j low and column j + K/2 high.

Planar halves unpack to two contiguous runs of columns with one mask or shift each; neighbours that shared a byte would
have to be interleaved again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(levels: Tensor) -> Tensor:
    """Shapes: (N, K) int8 in [-8, 7], K even -> (N, K/2) uint8. Higher bits of a level are dropped."""
    low, high = levels.view(torch.uint8).chunk(2, dim=1)
    return (low & 0xF) | (high << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of ``pack_int4``. Shapes: (N, K/2) uint8 -> (N, K) int8."""
    low, high = packed << 4, packed & 0xF0
    return torch.cat([low, high], dim=1).view(torch.int8) >> 4  # the shift of a signed byte extends its sign
