"""What resamplers with learned queries share: torch's multi-head attention in four linears, and 2-d sine positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WAVELENGTH = 10000


class CrossAttention(nn.Module):
    """Multi-head attention of queries over patches.

    Args:
        width: Of queries, keys and values.
        num_heads: Heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Shapes: (B, Q, D), (B, L, D), (B, L, D), (B, L) bool or None, all valid -> (B, Q, D)."""
        query, key, value = map(self._heads, (self.q_proj(queries), self.k_proj(keys), self.v_proj(values)))
        mask = None if valid is None else valid[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def sine_positions(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Tables of rows and columns, (length, width) float32 each, whose sum is the 2-d sine position of a patch."""
    quarter = width // 4
    omega = np.arange(quarter, dtype=np.float32)
    omega /= width / 4
    angles = np.arange(length, dtype=np.float32)[:, None] * (1.0 / WAVELENGTH**omega)
    waves = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)).float()
    return F.pad(waves, (width // 2, 0)), F.pad(waves, (0, width // 2))
