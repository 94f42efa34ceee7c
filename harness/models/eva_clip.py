"""What the layouts of GLM-4V-9B and CogVLM2 say about their common vision tower and adapter."""

from __future__ import annotations

from typing import Any

from mqbench.harness.quant.layout import Attention, Block, Norm, NormKind, NormPlace, Part, Reader, Tower

JOINED_PATCHES = 4


def vision_tower(config: Any, root: str) -> Tower:
    """EVA2-CLIP-E: LayerNorms behind the branches, and a 2 x 2 convolution that reads the stream without a norm.

    Args:
        config: The ``vision_config``.
        root: Name of the vision module.
    """
    patches = f"{root}.patch_embedding"
    return Tower(
        part=Part.VISION,
        hidden_size=config.hidden_size,
        norm_kind=NormKind.LAYERNORM,
        entry=(patch_embed(root), f"{patches}.cls_embedding", f"{patches}.position_embedding"),
        blocks=tuple(_block(config, f"{root}.transformer.layers.{index}") for index in range(config.num_hidden_layers)),
        final_norm=None,
        norm_place=NormPlace.POST,
        exits=(Reader(f"{root}.conv", chunks=JOINED_PATCHES, channels_first=True),),
    )


def patch_embed(root: str) -> str:
    """The convolution over pixels."""
    return f"{root}.patch_embedding.proj"


def projector(root: str) -> tuple[str, ...]:
    """From the convolution to the linear that writes the LLM's stream. The LayerNorm between stands before a GELU:
    no rotation reaches it."""
    adapter = f"{root}.linear_proj"
    linears = ("linear_proj", "gate_proj", "dense_h_to_4h", "dense_4h_to_h")
    return (f"{root}.conv", *(f"{adapter}.{linear}" for linear in linears))


def _block(config: Any, name: str) -> Block:
    width, heads = config.hidden_size, config.num_heads
    qkv = f"{name}.attention.query_key_value"
    shape = (width // heads, heads, heads)
    return Block(
        name=name,
        attention_norm=Norm(f"{name}.input_layernorm", (qkv,)),
        attention=Attention(qkv, (2 * width, 3 * width), f"{name}.attention.dense", *shape),
        mlp_norm=Norm(f"{name}.post_attention_layernorm", (f"{name}.mlp.fc1",)),
        mlp_out=f"{name}.mlp.fc2",
    )
