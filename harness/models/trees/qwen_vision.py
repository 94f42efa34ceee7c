"""The vision side of Qwen-VL-Chat as a module tree of our own with the released names: OpenCLIP's ViT-bigG without its
class token, and a resampler.

Two parameters of the released checkpoint are no linears there and become linears here, exactly, when a checkpoint is
loaded (``CONVERSIONS``): ``attn_pool.attn.in_proj_weight`` (and bias), which holds queries', keys' and values' weights
one below the other, and ``proj``, which the released code multiplies from the right. Saving turns them back.
Facts: the checkpoint's own code (Qwen/Qwen-VL-Chat) and vLLM's ``qwen_vl.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from mqbench.harness.models.trees.cross_attention import CrossAttention, sine_positions

LAYER_NORM_EPS = 1e-6

CONVERSIONS = (
    *(
        WeightConverter(
            source_patterns=rf"visual\.attn_pool\.attn\.in_proj_{kind}",
            target_patterns=[rf"visual.attn_pool.attn.{letter}_proj.{kind}" for letter in "qkv"],
            operations=[Chunk(dim=0)],
        )
        for kind in ("weight", "bias")
    ),
    WeightConverter(r"visual\.proj$", r"visual.proj.weight", operations=[Transpose()]),
)


class VisualAttention(nn.Module):
    """Self-attention; ``in_proj`` makes (query, key, value) of the first head, then of the next."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (images, patches, C) -> the same."""
        query, key, value = self.in_proj(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class VisualMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class VisualAttentionBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ln_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = VisualAttention(width, num_heads)
        self.mlp = VisualMLP(width, int(width * mlp_ratio))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shapes: (images, patches, C) -> the same."""
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states))
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, layers: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisualAttentionBlock(width, num_heads, mlp_ratio) for _ in range(layers))


class Resampler(nn.Module):
    """Learned queries on a grid read the patches of an image; both have 2-d positions, keys those of a finer grid.

    Args:
        grid: Queries per side.
        width: Of queries, keys and values.
        head_dim: Of a head.
        vision_width: Of the patches.
    """

    def __init__(self, grid: int, width: int, head_dim: int, vision_width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(grid_positions(grid, width), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(grid**2, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = CrossAttention(width, width // head_dim)
        self.ln_q = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, patches: Tensor) -> Tensor:
        """Shapes: (images, patches, vision width) -> (images, grid^2, width)."""
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + resized_positions(self.pos_embed, patches.shape[1])
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(patches), -1, -1)
        return self.attn(queries, keys, values)


def grid_positions(grid: int, width: int) -> Tensor:
    """2-d sine positions of a square grid, (grid^2, width) float32."""
    rows, columns = sine_positions(grid, width)
    return (rows[:, None] + columns[None]).flatten(0, 1)


def resized_positions(positions: Tensor, length: int) -> Tensor:
    """A table of a square grid, bicubically at ``length`` places. Shapes: (grid^2, C) -> (length, C)."""
    source, target = math.isqrt(len(positions)), math.isqrt(length)
    if source == target:
        return positions
    table = positions.to(torch.promote_types(positions.dtype, torch.float32))
    maps = table.T.unflatten(1, (source, source))[None]
    return F.interpolate(maps, size=(target, target), mode="bicubic")[0].flatten(1).T.to(positions.dtype)


class VisionTransformer(nn.Module):
    """Pixels to visual tokens: patches, a norm, blocks, the resampler, a norm, a linear."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width, outputs, patch = visual["width"], visual["output_dim"], visual["patch_size"]
        grid = math.isqrt(visual["n_queries"])
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(grid**2, width))
        self.ln_pre = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.transformer = TransformerBlock(width, visual["layers"], visual["heads"], visual["mlp_ratio"])
        self.attn_pool = Resampler(grid, outputs, visual["head_dim"], width)
        self.ln_post = nn.LayerNorm(outputs, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(outputs, outputs, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Shapes: (images, 3, size, size) -> (images, queries, C)."""
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        hidden = self.ln_pre(patches + resized_positions(self.positional_embedding, patches.shape[1]))
        for block in self.transformer.resblocks:
            hidden = block(hidden)
        return self.proj(self.ln_post(self.attn_pool(hidden)))


@torch.no_grad()
def init_vision_weights(module: nn.Module, std: float) -> None:
    """Random learned positions and queries, and the resampler's sine table, unless a checkpoint has given them."""
    if isinstance(module, VisionTransformer):
        init.normal_(module.positional_embedding, std=std)
    elif isinstance(module, Resampler):
        init.normal_(module.query, std=std)
        init.copy_(module.pos_embed, grid_positions(math.isqrt(len(module.query)), module.query.shape[1]))
