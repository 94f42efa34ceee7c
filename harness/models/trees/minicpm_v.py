"""MiniCPM-V 2.6 as a module tree of our own with the released names: SigLIP, a resampler and Qwen2, no remote code.

Two parameters of the released checkpoint are no linears there and become linears here, exactly, when a checkpoint is
loaded: ``resampler.attn.in_proj_weight`` (and bias), which holds queries', keys' and values' weights one below the
other, and ``resampler.proj``, which the released code multiplies from the right. Saving turns them back.
Facts: the checkpoint's own code (OpenBMB/MiniCPM-V) and vLLM's ``minicpmv.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from mqbench.harness.models.slices import MAX_SIDE
from mqbench.harness.models.trees.cross_attention import CrossAttention, sine_positions

LAYER_NORM_EPS = 1e-6
UNK_ID = 128244
"""``<unk>``, the placeholder of visual tokens, in the released tokenizer; adapters ask the tokenizer itself."""


class MiniCPMVConfig(Qwen2Config):
    """The LLM's fields, as in the released config.json, and those of vision tower and resampler.

    Attributes:
        vision_config: Of the SigLIP tower.
        query_num: Visual tokens of a slice.
        drop_vision_last_layer: The tower goes without its last block.
        resampler_head_dim: Width of a head of the resampler; the released code fixes it.
        image_token_id: Id that stands for a visual token.
    """

    model_type = "minicpmv"
    sub_configs = {"vision_config": SiglipVisionConfig}  # noqa: RUF012 (transformers' own form)

    vision_config: Any = None
    query_num: int = 64
    drop_vision_last_layer: bool = False
    resampler_head_dim: int = 128
    image_token_id: int = UNK_ID

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PretrainedConfig):
            sizes = {key: value for key, value in (self.vision_config or {}).items() if key != "model_type"}
            self.vision_config = SiglipVisionConfig(**sizes)
        super().__post_init__(**kwargs)


class VisionEmbeddings(nn.Module):
    """Patches of slices of any aspect ratio; a slice is laid onto the square grid of positions, nearest one below.

    Args:
        config: Of the vision tower.
    """

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        width, self.patch_size = config.hidden_size, config.patch_size
        self.positions_per_side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, self.patch_size, stride=self.patch_size)
        self.position_embedding = nn.Embedding(self.positions_per_side**2, width)

    def forward(self, pixel_values: Tensor, tgt_sizes: Tensor) -> Tensor:
        """Shapes: (slices, 3, patch, longest * patch), (slices, 2) rows and columns -> (slices, longest, width)."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)
        ids = torch.zeros(patches.shape[:2], dtype=torch.long)
        for index, (rows, columns) in enumerate(tgt_sizes.tolist()):
            ids[index, : rows * columns] = self.position_ids(rows, columns)
        return patches + self.position_embedding(ids.to(patches.device))

    def position_ids(self, rows: int, columns: int) -> Tensor:
        """Rows of the position table for a slice's patches, (rows * columns,)."""
        side = self.positions_per_side
        return (nearest_positions(rows, side)[:, None] * side + nearest_positions(columns, side)).flatten()


def nearest_positions(length: int, positions_per_side: int) -> Tensor:
    """The position, 0 to ``positions_per_side`` - 1, of each of ``length`` equal steps along a side.

    Computed in float32 step by step like the released code: its rounding decides at the borders of positions.
    """
    borders = torch.arange(1 / positions_per_side, 1.0, 1 / positions_per_side, dtype=torch.float32)
    step = (1 / torch.tensor(length, dtype=torch.int32)).item()
    return torch.bucketize(torch.arange(0, 1 - 1e-6, step, dtype=torch.float32), borders, right=True)


def valid_patches(tgt_sizes: Tensor) -> Tensor:
    """(slices, longest) bool, False behind a slice's last patch. Shape: (slices, 2) -> as said."""
    lengths = tgt_sizes[:, 0] * tgt_sizes[:, 1]
    return torch.arange(int(lengths.max()), device=tgt_sizes.device) < lengths[:, None]


class VisionTower(PreTrainedModel):
    """SigLIP without its pooling head, on slices of different sizes."""

    config_class = SiglipVisionConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = VisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, tgt_sizes: Tensor) -> Tensor:
        """Shapes: (slices, 3, patch, longest * patch), (slices, 2) -> (slices, longest, width)."""
        hidden = self.embeddings(pixel_values, tgt_sizes)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=valid_patches(tgt_sizes)
        )
        return self.post_layernorm(self.encoder(hidden, attention_mask=mask).last_hidden_state)


