"""CogVLM2 under the names of the released checkpoint (THUDM/cogvlm2-llama3-chat-19B): LLaMA-3 with a visual expert, a
second set of matrices in every block for the rows of visual tokens, and ``model.vision``.

Which expert a token takes is not quite its type: in the released code a visual token goes to the visual expert only if
the next token is visual too, so the vector behind an image (``eoi``) takes the language expert. Here ``input_ids`` say
so: the vector in front of the patches and the patches are ``image_token_id``, the one behind them ``eoi_token_id``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mqbench.harness.models.trees.eva_clip import EvaClipConfig, EvaClipModel
from mqbench.harness.models.trees.placeholders import (
    FusedAttention,
    OnePositionPerImage,
    WideRMSNorm,
    causal_mask,
    rotary_angles,
)

ROPE_THETA = 500000.0

IMAGE_PX, NUM_POSITIONS = 1344, 9217


class CogVLMConfig(PretrainedConfig):
    """The released ``config.json``; defaults are its values.

    Attributes:
        image_token_id: The placeholder that the released ``build_conversation_input_ids`` writes, a reserved token.
        eoi_token_id: Behind the patches of an image: the next reserved token.
    """

    model_type = "cogvlm"
    sub_configs = {"vision_config": EvaClipConfig}  # noqa: RUF012 (transformers reads it from the class)

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_multi_query_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    template_version: str = "chat"
    image_token_id: int = 128002
    eoi_token_id: int = 128003
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    pad_token_id: int | None = 128002
    tie_word_embeddings: bool = False
    use_cache: bool = True
    vision_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, EvaClipConfig):
            sizes = {"image_size": IMAGE_PX, "num_positions": NUM_POSITIONS}
            self.vision_config = EvaClipConfig(**(self.vision_config or sizes))
        super().__post_init__(**kwargs)


def by_expert(x: Tensor, visual: Tensor | None, vision: nn.Module, language: nn.Module) -> Tensor:
    """Each row through the expert of its modality.

    Shapes: x (B, T, in_features), visual (B, T) bool or None when no token is visual -> (B, T, out_features).
    """
    if visual is None:
        return language(x)
    if visual.all():
        return vision(x)
    seen, read = vision(x[visual]), language(x[~visual])
    mixed = seen.new_empty(*x.shape[:-1], seen.shape[-1])
    mixed[visual], mixed[~visual] = seen, read
    return mixed


class VisionExpertAttention(FusedAttention):
    def __init__(self, config: CogVLMConfig, layer_idx: int) -> None:
        heads, width = config.num_attention_heads, config.hidden_size
        super().__init__(config, heads, config.num_multi_query_heads, width // heads, layer_idx)
        fused = sum(self.widths)
        self.vision_expert_query_key_value = nn.Linear(width, fused)
        self.vision_expert_dense = nn.Linear(width, width, bias=False)
        self.language_expert_query_key_value = nn.Linear(width, fused, bias=False)
        self.language_expert_dense = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        visual: Tensor | None,
        attention_mask: Any,
        past_key_values: Any,
    ) -> Tensor:
        fused = by_expert(x, visual, self.vision_expert_query_key_value, self.language_expert_query_key_value)
        mixed = self.mix(fused, angles, attention_mask, past_key_values, apply_rotary_pos_emb)
        return by_expert(mixed, visual, self.vision_expert_dense, self.language_expert_dense)


class MLP(nn.Module):
    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class VisionExpertMLP(nn.Module):
    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.language_mlp = MLP(config)
        self.vision_mlp = MLP(config)

    def forward(self, x: Tensor, visual: Tensor | None) -> Tensor:
        return by_expert(x, visual, self.vision_mlp, self.language_mlp)


class CogVLMDecoderLayer(nn.Module):
    def __init__(self, config: CogVLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = VisionExpertAttention(config, layer_idx)
        self.mlp = VisionExpertMLP(config)
        self.input_layernorm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = WideRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        angles: tuple[Tensor, Tensor],
        visual: Tensor | None,
        attention_mask: Any,
        past_key_values: Any,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, angles, visual, attention_mask, past_key_values)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), visual)


class CogVLMModel(nn.Module):
    """The decoder, from embeddings to normalized hidden states; it also holds the embeddings and the vision tower."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(CogVLMDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = WideRMSNorm(width, config.rms_norm_eps)
        vision: EvaClipConfig = config.vision_config
        self.vision = EvaClipModel(vision, width, config.intermediate_size, conv_size=vision.hidden_size)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> BaseModelOutputWithPast:
        """``token_type_ids`` (B, T) int64: 1 at rows of the visual expert."""
        config = self.config
        width = config.hidden_size // config.num_attention_heads
        angles = rotary_angles(position_ids, width, ROPE_THETA, inputs_embeds.dtype)
        mask = causal_mask(config, inputs_embeds, attention_mask, past_key_values)
        visual = token_type_ids.bool() if token_type_ids.any() else None
        hidden, shared = inputs_embeds, {"angles": angles, "visual": visual, "attention_mask": mask}
        for layer in self.layers:
            hidden = layer(hidden, **shared, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class CogVLMForCausalLM(OnePositionPerImage):
    """An image is ``image_token_id`` for its first vector and every patch, ``eoi_token_id`` for the one behind."""

    config_class = CogVLMConfig
    _no_split_modules = ["CogVLMDecoderLayer", "TransformerLayer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.register_module("embed_tokens", value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def visual(self, input_ids: Tensor) -> Tensor:
        """(B, T) bool: rows of the visual expert."""
        return input_ids == self.config.image_token_id

    def places(self, input_ids: Tensor) -> Tensor:
        return self.visual(input_ids) | (input_ids == self.config.eoi_token_id)

    def patches(self, input_ids: Tensor) -> Tensor:
        """All of the visual expert's but the first; the vectors around them have positions of their own."""
        visual = self.visual(input_ids)
        patch = torch.zeros_like(visual)
        patch[:, 1:] = visual[:, 1:] & visual[:, :-1]
        return patch

    def look(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision(pixel_values)

    def decode(self, input_ids: Tensor, **inputs: Any) -> BaseModelOutputWithPast:
        return self.model(token_type_ids=self.visual(input_ids).long(), **inputs)
