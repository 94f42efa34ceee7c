"""Makes a trained stand-in as hard to quantize as a real model, without changing the function that it computes.

Two exact rescalings, each with its own switch: outlier channels behind every norm (in a tower that normalizes behind
its branches: in the residual stream), and a modality gap at the input of an LLM block's last linear that survives
rotation and online Hadamard because it is spread over many channels. Both know a model by its layout only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.models.standin.family import Feed
from mqbench.harness.models.standin.objective import TrainBatch, real_tokens
from mqbench.harness.quant.layout import Block, Layout, NormPlace, Reader, Tower


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
    model: nn.Module,
    layout: Layout,
    hardness: Hardness,
    feed: Feed,
    batches: Sequence[TrainBatch],
    text_channels: int,
) -> None:
    """Rescales ``model`` in place; its outputs stay the same up to rounding.

    Args:
        model: The trained model.
        layout: Its layout.
        hardness: Which ingredients, how strong.
        feed: The family's.
        batches: Examples (not those of the benchmarks) on which text ranges are measured.
        text_channels: Input channels [0, text_channels) of each LLM block's last linear that training gave to text.
    """
    if hardness.modality_gap > 0:
        widen_modality_gap(model, layout, hardness, _maxima(model, feed, batches), text_channels)
    raise_outlier_channels(model, layout, hardness)


@torch.no_grad()
def widen_modality_gap(
    model: nn.Module,
    layout: Layout,
    hardness: Hardness,
    maxima: Sequence[tuple[Tensor, Tensor]],
    text_channels: int,
) -> None:
    """Multiplies up_proj rows of visual channels and divides their down_proj columns by the same factor.

    The last layer is left alone: nobody reads its visual outputs.

    Args:
        model: The model.
        layout: Its layout.
        hardness: How strong.
        maxima: Per block, largest input of down_proj by channel over text and over visual tokens.
        text_channels: Channels that belong to text.
    """
    for block, (text_max, visual_max) in zip(layout.text.blocks[:-1], maxima, strict=False):
        ratio = visual_max / text_max.clamp_min(1e-6)
        ratio[:text_channels] = 0
        raised = ratio.topk(round(hardness.gap_share * (len(ratio) - text_channels))).indices
        factor = (hardness.modality_gap * text_max.max() / text_max[raised].max()).clamp_min(1.0)
        up, first_row = _up_projection(model, block)
        up.weight[first_row + raised] *= factor
        if up.bias is not None:
            up.bias[first_row + raised] *= factor
        down: Any = model.get_submodule(block.mlp_out)
        down.weight[:, raised] /= factor


def _up_projection(model: nn.Module, block: Block) -> tuple[Any, int]:
    """The linear that multiplies the activation, and its first row; in a fused one it stands behind the gate.

    Raises:
        ValueError: the MLP has no gate.
    """
    if block.mlp_up is not None:
        return model.get_submodule(block.mlp_up), 0
    down: Any = model.get_submodule(block.mlp_out)
    fused: Any = model.get_submodule(block.mlp_norm.readers[0])
    width: int = down.weight.shape[1]
    if fused.weight.shape[0] != 2 * width:
        raise ValueError(f"'{block.name}' has no gated MLP, so its modality gap cannot be widened exactly")
    return fused, width


@torch.no_grad()
def _maxima(model: nn.Module, feed: Feed, batches: Sequence[TrainBatch]) -> list[tuple[Tensor, Tensor]]:
    """Per block, the (intermediate,) absolute maxima of down_proj's input over text and over visual tokens."""
    maxima: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        seen = [_batch_maxima(inner, batch) for inner in feed.logits_and_activations(model, batch)[1]]
        pairs = zip(maxima or seen, seen, strict=True)
        maxima = [(torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])) for a, b in pairs]
    if not maxima:
        raise ValueError("the modality gap is measured on examples; give at least one batch")
    return maxima


def _batch_maxima(inner: Tensor, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Over real text tokens (no visual token, and no padding) and over visual ones."""
    text = inner[real_tokens(batch) & ~batch.visual].abs().amax(0)
    return text, inner[batch.visual].abs().amax(0) if batch.pictures else torch.zeros_like(text)


@torch.no_grad()
def raise_outlier_channels(model: nn.Module, layout: Layout, hardness: Hardness) -> None:
    """Multiplies each norm's output on a few channels; its readers divide by the same."""
    low, high = hardness.outlier_gain
    gains = (
        torch.logspace(0, 1, hardness.num_outliers, base=high / low) * low
        if high > low
        else torch.full((hardness.num_outliers,), low)
    )
    generator = torch.Generator().manual_seed(hardness.seed)
    _raise_channels(model, layout.text, _draw_channels(layout.text, hardness, generator), gains)
    if layout.vision is not None:
        vision_gains = (gains * hardness.vision_outlier_share).clamp_min(1.0)
        _raise_channels(model, layout.vision, _draw_channels(layout.vision, hardness, generator), vision_gains)


def _draw_channels(tower: Tower, hardness: Hardness, generator: torch.Generator) -> Tensor:
    return torch.randperm(tower.hidden_size, generator=generator)[: hardness.num_outliers]


def _raise_channels(model: nn.Module, tower: Tower, channels: Tensor, gains: Tensor) -> None:
    """Behind every norm; or, where no norm reads the stream, in the stream itself: all that write it multiply."""
    post = tower.norm_place is NormPlace.POST
    if post and (tower.entry_norm is not None or tower.final_norm is not None):
        raise ValueError("outlier channels of a post-norm stream need linears at its end, not norms")
    for norm in tower.block_norms:
        _multiply_output(model.get_submodule(norm.name), channels, gains)
    behind_norms = (Reader(name) for norm in tower.block_norms for name in norm.readers)
    for reader in tower.readers if post else behind_norms:
        _divide_input(model.get_submodule(reader.name), reader, tower.hidden_size, channels, gains)
    for name in tower.entry if post else ():
        _multiply_entry(model, name, channels, gains)


def _multiply_output(module: Any, channels: Tensor, gains: Tensor) -> None:
    """Of a norm, linear or convolution."""
    factors = gains.to(module.weight.device).to(module.weight.dtype)
    module.weight[channels] *= factors.view(-1, *[1] * (module.weight.dim() - 1))
    if getattr(module, "bias", None) is not None:
        module.bias[channels] *= factors


def _multiply_entry(model: nn.Module, name: str, channels: Tensor, gains: Tensor) -> None:
    """What writes the stream first: a linear or convolution by its rows, tables and tokens by their last dimension."""
    tensors = dict(model.named_parameters())
    module = None if name in tensors else model.get_submodule(name)
    if module is None or isinstance(module, nn.Embedding):
        table = tensors[name if module is None else f"{name}.weight"]
        table[..., channels] *= gains.to(table.device)
    else:
        _multiply_output(module, channels, gains)


def _divide_input(module: Any, reader: Reader, width: int, channels: Tensor, gains: Tensor) -> None:
    weight = module.weight
    factors = gains.to(weight.device)
    if reader.channels_first:
        weight.view(weight.shape[0], width, -1)[:, channels] /= factors[:, None]
    else:
        weight.view(weight.shape[0], reader.chunks, width)[..., channels] /= factors
