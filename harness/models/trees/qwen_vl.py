"""Qwen-VL-Chat as a module tree of our own with the released names: OpenCLIP's ViT-bigG and a resampler under
``transformer.visual``, Qwen-7B in ``transformer.h``.

Positions of a padded row count from its first token (``position_ids``); the released code counts padding too.
Facts: the checkpoint's own code (Qwen/Qwen-VL-Chat) and vLLM's ``qwen_vl.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from mqbench.harness.models.trees.chunk import prepare_chunk
from mqbench.harness.models.trees.placeholders import put_features
from mqbench.harness.models.trees.qwen_rotary import DynamicRotary, rotated
from mqbench.harness.models.trees.qwen_vision import CONVERSIONS, VisionTransformer, init_vision_weights

IMAGE_START_ID, IMAGE_END_ID, IMAGE_PAD_ID = 151857, 151858, 151859
"""``<img>``, ``</img>`` and ``<imgpad>`` of the released tokenizer."""

RELEASED_VISUAL = {
    "heads": 16,
    "image_size": 448,
    "image_start_id": IMAGE_START_ID,
    "layers": 48,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "patch_size": 14,
    "width": 1664,
}
RESAMPLER = {"n_queries": 256, "head_dim": 128}
"""What the released code fixes."""


class QWenConfig(PretrainedConfig):
    """The released ``config.json``; defaults are its values.

    Attributes:
        intermediate_size: Of gate and up together.
        seq_length: Tokens of training; longer rows get other rotary angles (NTK) and sharper attention (log n).
        visual: Of vision tower and resampler, see ``RELEASED_VISUAL`` and ``RESAMPLER``.
        image_token_id: Placeholder of a visual token.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    rotary_emb_base: float = 10000
    rotary_pct: float = 1.0
    seq_length: int = 2048
    max_position_embeddings: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    visual: dict[str, Any] | None = None
    image_token_id: int = IMAGE_PAD_ID
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def __post_init__(self, **kwargs: Any) -> None:
        self.visual = RESAMPLER | dict(self.visual or RELEASED_VISUAL)
        super().__post_init__(**kwargs)
        if self.rotary_pct != 1.0 or self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                "only rotary embeddings over whole heads of kv_channels, a hidden_size together, are covered"
            )


class QWenAttention(nn.Module):
    """Causal attention; ``c_attn`` makes all queries, then all keys, then all values."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width = config.hidden_size
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        angles: tuple[Tensor, Tensor],
        sharpness: Tensor | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Shapes: (B, T, C), two of (B, T, head_dim), (B, T) or None -> (B, T, C)."""
        config = self.config
        fused = self.c_attn(hidden_states).unflatten(-1, (3, config.num_attention_heads, config.kv_channels))
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        query, key = rotated(query, *angles), rotated(key, *angles)
        if sharpness is not None:
            query = query * sharpness[:, None, :, None].to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=config.kv_channels**-0.5)
        return self.c_proj(mixed.flatten(2))


class QWenMLP(nn.Module):
    """``w2`` is the gate, ``w1`` what it multiplies, ``c_proj`` the way down."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(width, inner, bias=bias)
        self.w2 = nn.Linear(width, inner, bias=bias)
        self.c_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QWenBlock(nn.Module):
    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
        """Shapes: (B, T, C) -> the same; keywords are those of the attention."""
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **attention)
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QWenPreTrainedModel(PreTrainedModel):
    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["QWenBlock", "VisualAttentionBlock", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"attn\.masked_bias"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_vision_weights(module, self.config.initializer_range)


class QWenModel(QWenPreTrainedModel):
    """The decoder, from embeddings to normalized hidden states; ``visual`` stands under it in the checkpoint."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        assert config.visual is not None
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.visual = VisionTransformer(config.visual)
        self.rotary_emb = DynamicRotary(
            config.rotary_emb_base, config.kv_channels, config.seq_length, config.use_dynamic_ntk
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

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
        cache, start, position_ids, mask = prepare_chunk(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache
        )
        angles, sharpness = self.rotary_emb(position_ids, start == 0), self.sharpness(position_ids)
        hidden = inputs_embeds
        for block in self.h:
            hidden = block(hidden, angles=angles, sharpness=sharpness, attention_mask=mask, past_key_values=cache)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden), past_key_values=cache)

    def sharpness(self, position_ids: Tensor) -> Tensor | None:
        """Factors of queries beyond the training length, log n to the base of that length. Shapes: (B, T) -> (B, T)."""
        if not self.config.use_logn_attn:
            return None
        return (torch.log(position_ids + 1) / math.log(self.config.seq_length)).clamp_min(1)


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """Qwen-VL-Chat; visual tokens are ``config.image_token_id`` in ``input_ids``, between ``<img>`` and ``</img>``."""

    main_input_name = "input_ids"
    input_modalities = ("image", "text")

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a chunk; see the decoder for what is not named here.

        Args:
            input_ids: (B, T); the images' placeholders in the order of ``pixel_values``.
            inputs_embeds: (B, T, C) instead of ``input_ids``; then without images.
            pixel_values: (images, 3, size, size); None without images.
            logits_to_keep: Last tokens that get logits; 0: all.

        Raises:
            ValueError: the number of placeholders differs from that of visual tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.transformer.wte(input_ids)
        if pixel_values is not None and input_ids is not None:
            places = input_ids == self.config.image_token_id
            inputs_embeds = put_features(inputs_embeds, self.transformer.visual(pixel_values), places)
        output = self.transformer(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


register_checkpoint_conversion_mapping(QWenLMHeadModel.__name__, list(CONVERSIONS), overwrite=True)
