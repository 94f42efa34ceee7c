"""InternVL (2.5, 3 and their native transformers classes): InternViT with LayerScale, pixel shuffle, one norm over the
four joined vectors, a two-layer projector; Qwen2, InternLM2 (as LLaMA) or LLaMA as LLM."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.models.towers import HEAD, llm_tower
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "internvl"
VISUAL, TEXT = "model.vision_tower", "model.language_model"
PROJECTOR = "model.multi_modal_projector"


def internvl_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of an ``InternVLForConditionalGeneration`` or of its config.

    Raises:
        ValueError: the vision tower normalizes queries and keys, or behind its last block (InternViT-6B).
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    return Layout(
        family=FAMILY_NAME,
        text=llm_tower(config.text_config, TEXT, writers=(f"{PROJECTOR}.linear_2",)),
        vision=_vision_tower(config),
        patch_embed=f"{VISUAL}.embeddings.patch_embeddings.projection",
        projector=(f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"),
        unquantized=(HEAD,),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
    )


def _vision_tower(config: Any) -> Tower:
    vision = config.vision_config
    if vision.norm_type != "layer_norm" or not vision.use_mean_pooling:
        raise ValueError(f"the layout of '{FAMILY_NAME}' covers InternViT-300M, not this vision tower (InternViT-6B)")
    chunks = round(1 / config.downsample_ratio) ** 2
    embeddings = f"{VISUAL}.embeddings"
    entry = [f"{embeddings}.patch_embeddings.projection", f"{embeddings}.cls_token"]
    if vision.use_absolute_position_embeddings:
        entry.append(f"{embeddings}.position_embeddings")
    return Tower(
        part=Part.VISION,
        hidden_size=vision.hidden_size,
        norm_kind=NormKind.LAYERNORM,
        entry=tuple(entry),
        blocks=tuple(_vision_block(vision, index) for index in range(vision.num_hidden_layers)),
        final_norm=Norm(f"{PROJECTOR}.layer_norm", (f"{PROJECTOR}.linear_1",), chunks=chunks, joint=True),
    )


def _vision_block(config: Any, index: int) -> Block:
    name, heads = f"{VISUAL}.encoder.layer.{index}", config.num_attention_heads
    attention = f"{name}.attention"
    value = f"{attention}.v_proj"
    shape = (config.hidden_size // heads, heads, heads)
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.layernorm_before", (f"{attention}.q_proj", f"{attention}.k_proj", value)),
        attention=Attention(value, (0, config.hidden_size), f"{attention}.projection_layer", *shape),
        mlp_norm=Norm(f"{name}.layernorm_after", (f"{name}.mlp.fc1",)),
        mlp_out=f"{name}.mlp.fc2",
        attention_scale=f"{name}.lambda_1",
        mlp_scale=f"{name}.lambda_2",
    )


def _build(config: Any) -> nn.Module:
    from transformers import InternVLForConditionalGeneration

    return InternVLForConditionalGeneration(config)


def _config(vision: Mapping[str, Any], text: Mapping[str, Any], image_token_id: int) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, use_mean_pooling=True, use_qk_norm=False),
        text_config=Qwen2Config(**text),
        image_token_id=image_token_id,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    return config


TINY_VISION = MappingProxyType(
    {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_bias": True,
        "image_size": (32, 32),
        "patch_size": (8, 8),
    }
)
TINY_TEXT = MappingProxyType(
    {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
TINY_IMAGE_ID = 63
INTERNVIT_300M = MappingProxyType(
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "attention_bias": True,
        "image_size": (448, 448),
        "patch_size": (14, 14),
    }
)
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
QWEN2: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "internvl3-1b": (896, 4864, 24, 14, 2),
        "internvl3-2b": (1536, 8960, 28, 12, 2),
        "internvl3-8b": (3584, 18944, 28, 28, 4),
    }
)
"""LLMs of the released checkpoints with InternViT-300M; embeddings and head are separate at every size."""
VOCABULARY = 151674
IMAGE_ID = 151667


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    counts = (1, 0, 2)
    batch = prompts(counts, 4, TINY_IMAGE_ID, generator)
    return batch | {"pixel_values": random_pixels(model, (sum(counts), 3, 32, 32), generator)}


def _released_config(name: str) -> Any:
    text = dict(zip(SIZES, QWEN2[name], strict=True)) | {"vocab_size": VOCABULARY}
    return _config(INTERNVIT_300M, text, IMAGE_ID)


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=internvl_layout,
    tiny_config=lambda: _config(TINY_VISION, TINY_TEXT, TINY_IMAGE_ID),
    tiny_inputs=_tiny_inputs,
    configs={name: partial(_released_config, name) for name in QWEN2},
)
