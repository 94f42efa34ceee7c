"""Parts of the paper's models that transformers has no class for, written to be counted on the meta device.

Shapes: a tower maps pixels ``[1, 3, side, side]`` to patches ``[1, (side / patch_size)^2, hidden_size]``; a projector
maps these to visual tokens ``[1, tokens, hidden_size]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from mqbench.harness.blueprint import ProjectorSpec, VisionSpec


class PlainAttention(nn.Module):
    """Multi-head attention with biases and one matrix for queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    """A block of ViT-bigG (LayerNorm before each branch) or EVA2-CLIP-E as GLM-4V has it (after each branch)."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.post_norm = spec.norm == "post"
        self.norm1 = nn.LayerNorm(spec.hidden_size)
        self.attention = PlainAttention(spec.hidden_size, spec.num_heads)
        self.norm2 = nn.LayerNorm(spec.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(spec.hidden_size, spec.intermediate_size),
            nn.GELU(),
            nn.Linear(spec.intermediate_size, spec.hidden_size),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        if self.post_norm:
            hidden = hidden + self.norm1(self.attention(hidden))
            return hidden + self.norm2(self.mlp(hidden))
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class PlainTower(nn.Module):
    """A vision transformer with learned positions, which are resampled when the image has another size."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, spec.hidden_size, spec.patch_size, spec.patch_size, bias=spec.patch_bias)
        self.class_token = nn.Parameter(torch.empty(1, 1, spec.hidden_size)) if spec.class_token else None
        self.positions = nn.Parameter(torch.empty(spec.num_positions, spec.hidden_size))
        self.entry_norm = nn.LayerNorm(spec.hidden_size) if spec.entry_norm else nn.Identity()
        self.blocks = nn.Sequential(*(PlainBlock(spec) for _ in range(spec.num_layers)))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels)
        num_class = 0 if self.class_token is None else 1
        hidden = patches.flatten(2).mT + self._patch_positions(num_class, patches.shape[-1])
        if self.class_token is not None:
            hidden = torch.cat((self.class_token + self.positions[:1], hidden), 1)
        return self.blocks(self.entry_norm(hidden))[:, num_class:]

    def _patch_positions(self, num_class: int, grid: int) -> Tensor:
        stored = self.positions[num_class:]
        side = math.isqrt(stored.shape[0])
        square = stored.mT.reshape(1, -1, side, side)
        return functional.interpolate(square, (grid, grid), mode="bicubic").flatten(2).mT


class Resampler(nn.Module):
    """Learned queries read all patches by cross-attention (Qwen-VL, MiniCPM-V)."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.query = nn.Parameter(torch.empty(spec.num_queries, width))
        self.key_value = nn.Linear(spec.input_size, width, bias=False)
        self.query_norm = nn.LayerNorm(width)
        self.key_value_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, spec.num_heads, batch_first=True)
        self.post_norm = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, width))
        if spec.stored_positions:
            self.positions = nn.Parameter(torch.empty(spec.stored_positions, width), requires_grad=False)

    def forward(self, patches: Tensor) -> Tensor:
        values = self.key_value_norm(self.key_value(patches))
        # Sine positions are added to the keys: a new tensor, so that keys and values are projected apart.
        keys = values + torch.zeros_like(values)
        tokens = self.attention(self.query_norm(self.query)[None], keys, values)[0]
        return self.post_norm(tokens) @ self.proj


class PixelShuffleProjector(nn.Module):
    """Four neighbouring patches make one token (InternVL2)."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.input_size)
        self.mlp = mlp(spec.input_size, spec.hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.mlp(self.norm(patches.reshape(1, -1, self.norm.normalized_shape[0])))


class ConvGluProjector(nn.Module):
    """A 2 x 2 convolution, a gated MLP, and learned tokens around the image (GLM-4V)."""

    def __init__(self, spec: ProjectorSpec) -> None:
        super().__init__()
        width, inner = spec.hidden_size, spec.intermediate_size
        self.conv = nn.Conv2d(spec.input_size, width, 2, 2)
        self.linear = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.begin = nn.Parameter(torch.empty(1, 1, width))
        self.end = nn.Parameter(torch.empty(1, 1, width))

    def forward(self, patches: Tensor) -> Tensor:
        side = math.isqrt(patches.shape[1])
        hidden = self.conv(patches.mT.unflatten(-1, (side, side))).flatten(2).mT
        hidden = functional.gelu(self.norm(self.linear(hidden)))
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


def mlp(input_size: int, hidden_size: int) -> nn.Sequential:
    """Two linears with GELU between (InternVL2, LLaVA-1.5)."""
    return nn.Sequential(nn.Linear(input_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
