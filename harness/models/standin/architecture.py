"""The stand-ins' sizes and initial weights, for any family's module tree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from mqbench.harness.quant.layout import Layout, NormPlace, Tower

WEIGHT_STD, EMBEDDING_STD, HEAD_STD = 0.7, 0.5, 0.05
"""Of linears times sqrt(fan in); of embeddings, class tokens and position tables; of the head."""


@dataclass(frozen=True)
class Size:
    """Widths and depths; the defaults are the shipped models'."""

    vision_depth: int = 4
    vision_width: int = 128
    vision_heads: int = 4
    text_depth: int = 4
    text_width: int = 192
    text_mlp: int = 768
    text_heads: int = 6
    text_kv_heads: int = 2


DEFAULT_SIZE = Size()


def decoder_arguments(tokenizer: PreTrainedTokenizerFast, size: Size) -> dict[str, Any]:
    """Entries of transformers' configs of LLaMA, Qwen2 and Qwen2-VL's LLM."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_width,
        "intermediate_size": size.text_mlp,
        "num_hidden_layers": size.text_depth,
        "num_attention_heads": size.text_heads,
        "num_key_value_heads": size.text_kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def initialize(model: nn.Module, layout: Layout, fc2_mean: float = 0.25) -> None:
    """Draws initial weights that suit small widths, in the order of the modules.

    What ends a residual branch is smaller in deep towers: a linear, or the norm behind it (``NormPlace.POST``).

    Args:
        model: Any family's.
        layout: Its layout.
        fc2_mean: Constant added to each output row of a vision block's last linear, in standard deviations of that
            matrix, with a random sign per row: the large column means of Eq. 9. 0 leaves them out.
    """
    share = {name: value for tower in layout.towers for name, value in _branch_shares(tower)}
    head = set() if layout.text.final_norm is None else set(layout.text.final_norm.readers)
    means = set() if layout.vision is None else {block.mlp_out for block in layout.vision.blocks}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            std = WEIGHT_STD / math.sqrt(module.weight[0].numel()) / share.get(name, 1.0)
            nn.init.normal_(module.weight, std=HEAD_STD if name in head else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name in means:
                _raise_column_means(module, fc2_mean * std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
    _initialize_parameters(model, layout)


def _branch_shares(tower: Tower) -> Iterator[tuple[str, float]]:
    """What a writer of the residual stream is divided by."""
    if tower.norm_place is NormPlace.PRE:
        yield from ((name, math.sqrt(2 * len(tower.blocks))) for block in tower.blocks for name in block.writers)


@torch.no_grad()
def _initialize_parameters(model: nn.Module, layout: Layout) -> None:
    """Class tokens, queries and position tables that are no modules, and the gains of norms behind branches."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1 and parameter.requires_grad:
                nn.init.normal_(parameter, std=EMBEDDING_STD)
    for tower in layout.towers:
        for norm in tower.block_norms if tower.norm_place is NormPlace.POST else ():
            gain = model.get_parameter(f"{norm.name}.weight")
            nn.init.constant_(gain, 1 / math.sqrt(2 * len(tower.blocks)))


@torch.no_grad()
def _raise_column_means(fc2: nn.Linear | nn.Conv2d | nn.Conv3d, shift: float) -> None:
    signs = torch.randint(0, 2, (fc2.weight.shape[0], 1)) * 2 - 1
    fc2.weight += shift * signs
