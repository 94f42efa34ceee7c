"""Qwen2-VL: its layout (vision LayerNorm blocks, 2x2 merger, RMSNorm LLM) and its registered models."""

from __future__ import annotations

from typing import Any

from torch import nn

from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, NormKind, Part, Tower

VISUAL = "model.visual"
TEXT = "model.language_model"
MERGER = f"{VISUAL}.merger"


def qwen2_vl_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``Qwen2VLForConditionalGeneration`` or of its config (transformers >= 4.52 module names)."""
    config = getattr(model_or_config, "config", model_or_config)
    vision = _vision_tower(config.vision_config)
    return Layout(
        family="qwen2_vl",
        text=_text_tower(config.text_config),
        vision=vision,
        patch_embed=vision.entry[0],
        projector=(f"{MERGER}.mlp.0", f"{MERGER}.mlp.2"),
        unquantized=("lm_head",),
        image_token_id=config.image_token_id,
        vision_root=VISUAL,
        text_root=TEXT,
    )


def _vision_tower(config: Any) -> Tower:
    width, heads = config.embed_dim, config.num_heads

    def block(index: int) -> Block:
        name = f"{VISUAL}.blocks.{index}"
        qkv = f"{name}.attn.qkv"
        return Block(
            name=name,
            attention_norm=Norm(f"{name}.norm1", (qkv,)),
            attention=Attention(qkv, (2 * width, 3 * width), f"{name}.attn.proj", width // heads, heads, heads),
            mlp_norm=Norm(f"{name}.norm2", (f"{name}.mlp.fc1",)),
            mlp_out=f"{name}.mlp.fc2",
        )

    return Tower(
        part=Part.VISION,
        hidden_size=width,
        norm_kind=NormKind.LAYERNORM,
        entry=(f"{VISUAL}.patch_embed.proj",),
        blocks=tuple(block(index) for index in range(config.depth)),
        final_norm=Norm(f"{MERGER}.ln_q", (f"{MERGER}.mlp.0",), chunks=config.spatial_merge_size**2),
    )


def _text_tower(config: Any) -> Tower:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // heads

    def block(index: int) -> Block:
        name = f"{TEXT}.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        value = f"{attention}.v_proj"
        return Block(
            name=name,
            attention_norm=Norm(f"{name}.input_layernorm", (f"{attention}.q_proj", f"{attention}.k_proj", value)),
            attention=Attention(value, (0, kv_heads * head_dim), f"{attention}.o_proj", head_dim, heads, kv_heads),
            mlp_norm=Norm(f"{name}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
            mlp_out=f"{mlp}.down_proj",
            mlp_up=f"{mlp}.up_proj",
        )

    return Tower(
        part=Part.TEXT,
        hidden_size=config.hidden_size,
        norm_kind=NormKind.RMSNORM,
        entry=(f"{TEXT}.embed_tokens", f"{MERGER}.mlp.2"),
        blocks=tuple(block(index) for index in range(config.num_hidden_layers)),
        final_norm=Norm(f"{TEXT}.norm", ("lm_head",)),
    )
