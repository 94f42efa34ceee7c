"""Rotary embeddings of Qwen-7B: over whole heads, in float32, with a base that grows with long prompts.

Facts: the checkpoint's own code (Qwen/Qwen-VL-Chat).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half


class DynamicRotary(nn.Module):
    """Rotary angles whose base grows with the prompt (NTK), row by row; decoding keeps the prompt's base.

    Args:
        base: Of the wavelengths, up to the training length.
        width: Of a head.
        seq_length: Training length in tokens.
        is_dynamic: Whether the base grows.

    Attributes:
        alpha: (B, 1, 1) growth of the last prompt; None before any.
    """

    def __init__(self, base: float, width: int, seq_length: int, is_dynamic: bool = True) -> None:
        super().__init__()
        self.base, self.width, self.seq_length, self.is_dynamic = base, width, seq_length, is_dynamic
        self.alpha: Tensor | None = None

    def forward(self, position_ids: Tensor, is_prompt: bool) -> tuple[Tensor, Tensor]:
        """Cosines and sines in float32. Shapes: (B, T) -> two of (B, T, width)."""
        if self.alpha is None or is_prompt:
            self.alpha = self.growth(position_ids.amax(-1) + 1)[:, None, None]
        exponents = torch.arange(0, self.width, 2, device=position_ids.device) / self.width
        base = self.base * self.alpha ** (self.width / (self.width - 2))
        angles = position_ids[..., None] / base**exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def growth(self, lengths: Tensor) -> Tensor:
        """1 up to ``seq_length`` tokens, 3 up to twice as many, 7 up to four times. Shapes: (B,) -> (B,)."""
        if not self.is_dynamic:
            return torch.ones_like(lengths, dtype=torch.float32)
        doublings = torch.ceil(torch.log2(lengths.float() / self.seq_length) + 1)
        return (2**doublings - 1).clamp_min(1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32 at least. Shapes: (B, heads, T, d), (B, T, d), (B, T, d) -> (B, heads, T, d)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * cos[:, None] + rotate_half(wide) * sin[:, None]).to(x.dtype)
