"""GLM-4V-9B: EVA2-CLIP-E normalized behind its branches, read by a 2 x 2 convolution without a norm; a gated adapter;
ChatGLM as LLM, with fused qkv and fused gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.models.eva_clip import patch_embed, projector, vision_tower
from mqbench.harness.models.family import Family, prompts, random_pixels
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Tower
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "glm_4v"
VISUAL, TEXT = "transformer.vision", "transformer.encoder"
EMBEDDING, HEAD = "transformer.embedding.word_embeddings", "transformer.output_layer"


def glm_4v_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``ChatGLMForConditionalGeneration`` (our module tree) or of its config."""
    config: Any = getattr(model_or_config, "config", model_or_config)
    return Layout(
        family=FAMILY_NAME,
        text=_text_tower(config),
        vision=vision_tower(config.vision_config, VISUAL),
        patch_embed=patch_embed(VISUAL),
        projector=projector(VISUAL),
        unquantized=(HEAD,),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
    )


def _text_tower(config: Any) -> Tower:
    return Tower(
        part=Part.TEXT,
        hidden_size=config.hidden_size,
        norm_kind=NormKind.RMSNORM,
        entry=(EMBEDDING, f"{VISUAL}.boi", f"{VISUAL}.eoi", projector(VISUAL)[-1]),
        blocks=tuple(_block(config, index) for index in range(config.num_layers)),
        final_norm=Norm(f"{TEXT}.final_layernorm", (HEAD,)),
    )


def _block(config: Any, index: int) -> Block:
    name = f"{TEXT}.layers.{index}"
    attention, mlp = f"{name}.self_attention", f"{name}.mlp"
    heads, kv_heads, head_dim = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
    value, first = f"{attention}.query_key_value", (heads + kv_heads) * head_dim
    rows = first, first + kv_heads * head_dim
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.input_layernorm", (value,)),
        attention=Attention(value, rows, f"{attention}.dense", head_dim, heads, kv_heads),
        mlp_norm=Norm(f"{name}.post_attention_layernorm", (f"{mlp}.dense_h_to_4h",)),
        mlp_out=f"{mlp}.dense_4h_to_h",
    )


def _build(config: Any) -> nn.Module:
    from mqbench.harness.models.trees.glm_4v import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration(config)


def _config(settings: Mapping[str, Any]) -> Any:
    from mqbench.harness.models.trees.glm_4v import ChatGLMConfig

    config = ChatGLMConfig(**settings)
    config._attn_implementation = "sdpa"
    return config


TINY_IMAGE_PX = 32
TINY = MappingProxyType(
    {
        "num_layers": 2,
        "padded_vocab_size": 64,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "kv_channels": 8,
        "num_attention_heads": 6,
        "multi_query_group_num": 2,
        "layernorm_epsilon": 1e-6,
        "boi_token_id": 61,
        "eoi_token_id": 62,
        "image_token_id": 63,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "vision_config": MappingProxyType(
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_heads": 2,
                "image_size": TINY_IMAGE_PX,
                "patch_size": 8,
                "num_positions": 17,
                "scaling_factor": 8,
            }
        ),
    }
)


def _tiny_inputs(model: nn.Module, generator: torch.Generator) -> Batch:
    config: Any = model.config
    counts = 1, 0, 2
    around = ((config.boi_token_id,), (config.eoi_token_id,))
    batch = prompts(counts, config.vision_config.num_patches, config.image_token_id, generator, around)
    pixels = random_pixels(model, (sum(counts), 3, TINY_IMAGE_PX, TINY_IMAGE_PX), generator)
    return batch | {"pixel_values": pixels}


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=glm_4v_layout,
    tiny_config=lambda: _config(TINY),
    tiny_inputs=_tiny_inputs,
    configs={"glm-4v-9b": lambda: _config({})},
)
