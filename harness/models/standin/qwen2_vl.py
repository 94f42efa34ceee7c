"""``standin-qwen2-vl``: config, files, and a batched forward pass over equal images.

The pass computes what ``Qwen2VLForConditionalGeneration.forward`` computes for right-padded rows that all start with
one image of the stand-in's size (or none), without its loops over images: several times faster on a CPU. A test holds
the equality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb, rotate_half
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from mqbench.harness.models.qwen2_vl import qwen2_vl_layout
from mqbench.harness.models.standin.architecture import Size, decoder_arguments
from mqbench.harness.models.standin.family import DEFAULT_FAMILY, StandIn
from mqbench.harness.models.standin.objective import TrainBatch, real_tokens, right_padded
from mqbench.harness.models.standin.render import HEIGHT_PX, WIDTH_PX
from mqbench.harness.models.standin.tasks import Example
from mqbench.harness.models.standin.tokenizer import CHAT_TEMPLATE, QWEN2_VL, SPECIAL, render_prompt
from mqbench.harness.quant.session import Batch

PATCH_PX, MERGE = 14, 2
TOKEN_PX = (PATCH_PX * MERGE) ** 2
MIN_PIXELS, MAX_PIXELS = 4 * TOKEN_PX, 64 * TOKEN_PX
"""The stand-in's own limits: an image is 4 to 64 visual tokens (the shipped ones 24)."""

GRID = (HEIGHT_PX // PATCH_PX, WIDTH_PX // PATCH_PX)
MERGED = (GRID[0] // MERGE, GRID[1] // MERGE)
NUM_VISUAL_TOKENS = MERGED[0] * MERGED[1]
IMAGE_START = 3
"""Index of the first visual token: behind ``<|im_start|>``, ``user\\n`` and ``<|vision_start|>``."""


@dataclass(frozen=True)
class Qwen2VLFeed:
    """Rows of one size of picture, on the fast path."""

    tokenizer: PreTrainedTokenizerFast

    def collate(self, examples: Sequence[Example], device: str = "cpu") -> TrainBatch:
        """Examples that all have an image, or all have none, as one right-padded batch."""
        return collate(examples, self.tokenizer, device)

    def logits_and_activations(self, model: Any, batch: TrainBatch) -> tuple[Tensor, list[Tensor]]:
        """(B, T, vocabulary) logits, and each layer's down_proj input (B, T, intermediate)."""
        return logits_and_activations(model, batch)

    def model_inputs(self, batch: TrainBatch) -> Batch:
        """The batch as arguments of transformers' ``forward``."""
        inputs: dict[str, Tensor] = {"input_ids": batch.input_ids, "attention_mask": real_tokens(batch).long()}
        if batch.pictures:
            count = len(batch.input_ids)
            frames = batch.pictures["patches"].view(count, -1, 3, PATCH_PX**2)
            inputs["pixel_values"] = torch.stack([frames, frames], dim=3).flatten(2).flatten(0, 1)
            inputs["image_grid_thw"] = torch.tensor([[1, *GRID]] * count, device=frames.device)
            inputs["mm_token_type_ids"] = batch.visual.int()
        return inputs


def collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, device: str = "cpu") -> TrainBatch:
    """Examples that all have an image, or all have none, as one right-padded batch."""
    rows, labels = [], []
    for example in examples:
        prompt = tokenizer(render_prompt(example.prompt, NUM_VISUAL_TOKENS if example.image else 0))["input_ids"]
        answer = tokenizer(f"{example.answer}<|im_end|>")["input_ids"]
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
    images = [np.asarray(example.image) for example in examples if example.image is not None]
    pictures = {"patches": patchify(torch.from_numpy(np.stack(images))).to(device)} if images else {}
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    start = IMAGE_START + NUM_VISUAL_TOKENS + 1 if images else IMAGE_START - 1
    return right_padded(rows, labels, tokenizer.pad_token_id, image_id, pictures, start, device)


def patchify(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, P, 3 * 14 * 14) in the image processor's order (2 x 2 groups stay together)."""
    batch = pixels.shape[0]
    rows, columns = MERGED
    x = (pixels.float() / 255 - 0.5) / 0.5
    x = x.view(batch, rows, MERGE, PATCH_PX, columns, MERGE, PATCH_PX, 3)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, GRID[0] * GRID[1], -1)


