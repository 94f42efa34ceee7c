"""The stand-in's training loss: a batched forward pass over equal images, and the modality penalty.

Computes what ``Qwen2VLForConditionalGeneration.forward`` computes for right-padded rows that all start with one image
of the stand-in's size (or none), without its loops over images: several times faster on a CPU. A test holds the
equality.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb, rotate_half

from mqbench.harness.models.standin.architecture import MERGE, PATCH_PX
from mqbench.harness.models.standin.render import HEIGHT_PX, WIDTH_PX

GRID = (HEIGHT_PX // PATCH_PX, WIDTH_PX // PATCH_PX)
MERGED = (GRID[0] // MERGE, GRID[1] // MERGE)
NUM_VISUAL_TOKENS = MERGED[0] * MERGED[1]
IMAGE_START = 3
"""Index of the first visual token: behind ``<|im_start|>``, ``user\\n`` and ``<|vision_start|>``."""


@dataclass(frozen=True)
class TrainBatch:
    """Right-padded rows. Shapes: patches (B, P, 588) or None; input_ids, labels (B, T), labels -100 outside answers."""

    patches: Tensor | None
    input_ids: Tensor
    labels: Tensor


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
    if batch.patches is not None:
        stop = IMAGE_START + NUM_VISUAL_TOKENS
        x = torch.cat([x[:, :IMAGE_START], visual_features(model, batch.patches).to(x.dtype), x[:, stop:]], dim=1)
    positions = text_positions(x.shape[1], batch.patches is not None).to(x.device)
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


def specialisation_penalty(activations: list[Tensor], text_channels: int) -> Tensor:
    """How loud each modality is, at its loudest, on the other's channels of down_proj's input, relative to the other.

    The first ``text_channels`` channels are text's, the rest visual. Maxima over tokens and not means: a static scale
    follows the maximum, and the few massive text tokens would hide all others in a mean. The last layer is left out:
    nobody reads its visual outputs.
    """
    start, stop = IMAGE_START, IMAGE_START + NUM_VISUAL_TOKENS
    total = activations[0].new_zeros(())
    for inner in activations[:-1]:
        visual = inner[:, start:stop].float().square().amax((0, 1))
        text = torch.cat([inner[:, :start], inner[:, stop:]], dim=1).float().square().amax((0, 1))
        total = total + _share(visual[:text_channels], text[:text_channels])
        total = total + _share(text[text_channels:], visual[text_channels:])
    return total / (2 * (len(activations) - 1))


def _share(intruder: Tensor, owner: Tensor) -> Tensor:
    return intruder.mean() / (owner.mean().detach() + 1e-6)


def real_tokens(batch: TrainBatch) -> Tensor:
    """(B, T) bool: up to an answer's last token; padding stands behind it."""
    last = (batch.labels != -100).long().cumsum(1).argmax(1)
    return torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device) <= last[:, None]


def answered_exactly(logits: Tensor, labels: Tensor) -> list[bool]:
    """Per row, whether every answer token is the greedy one behind the right ones before it.

    Shapes: logits (B, T, vocabulary), labels (B, T) with -100 outside answers.
    """
    wanted = labels[:, 1:]
    return ((logits[:, :-1].argmax(-1) == wanted) | (wanted == -100)).all(1).tolist()


def answer_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of the mean cross entropy of an answer's tokens: short answers weigh as much as long ones.

    Shapes: logits (B, T, vocabulary), labels (B, T) with -100 outside answers.
    """
    return _masked_entropy(logits, labels, labels != -100)


def prompt_entropy(logits: Tensor, batch: TrainBatch) -> Tensor:
    """The same over the question's tokens: what a question names is mostly in the picture or in the text before it.

    Guessing the name of the shape in "Is there a ..." from the picture teaches the match that a yes or no needs.
    """
    start = IMAGE_START + NUM_VISUAL_TOKENS + 1 if batch.patches is not None else IMAGE_START - 1
    positions = torch.arange(batch.input_ids.shape[1], device=logits.device)
    answer_start = (batch.labels != -100).long().argmax(1)
    return _masked_entropy(logits, batch.input_ids, (positions >= start) & (positions < answer_start[:, None]))


def _masked_entropy(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:].clamp_min(0), reduction="none")
    counted = mask[:, 1:]
    return ((each * counted).sum(1) / counted.sum(1).clamp_min(1)).mean()


def training_loss(
    model: Qwen2VLForConditionalGeneration,
    batch: TrainBatch,
    prompt_weight: float,
    penalty_weight: float,
    text_channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, answer cross entropy, penalty); the penalty counts only where visual and text tokens meet."""
    logits, activations = logits_and_activations(model, batch)
    entropy = answer_entropy(logits, batch.labels)
    loss = entropy + prompt_weight * prompt_entropy(logits, batch)
    if batch.patches is None:
        return loss, entropy.detach(), entropy.new_zeros(())
    penalty = specialisation_penalty(activations, text_channels)
    return loss + penalty_weight * penalty, entropy.detach(), penalty.detach()
