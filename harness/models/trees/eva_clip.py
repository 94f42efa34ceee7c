"""EVA2-CLIP-E with its adapter, the vision tower of GLM-4V-9B and CogVLM2, under the names of the released checkpoints.

Blocks normalize behind their branches: x + LayerNorm(branch(x)). The class token is dropped, a 2 x 2 convolution joins
four patches, a gated adapter writes the LLM's stream, and learned vectors stand around the patches of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.activations import ACT2FN


class EvaClipConfig(PretrainedConfig):
    """``vision_config`` of both released checkpoints; defaults are GLM-4V-9B's."""

    model_type = "eva2_clip"
    base_config_key = "vision_config"

    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 63
    num_heads: int = 16
    in_channels: int = 3
    image_size: int = 1120
    patch_size: int = 14
    num_positions: int = 6401
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout_prob: float = 0.0
    scaling_factor: float = 1.0

    @property
    def num_patches(self) -> int:
        """Patches of an image behind the convolution."""
        return (self.image_size // self.patch_size // 2) ** 2


class PatchEmbedding(nn.Module):
    """Pixels (N, C, H, W) to class token and patches with their positions, (N, 1 + patches, hidden_size)."""

    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=size, stride=size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        positions = self.position_embedding.weight
        patches = self.proj(pixels.to(positions.dtype)).flatten(2).transpose(1, 2)
        cls = self.cls_embedding.expand(len(patches), -1, -1)
        return torch.cat([cls, patches], dim=1) + positions


class Attention(nn.Module):
    """Every token sees every token."""

    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, tokens, head_dim)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.dense(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class TransformerLayer(nn.Module):
    """x + LayerNorm(attention(x)), then x + LayerNorm(MLP(x)); ``input_layernorm`` has its name from elsewhere."""

    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.input_layernorm(self.attention(hidden_states))
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class Transformer(nn.Module):
    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class GatedAdapter(nn.Module):
    """Linear, LayerNorm, GELU and a gated MLP. Shapes: (..., in_features) -> (..., hidden_size)."""

    def __init__(self, in_features: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.linear_proj = nn.Linear(in_features, hidden_size, bias=False)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.dense_h_to_4h = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.dense_4h_to_h = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))


class EvaClipModel(nn.Module):
    """Pixels (N, C, image_size, image_size) to what the LLM reads, (N, 1 + num_patches + 1, hidden_size).

    Args:
        config: Of the tower.
        hidden_size: Of the LLM.
        intermediate_size: Of the adapter.
        conv_size: Output channels of the convolution.
    """

    def __init__(self, config: EvaClipConfig, hidden_size: int, intermediate_size: int, conv_size: int) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.transformer = Transformer(config)
        self.conv = nn.Conv2d(config.hidden_size, conv_size, kernel_size=2, stride=2)
        self.linear_proj = GatedAdapter(conv_size, hidden_size, intermediate_size)
        self.boi = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.grid = config.image_size // config.patch_size
        self.scaling_factor = config.scaling_factor

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.transformer(self.patch_embedding(pixel_values))[:, 1:]
        joined = self.conv(patches.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
        features = self.linear_proj(joined.flatten(2).transpose(1, 2))
        boi, eoi = (vector.expand(len(features), -1, -1) for vector in (self.boi, self.eoi))
        return torch.cat([boi, features, eoi], dim=1) / self.scaling_factor
