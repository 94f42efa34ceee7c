"""Makes the trained stand-in as hard to quantize as a real model, without changing the function that it computes.

Two exact rescalings, each with its own switch: outlier channels behind every norm, and a modality gap at down_proj's
input that survives rotation and online Hadamard because it is spread over many channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from mqbench.harness.models.standin.objective import (
    IMAGE_START,
    NUM_VISUAL_TOKENS,
    TrainBatch,
    logits_and_activations,
    real_tokens,
)


@dataclass(frozen=True)
class Hardness:
    """Ingredients applied after training.

    Attributes:
        outlier_gain: (smallest, largest) gain of the outlier channels behind LLM norms, log-spaced; (1, 1) leaves
            them out.
        vision_outlier_share: The vision tower's gains relative to the LLM's.
        num_outliers: Outlier channels per norm; the same channels in every layer of a tower, as in real models.
        modality_gap: r: visual channels of down_proj's input are raised together until the text maximum on them reaches
            r times the layer's text maximum; 0 leaves the gap out.
        gap_share: Share of the visual channels that are raised: those that visual tokens exceed text tokens on most.
        seed: Chooses the outlier channels.
    """

    outlier_gain: tuple[float, float] = (60.0, 150.0)
    vision_outlier_share: float = 0.5
    num_outliers: int = 4
    modality_gap: float = 6.0
    gap_share: float = 0.15
    seed: int = 0


def harden(
    model: Qwen2VLForConditionalGeneration, hardness: Hardness, batches: Sequence[TrainBatch], text_channels: int
) -> None:
    """Rescales ``model`` in place; its outputs stay the same up to rounding.

    Args:
        model: The trained model.
        hardness: Which ingredients, how strong.
        batches: Examples (not those of the benchmarks) on which text ranges are measured.
        text_channels: Channels [0, text_channels) of each down_proj input that training gave to text.
    """
    if hardness.modality_gap > 0:
        widen_modality_gap(model, hardness, batches, text_channels)
    raise_outlier_channels(model, hardness)


@torch.no_grad()
def widen_modality_gap(
    model: Qwen2VLForConditionalGeneration, hardness: Hardness, batches: Sequence[TrainBatch], text_channels: int
) -> None:
    """Multiplies up_proj rows of visual channels and divides their down_proj columns by the same factor.

    The last layer is left alone: nobody reads its visual outputs.
    """
    layers = model.model.language_model.layers
    for layer, (text_max, visual_max) in zip(layers[:-1], _maxima(model, batches), strict=False):
        ratio = visual_max / text_max.clamp_min(1e-6)
        ratio[:text_channels] = 0
        raised = ratio.topk(round(hardness.gap_share * (len(ratio) - text_channels))).indices
        factor = (hardness.modality_gap * text_max.max() / text_max[raised].max()).clamp_min(1.0)
        layer.mlp.up_proj.weight[raised] *= factor
        layer.mlp.down_proj.weight[:, raised] /= factor


@torch.no_grad()
def _maxima(model: Qwen2VLForConditionalGeneration, batches: Sequence[TrainBatch]) -> list[tuple[Tensor, Tensor]]:
    """Per layer, the (intermediate,) absolute maxima of down_proj's input over text and over visual tokens."""
    maxima: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        seen = [_batch_maxima(inner, batch) for inner in logits_and_activations(model, batch)[1]]
        pairs = zip(maxima or seen, seen, strict=True)
        maxima = [(torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])) for a, b in pairs]
    if not maxima:
        raise ValueError("the modality gap is measured on examples; give at least one batch")
    return maxima


def _batch_maxima(inner: Tensor, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    text = _text_rows(inner, batch).abs().amax(0)
    if batch.patches is None:
        return text, torch.zeros_like(text)
    visual = inner[:, IMAGE_START : IMAGE_START + NUM_VISUAL_TOKENS].flatten(0, 1)
    return text, visual.abs().amax(0)


def _text_rows(inner: Tensor, batch: TrainBatch) -> Tensor:
    """Rows of real text tokens: no visual token, and no padding (it stands behind the answer)."""
    keep = real_tokens(batch)
    if batch.patches is not None:
        keep[:, IMAGE_START : IMAGE_START + NUM_VISUAL_TOKENS] = False
    return inner[keep]


@torch.no_grad()
def raise_outlier_channels(model: Qwen2VLForConditionalGeneration, hardness: Hardness) -> None:
    """Multiplies each norm's output on a few channels; its readers divide by the same."""
    low, high = hardness.outlier_gain
    gains = (
        torch.logspace(0, 1, hardness.num_outliers, base=high / low) * low
        if high > low
        else torch.full((hardness.num_outliers,), low)
    )
    generator = torch.Generator().manual_seed(hardness.seed)
    text, visual = model.model.language_model, model.model.visual
    text_channels = torch.randperm(text.config.hidden_size, generator=generator)[: hardness.num_outliers]
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _scale(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], text_channels, gains)
        _scale(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], text_channels, gains)
    vision_gains = (gains * hardness.vision_outlier_share).clamp_min(1.0)
    vision_channels = torch.randperm(visual.config.embed_dim, generator=generator)[: hardness.num_outliers]
    for block in visual.blocks:
        _scale(block.norm1, [block.attn.qkv], vision_channels, vision_gains)
        _scale(block.norm2, [block.mlp.fc1], vision_channels, vision_gains)


def _scale(norm: Any, readers: Sequence[nn.Linear], channels: Tensor, gains: Tensor) -> None:
    gains = gains.to(norm.weight.device)
    norm.weight[channels] *= gains
    if getattr(norm, "bias", None) is not None:
        norm.bias[channels] *= gains
    for reader in readers:
        reader.weight[:, channels] /= gains
