"""InternLM2 as a module tree of our own with the released names: LLaMA's computation, with one matrix ``wqkv`` in which
each key/value head stands behind its queries: (queries of the group, key, value) per group.

Facts: the checkpoints' own code (OpenGVLab/InternVL, internlm2) and vLLM's ``internlm2.py``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from mqbench.harness.models.trees.chunk import prepare_chunk


class InternLM2Config(LlamaConfig):
    """LLaMA's fields under the released names.

    Attributes:
        bias: Whether ``wqkv`` and ``wo`` have biases.
    """

    model_type = "internlm2"
    bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # a released config asks for flash attention; whoever loads the model says what it runs with
        kwargs.pop("attn_implementation", None)
        super().__post_init__(**kwargs)


class InternLM2Attention(nn.Module):
    """Causal grouped-query attention with one matrix for queries, keys and values."""

    is_causal = True

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        fused_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = nn.Linear(config.hidden_size, fused_heads * self.head_dim, bias=config.bias)
        self.wo = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Shapes: (B, T, C), two of (B, T, head_dim) -> (B, T, C)."""
        groups = self.wqkv(hidden_states).unflatten(-1, (-1, self.num_key_value_groups + 2, self.head_dim))
        query, key, value = groups.split([self.num_key_value_groups, 1, 1], dim=-2)
        query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        return self.wo(mixed.flatten(2))


class InternLM2MLP(nn.Module):
    """``w1`` is the gate, ``w3`` what it multiplies, ``w2`` the way down."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
        """Shapes: (B, T, C) -> the same; keywords are those of the attention."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), **attention)
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class InternLM2PreTrainedModel(PreTrainedModel):
    config: InternLM2Config
    config_class = InternLM2Config
    base_model_prefix = "model"
    _no_split_modules = ["InternLM2DecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class InternLM2Model(InternLM2PreTrainedModel):
    """The decoder, from embeddings to normalized hidden states."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InternLM2DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tok_embeddings = value

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a chunk.

        Args:
            inputs_embeds: (B, T, C).
            attention_mask: (B, cached + T), 0 at padding, or a mask as the attention implementation takes it.
            position_ids: (B, T); None: the places behind the cached tokens.
            past_key_values: A cache.
            use_cache: Make a cache when none is given; None: as the config says.
        """
        cache, _, position_ids, mask = prepare_chunk(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache
        )
        hidden, angles = inputs_embeds, self.rotary_emb(inputs_embeds, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=angles, attention_mask=mask, past_key_values=cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=cache)


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin):
    """The decoder with its head, ``output``."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.output = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a chunk of token ids (B, T) or embeddings (B, T, C); see the decoder for the other arguments.

        Only the last ``logits_to_keep`` tokens get logits; 0: all.
        """
        if inputs_embeds is None:
            inputs_embeds = self.model.tok_embeddings(input_ids)
        output = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        logits = self.output(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
