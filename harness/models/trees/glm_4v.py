"""GLM-4V-9B under the names of the released checkpoint (THUDM/glm-4v-9b): ``transformer.vision``, a ChatGLM decoder
``transformer.encoder`` with fused matrices and rotary embeddings on half of each head, ``transformer.output_layer``.

The released model puts the features of an image in place of three tokens (begin, pad, end), which makes rows longer
than their ``input_ids``. Here ``input_ids`` hold a placeholder for every visual token; embeddings, positions and masks
are the same. The patches of an image share one position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

from mqbench.harness.models.trees.eva_clip import EvaClipConfig, EvaClipModel
from mqbench.harness.models.trees.placeholders import (
    FusedAttention,
    OnePositionPerImage,
    WideRMSNorm,
    causal_mask,
    rotary_angles,
)

ROPE_THETA = 10000.0


class ChatGLMConfig(PretrainedConfig):
    """The released ``config.json``; defaults are its values.

    Attributes:
        image_token_id: The placeholder of a patch: the vocabulary's last row, which is padding and no token.
    """

    model_type = "chatglm"
    sub_configs = {"vision_config": EvaClipConfig}  # noqa: RUF012 (transformers reads it from the class)
    attribute_map = {"num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size"}  # noqa: RUF012

    num_layers: int = 40
    padded_vocab_size: int = 151552
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    layernorm_epsilon: float = 1.5625e-07
    rope_ratio: float = 1
    boi_token_id: int = 151339
    eoi_token_id: int = 151340
    image_token_id: int = 151551
    pad_token_id: int | None = 151329
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    vision_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, EvaClipConfig):
            self.vision_config = EvaClipConfig(**(self.vision_config or {"scaling_factor": 8}))
        super().__post_init__(**kwargs)


class SelfAttention(FusedAttention):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        heads, head_dim = config.num_attention_heads, config.kv_channels
        super().__init__(config, heads, config.multi_query_group_num, head_dim, layer_idx)
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths))
        self.dense = nn.Linear(heads * head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attention_mask: Any, past_key_values: Any) -> Tensor:
        fused = self.query_key_value(x)
        return self.dense(self.mix(fused, angles, attention_mask, past_key_values, apply_rotary_pos_emb))


class MLP(nn.Module):
    """``dense_h_to_4h`` makes the gate and what it multiplies, in this order."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = WideRMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = WideRMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self, hidden_states: Tensor, angles: tuple[Tensor, Tensor], attention_mask: Any, past_key_values: Any
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attention(normed, angles, attention_mask, past_key_values)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GLMTransformer(nn.Module):
    """The decoder, from embeddings to normalized hidden states."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(GLMBlock(config, index) for index in range(config.num_layers))
        self.final_layernorm = WideRMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> BaseModelOutputWithPast:
        theta, width = ROPE_THETA * self.config.rope_ratio, self.config.kv_channels // 2
        angles = rotary_angles(position_ids, width, theta, inputs_embeds.dtype)
        mask = causal_mask(self.config, inputs_embeds, attention_mask, past_key_values)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, angles=angles, attention_mask=mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden), past_key_values=past_key_values)


class Embedding(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class ChatGLMModel(nn.Module):
    """What stands under ``transformer`` in the checkpoint; ``ChatGLMForConditionalGeneration`` runs its parts."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        width = config.hidden_size
        self.vision = EvaClipModel(config.vision_config, width, config.ffn_hidden_size, conv_size=width)


class ChatGLMForConditionalGeneration(OnePositionPerImage):
    """An image is ``boi_token_id``, ``image_token_id`` for every patch, ``eoi_token_id``."""

    config_class = ChatGLMConfig
    _no_split_modules = ["GLMBlock", "TransformerLayer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.embedding.register_module("word_embeddings", value)

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def places(self, input_ids: Tensor) -> Tensor:
        config = self.config
        return torch.isin(
            input_ids, input_ids.new_tensor([config.boi_token_id, config.image_token_id, config.eoi_token_id])
        )

    def patches(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.image_token_id

    def look(self, pixel_values: Tensor) -> Tensor:
        return self.transformer.vision(pixel_values)

    def decode(self, input_ids: Tensor, **inputs: Any) -> BaseModelOutputWithPast:
        return self.transformer.encoder(**inputs)