@lru_cache(maxsize=2)
def _patch_positions() -> Tensor:
    """(P, 2) row and column of each patch in the processor's order."""
    rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    order = [grid.view(MERGED[0], MERGE, MERGED[1], MERGE).permute(0, 2, 1, 3).reshape(-1) for grid in (rows, columns)]
    return torch.stack(order, dim=-1)


def text_positions(length: int, has_image: bool) -> Tensor:
    """(3, T) M-RoPE positions of a row: text counts up, visual tokens carry (t, row, column), text goes on behind."""
    if not has_image:
        return torch.arange(length).expand(3, length)
    rows, columns = torch.meshgrid(torch.arange(MERGED[0]), torch.arange(MERGED[1]), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1) + IMAGE_START
    before = torch.arange(IMAGE_START).expand(3, -1)
    rest = length - IMAGE_START - NUM_VISUAL_TOKENS
    after = (torch.arange(rest) + IMAGE_START + max(MERGED)).expand(3, -1)
    return torch.cat([before, image, after], dim=1)


def visual_features(model: Qwen2VLForConditionalGeneration, patches: Tensor) -> Tensor:
    """(B, P, 588) -> (B, NUM_VISUAL_TOKENS, text width)."""
    visual = model.model.visual
    # Both temporal slots of a still image hold the same pixels, so their kernels add up.
    kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)
    x = F.linear(patches, kernel)
    batch, length, width = x.shape
    cos, sin = visual.rotary_pos_emb(x, _patch_positions().to(x.device))
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = (part * cos + rotate_half(part) * sin for part in qkv[:2])
        heads = _attend(query, key, qkv[2])
        x = x + attention.proj(heads.transpose(1, 2).reshape(batch, length, width))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).view(batch, NUM_VISUAL_TOKENS, -1)


def logits_and_activations(model: Qwen2VLForConditionalGeneration, batch: TrainBatch) -> tuple[Tensor, list[Tensor]]:
    """(B, T, vocabulary) logits, and each layer's down_proj input (B, T, intermediate)."""
    text = model.model.language_model
    x = text.embed_tokens(batch.input_ids)
    if batch.pictures:
        stop = IMAGE_START + NUM_VISUAL_TOKENS
        features = visual_features(model, batch.pictures["patches"])
        x = torch.cat([x[:, :IMAGE_START], features.to(x.dtype), x[:, stop:]], dim=1)
    positions = text_positions(x.shape[1], bool(batch.pictures)).to(x.device)
    rotary = text.rotary_emb(x, positions[:, None])
    activations = []
    for layer in text.layers:
        x = x + _attention(layer.self_attn, layer.input_layernorm(x), rotary)
        hidden = layer.post_attention_layernorm(x)
        inner = F.silu(layer.mlp.gate_proj(hidden)) * layer.mlp.up_proj(hidden)
        activations.append(inner)
        x = x + layer.mlp.down_proj(inner)
    return model.lm_head(text.norm(x)), activations


def _attention(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    batch, length, width = x.shape
    query, key, value = (
        projection(x).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    heads = _attend(query, key, value, is_causal=True, enable_gqa=True)
    return attention.o_proj(heads.transpose(1, 2).reshape(batch, length, width))


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    # The CPU's bfloat16 attention backward is several times slower than its float32 one.
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=query.device.type != "cpu"):
        heads = F.scaled_dot_product_attention(query.to(wide), key.to(wide), value.to(wide), **options)
    return heads.to(value.dtype)


def _config(tokenizer: PreTrainedTokenizerFast, size: Size) -> Qwen2VLConfig:
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
            **decoder_arguments(tokenizer, size),
            "rope_parameters": {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0},
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def _save_processor(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    common = {
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    }
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        video_processor=Qwen2VLVideoProcessor(**common),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(directory)


STANDIN = StandIn(
    name=DEFAULT_FAMILY,
    dialect=QWEN2_VL,
    config=_config,
    model_class=lambda: Qwen2VLForConditionalGeneration,
    layout=qwen2_vl_layout,
    save_processor=_save_processor,
    feed=lambda model, tokenizer: Qwen2VLFeed(tokenizer),
)
