"""InternVL2 as a module tree of our own with the released names: InternViT-300M, ``mlp1`` over pixel-shuffled patches,
InternLM2.

Facts: the checkpoints' own code (OpenGVLab/InternVL, internvl_chat).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from mqbench.harness.models.trees.internlm2 import InternLM2Config, InternLM2ForCausalLM
from mqbench.harness.models.trees.placeholders import put_features

IMG_CONTEXT_ID = 92546
"""``<IMG_CONTEXT>``, the placeholder of a visual token, in the released tokenizer."""


class InternVisionConfig(PretrainedConfig):
    """Of InternViT-300M; the released ``vision_config``.

    Raises:
        ValueError: the tower is InternViT-6B, which normalizes queries and keys and has RMSNorms.
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_normalization: bool = False
    norm_type: str = "layer_norm"
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.qk_normalization or self.norm_type != "layer_norm":
            raise ValueError("this vision tower is InternViT-6B; choose a model with InternViT-300M")


class InternVLChatConfig(PretrainedConfig):
    """The released ``config.json``.

    Attributes:
        vision_config: An ``InternVisionConfig``, or its fields.
        llm_config: An ``InternLM2Config``, or its fields.
        downsample_ratio: Visual tokens per side over patches per side.
        image_token_id: Placeholder of a visual token; the released code asks the tokenizer for it.

    Raises:
        ValueError: the LLM is of another family, or the features are not the last block's in the order "v2".
    """

    model_type = "internvl_chat"
    sub_configs = {"vision_config": InternVisionConfig, "llm_config": InternLM2Config}  # noqa: RUF012

    vision_config: Any = None
    llm_config: Any = None
    downsample_ratio: float = 0.5
    select_layer: int = -1
    ps_version: str = "v2"
    image_token_id: int = IMG_CONTEXT_ID
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, InternVisionConfig):
            self.vision_config = InternVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.llm_config, InternLM2Config):
            found = (self.llm_config or {}).get("model_type", InternLM2Config.model_type)
            if found != InternLM2Config.model_type:
                raise ValueError(f"the LLM is '{found}'; only InternVL2 models with InternLM2 are covered")
            self.llm_config = InternLM2Config(**(self.llm_config or {}))
        if (self.select_layer, self.ps_version) != (-1, "v2"):
            raise ValueError("only features of the last block (select_layer -1) in the order 'v2' are covered")
        super().__post_init__(**kwargs)

    def get_text_config(self, *_: Any, **__: Any) -> InternLM2Config:
        """The LLM's, which ``generate`` asks for the number of layers."""
        return self.llm_config


class InternVisionEmbeddings(nn.Module):
    """Patches behind a class token, with learned positions."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(1, (config.image_size // patch) ** 2 + 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Shapes: (tiles, 3, size, size) -> (tiles, 1 + patches, C)."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self.position_embedding


class InternAttention(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (tiles, patches, C) -> the same."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class InternMLP(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class InternVisionEncoderLayer(nn.Module):
    """A pre-norm block; ``ls1`` and ``ls2`` scale the branches (LayerScale)."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shapes: (tiles, patches, C) -> the same."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states)) * self.ls1
        return hidden_states + self.mlp(self.norm2(hidden_states)) * self.ls2


class InternVisionEncoder(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config) for _ in range(config.num_hidden_layers))


class InternVisionModel(nn.Module):
    """The vision tower, without a norm behind its last block."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Shapes: (tiles, 3, size, size) -> (tiles, 1 + patches, C)."""
        hidden = self.embeddings(pixel_values)
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return hidden


def pixel_shuffle(patches: Tensor, factor: int) -> Tensor:
    """Joins the patches of each square of ``factor`` x ``factor``, row after row.

    Shapes: (tiles, side * side, C) -> (tiles, (side / factor)^2, factor^2 * C).
    """
    side = round(patches.shape[1] ** 0.5) // factor
    squares = patches.unflatten(1, (side, factor, side, factor)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


class InternVLChatModel(PreTrainedModel, GenerationMixin):
    """InternVL2; visual tokens are ``config.image_token_id`` in ``input_ids``, as many per tile as the tile makes."""

    config: InternVLChatConfig
    config_class = InternVLChatConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _no_split_modules = ["InternVisionEncoderLayer", "InternLM2DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model = InternLM2ForCausalLM(config.get_text_config())
        self.shuffle_factor = round(1 / config.downsample_ratio)
        inputs, outputs = config.vision_config.hidden_size * self.shuffle_factor**2, config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs)
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternVisionEmbeddings):
            init.normal_(module.class_embedding)
            init.normal_(module.position_embedding)
        elif isinstance(module, InternVisionEncoderLayer):
            factor = self.config.vision_config.initializer_factor
            init.constant_(module.ls1, factor)
            init.constant_(module.ls2, factor)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens of every tile. Shapes: (tiles, 3, size, size) -> (tiles, tokens, LLM's width)."""
        patches = self.vision_model(pixel_values)[:, 1:]
        return self.mlp1(pixel_shuffle(patches, self.shuffle_factor))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **llm: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a chunk.

        Args:
            input_ids: (B, T); the tiles' placeholders in the order of ``pixel_values``.
            attention_mask: (B, cached + T), 0 at padding.
            position_ids: (B, T); None: the places behind the cached tokens.
            past_key_values: A cache.
            inputs_embeds: (B, T, C) instead of ``input_ids``; then without images.
            pixel_values: (tiles, 3, size, size) of all images; None without images.
            llm: For the LLM: ``use_cache``, ``logits_to_keep``.

        Raises:
            ValueError: the number of placeholders differs from that of visual tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and input_ids is not None:
            places = input_ids == self.config.image_token_id
            inputs_embeds = put_features(inputs_embeds, self.get_image_features(pixel_values), places)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **llm,
        )
