"""The text stand-in's architecture and its initial weights: a real LLaMA of one and a half million parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_LENGTH = 256


@dataclass(frozen=True)
class Size:
    """Widths and depth; the defaults are the shipped model's."""

    depth: int = 5
    width: int = 128
    mlp: int = 512
    heads: int = 4
    kv_heads: int = 4


def build_config(tokenizer: PreTrainedTokenizerFast, size: Size = Size()) -> LlamaConfig:
    """A LLaMA configuration with the tokenizer's special ids."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def build_model(
    config: LlamaConfig, seed: int, down_mean: float = 0.0, mean_layers: tuple[int, ...] = ()
) -> LlamaForCausalLM:
    """A model with initial weights that suit small widths.

    Args:
        config: From ``build_config``.
        seed: Of the initial weights.
        down_mean: Constant added to each output row of some layers' down_proj, in standard deviations of that matrix,
            with a random sign per row: the large column means of Eq. 9. 0 leaves them out.
        mean_layers: These layers get them.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 0.7 / math.sqrt(module.in_features)
            if name.endswith(("o_proj", "down_proj")):
                std /= math.sqrt(2 * config.num_hidden_layers)
            nn.init.normal_(module.weight, std=0.05 if name == "lm_head" else std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    for index in mean_layers:
        down = model.model.layers[index].mlp.down_proj
        _raise_column_means(down, down_mean * 0.7 / math.sqrt(2 * config.num_hidden_layers * down.in_features))
    return model


@torch.no_grad()
def _raise_column_means(down: nn.Linear, shift: float) -> None:
    signs = torch.randint(0, 2, (down.out_features, 1)) * 2 - 1
    down.weight += shift * signs
