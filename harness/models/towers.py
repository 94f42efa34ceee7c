"""The LLM that LLaMA, Mistral, Qwen2 and Qwen2-VL share: RMSNorm blocks, grouped-query attention and a gated MLP."""

from __future__ import annotations

from typing import Any

from mqbench.harness.quant.layout import Attention, Block, Norm, NormKind, Part, Tower

HEAD = "lm_head"


def llm_tower(config: Any, root: str, writers: tuple[str, ...] = ()) -> Tower:
    """The tower of a decoder.

    Args:
        config: Of the LLM (a multimodal model's ``text_config``).
        root: Name of the decoder module.
        writers: Modules that write the residual stream beside the token embedding (a projector's last linear).
    """
    heads = config.num_attention_heads
    # `or`: some families leave head_dim None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    shape = (head_dim, heads, kv_heads)
    return Tower(
        part=Part.TEXT,
        hidden_size=config.hidden_size,
        norm_kind=NormKind.RMSNORM,
        entry=(f"{root}.embed_tokens", *writers),
        blocks=tuple(_block(f"{root}.layers.{index}", *shape) for index in range(config.num_hidden_layers)),
        final_norm=Norm(f"{root}.norm", (HEAD,)),
    )


def _block(name: str, head_dim: int, heads: int, kv_heads: int) -> Block:
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
