"""What GLM-4V-9B and CogVLM2 share: placeholders of an image, positions that repeat, attention, the outer model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

Rotary = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rotates queries and keys, given cosines and sines."""


class WideRMSNorm(nn.Module):
    """RMSNorm whose gain multiplies in float32, before the cast back (transformers' LLaMA casts first)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(x.dtype)


def put_features(embeds: Tensor, features: Tensor, places: Tensor) -> Tensor:
    """Embeddings with an image's features at its placeholders, images in order.

    Shapes: (B, T, C), (images, per image, C), (B, T) bool -> (B, T, C).

    Raises:
        ValueError: there are more or fewer placeholders than features.
    """
    rows = features.flatten(0, 1)
    if int(places.sum()) != len(rows):
        raise ValueError(
            f"input_ids hold {int(places.sum())} places of visual tokens, but pixel_values make {len(rows)}"
        )
    return embeds.masked_scatter(places[..., None], rows.to(embeds.dtype))


def counted_positions(advances: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Position ids that count from each row's first token that is no padding, (B, T) int64.

    Args:
        advances: (B, T) bool, False at tokens that share the position of the one before.
        attention_mask: (B, T), 0 at padding; None when nothing is padded.
    """
    steps = advances.long() if attention_mask is None else advances.long() * attention_mask.long()
    return (steps.cumsum(-1) - 1).clamp_min(0)


def rotary_angles(position_ids: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings, computed in float32. Shapes: (B, T) -> two of (B, T, width)."""
    exponents = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / width
    angles = position_ids[..., None].float() / theta**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def causal_mask(config: Any, embeds: Tensor, attention_mask: Tensor | None, cache: Any) -> Any:
    """The mask that the config's attention wants. Position ids stay out: repeated ones would look like packed rows."""
    arguments = {"inputs_embeds": embeds, "attention_mask": attention_mask, "past_key_values": cache}
    return create_causal_mask(config=config, **arguments, position_ids=None)


class FusedAttention(nn.Module):
    """Causal attention over one matrix of queries, keys and values; ``num_heads`` share ``num_kv_heads``."""

    is_causal = True

    def __init__(self, config: Any, num_heads: int, num_kv_heads: int, head_dim: int, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.num_key_value_groups = num_heads // num_kv_heads
        self.layer_idx = layer_idx

    def mix(
        self, fused: Tensor, angles: tuple[Tensor, Tensor], attention_mask: Any, cache: Any, rotate: Rotary
    ) -> Tensor:
        """Shapes: (B, T, all heads' queries, keys and values) -> (B, T, num_heads * head_dim)."""
        split = fused.split(self.widths, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in split)
        query, key = rotate(query, key, *angles)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        return mixed.flatten(2)


class OnePositionPerImage(PreTrainedModel, GenerationMixin):
    """Token ids and pixels to logits, where the patches of an image share one position."""

    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True

    def places(self, input_ids: Tensor) -> Tensor:
        """(B, T) bool: where an image's vectors stand, begin and end included."""
        raise NotImplementedError

    def patches(self, input_ids: Tensor) -> Tensor:
        """(B, T) bool: the vectors that share a position."""
        raise NotImplementedError

    def look(self, pixel_values: Tensor) -> Tensor:
        """(images, channels, height, width) -> (images, vectors, text width)."""
        raise NotImplementedError

    def decode(self, input_ids: Tensor, **inputs: Any) -> Any:
        """Normalized hidden states of the decoder."""
        raise NotImplementedError

    def positions(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Position ids of prompts (B, T)."""
        patch = self.patches(input_ids)
        advances = torch.ones_like(patch)
        advances[:, 1:] = ~(patch[:, 1:] & patch[:, :-1])
        return counted_positions(advances, attention_mask)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        return self.positions(inputs_tensor, model_kwargs.get("attention_mask"))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a chunk of tokens.

        Args:
            input_ids: (B, T), with a placeholder for every vector of an image (``places``).
            attention_mask: (B, cached + T), 0 at padding.
            position_ids: (B, T). Needed behind a cache; else counted, with one position for all patches of an image.
            past_key_values: A cache.
            pixel_values: (images, channels, height, width), in order of their placeholders.
            use_cache: Return a cache; None: as the config says.
            logits_to_keep: Last tokens that get logits; 0 for all.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            embeds = put_features(embeds, self.look(pixel_values), self.places(input_ids))
        if position_ids is None:
            position_ids = self.positions(input_ids, attention_mask)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        output = self.decode(
            input_ids,
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        logits = self.get_output_embeddings()(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
