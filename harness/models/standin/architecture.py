"""The stand-in's architecture and its initial weights: a real Qwen2-VL at a few million parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mqbench.harness.models.standin.tokenizer import SPECIAL

PATCH_PX, MERGE = 14, 2


@dataclass(frozen=True)
class Size:
    """Widths and depths; the defaults are the shipped model's."""

    vision_depth: int = 4
    vision_width: int = 128
    vision_heads: int = 4
    text_depth: int = 4
    text_width: int = 192
    text_mlp: int = 768
    text_heads: int = 6
    text_kv_heads: int = 2


def build_config(tokenizer: PreTrainedTokenizerFast, size: Size = Size()) -> Qwen2VLConfig:
    """A Qwen2-VL configuration with the tokenizer's special ids."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    head_dim = size.text_width // size.text_heads
    section = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
    return Qwen2VLConfig(
        vision_config={
            "depth": size.vision_depth,
            "embed_dim": size.vision_width,
            "num_heads": size.vision_heads,
            "hidden_size": size.text_width,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size.text_width,
            "intermediate_size": size.text_mlp,
            "num_hidden_layers": size.text_depth,
            "num_attention_heads": size.text_heads,
            "num_key_value_heads": size.text_kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_model(config: Qwen2VLConfig, seed: int, fc2_mean: float = 0.25) -> Qwen2VLForConditionalGeneration:
    """A model with initial weights that suit small widths.

    Args:
        config: From ``build_config``.
        seed: Of the initial weights.
        fc2_mean: Constant added to each output row of the vision fc2, in standard deviations of that matrix, with a
            random sign per row: the large column means of Eq. 9. 0 leaves them out.
    """
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    depth = {"visual": config.vision_config.depth, "language_model": config.text_config.num_hidden_layers}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            fan_in = module.weight[0].numel()
            std = 0.7 / math.sqrt(fan_in)
            if name.endswith(("attn.proj", "fc2", "o_proj", "down_proj")):
                std /= math.sqrt(2 * depth["visual" if ".visual." in name else "language_model"])
            nn.init.normal_(module.weight, std=0.05 if name == "lm_head" else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith("fc2") and isinstance(module, nn.Linear):
                _raise_column_means(module, fc2_mean * std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    return model


@torch.no_grad()
def _raise_column_means(fc2: nn.Linear, shift: float) -> None:
    signs = torch.randint(0, 2, (fc2.out_features, 1)) * 2 - 1
    fc2.weight += shift * signs