class Resampler(nn.Module):
    """A fixed number of learned queries reads the patches of each slice.

    Args:
        num_queries: Visual tokens of a slice.
        width: Of the LLM.
        num_heads: Heads.
        vision_width: Of the vision tower.

    Attributes:
        row_positions: (longest side, width) sines of a patch's row, zero in the first half of the channels.
        column_positions: The same of its column, zero in the second half.
    """

    row_positions: Tensor
    column_positions: Tensor

    def __init__(self, num_queries: int, width: int, num_heads: int, vision_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = CrossAttention(width, num_heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=LAYER_NORM_EPS) for _ in range(3))
        self.proj = nn.Linear(width, width, bias=False)
        rows, columns = sine_positions(MAX_SIDE, width)
        self.register_buffer("row_positions", rows)
        self.register_buffer("column_positions", columns)

    def forward(self, patches: Tensor, tgt_sizes: Tensor) -> Tensor:
        """Shapes: (slices, longest, vision width), (slices, 2) -> (slices, queries, width)."""
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + self.positions(tgt_sizes, patches.shape[1]).to(values.dtype)
        queries = self.ln_q(self.query).expand(len(patches), -1, -1)
        return self.proj(self.ln_post(self.attn(queries, keys, values, valid_patches(tgt_sizes))))

    def positions(self, tgt_sizes: Tensor, longest: int) -> Tensor:
        """(slices, longest, width) sines of every patch; those behind a slice's last patch have the first one's."""
        index = torch.arange(longest, device=tgt_sizes.device).expand(len(tgt_sizes), -1)
        index = index.where(valid_patches(tgt_sizes), 0)
        columns = tgt_sizes[:, 1:]
        return self.row_positions[index // columns] + self.column_positions[index % columns]


class MiniCPMV(PreTrainedModel, GenerationMixin):
    """MiniCPM-V 2.6. Visual tokens are ``config.image_token_id`` in ``input_ids``, ``config.query_num`` per slice."""

    config_class = MiniCPMVConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"resampler\.(row|column)_positions"]  # noqa: RUF012 (no checkpoint holds them)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config)
        self.vpm = VisionTower(config.vision_config)
        if config.drop_vision_last_layer:
            del self.vpm.encoder.layers[-1]
        width = config.hidden_size
        heads = width // config.resampler_head_dim
        self.resampler = Resampler(config.query_num, width, heads, config.vision_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            rows, columns = sine_positions(*module.row_positions.shape)
            init.copy_(module.row_positions, rows)
            init.copy_(module.column_positions, columns)
            init.trunc_normal_(module.query, std=0.02)

    def get_image_features(self, pixel_values: Tensor, tgt_sizes: Tensor) -> Tensor:
        """Visual tokens of every slice.

        Args:
            pixel_values: (slices, 3, patch, longest * patch): a slice's patches side by side, row after row.
            tgt_sizes: (slices, 2) rows and columns of patches.

        Returns:
            (slices, queries, width)
        """
        return self.resampler(self.vpm(pixel_values, tgt_sizes), tgt_sizes)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tgt_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of a batch, as a ``CausalLMOutputWithPast``.

        Args:
            input_ids: (B, T); the slices' placeholders in the order of ``pixel_values``.
            attention_mask: (B, S), 0 at padding.
            position_ids: (B, T).
            past_key_values: Cache of earlier tokens.
            inputs_embeds: (B, T, width) instead of ``input_ids``; then without images.
            pixel_values: Of all slices, as ``get_image_features`` takes them; None without images.
            tgt_sizes: (slices, 2).
            kwargs: For the LLM.

        Raises:
            ValueError: the number of placeholders differs from that of visual tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and tgt_sizes is not None and input_ids is not None:
            features = self.get_image_features(pixel_values, tgt_sizes).flatten(0, 1)
            inputs_embeds = self._with_features(input_ids, inputs_embeds, features)
        return self.llm(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def _with_features(self, input_ids: Tensor, inputs_embeds: Tensor, features: Tensor) -> Tensor:
        places = input_ids == self.config.image_token_id
        if (count := int(places.sum())) != len(features):
            raise ValueError(f"input_ids holds {count} placeholders for {len(features)} visual tokens")
        return inputs_embeds.masked_scatter(places[..., None], features.to(inputs_embeds.dtype))


register_checkpoint_conversion_mapping(
    MiniCPMVConfig.model_type,
    [
        WeightConverter(
            source_patterns=rf"resampler\.attn\.in_proj_{kind}",
            target_patterns=[rf"resampler.attn.{letter}_proj.{kind}" for letter in "qkv"],
            operations=[Chunk(dim=0)],
        )
        for kind in ("weight", "bias")
    ]
    + [WeightConverter(r"resampler\.proj$", r"resampler.proj.weight", operations=[Transpose()])],
    overwrite=True,
)
