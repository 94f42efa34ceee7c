"""Starts a stand-in from the shipped one of another family, as released MLLMs start from a trained LLM and tower.

What both layouts declare is carried over: LLM blocks, vision blocks that normalize in front of their branches, pieces
of the vocabulary by their text, patch kernels of one size. What remains (projector or resampler, class tokens) is drawn
as for a model from nothing, except position tables: sines, since the donor's tower knew positions by rotation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mqbench.harness import discover
from mqbench.harness.models.standin.adapters import SHIPPED_WEIGHTS
from mqbench.harness.quant.layout import Attention, Block, Layout, Norm, Tower

VISION_DIVISOR, TEXT_DIVISOR = 4.0, 8.0
"""The donor's streams grew in training (standard deviation 18 behind the patches, 17 at visual tokens): a new
projector's outputs would take thousands of steps to grow as far."""
VISION_STD = 4.5
"""Of the donor's vision stream after the division."""
POSITION_SHARE = 0.5
"""Standard deviation of a position table, relative to that of the patches it is added to."""
LONGEST_WAVE = 32.0
"""Of a position table's sines, relative to the shortest, which is 4 patches long."""


@dataclass(frozen=True)
class Donor:
    """A trained model to start from.

    Attributes:
        model: In float32.
        layout: Its layout.
        tokenizer: Its tokenizer.
    """

    model: nn.Module
    layout: Layout
    tokenizer: PreTrainedTokenizerFast


def load_donor(name: str) -> Donor:
    """A shipped stand-in, levelled (``level``)."""
    loaded = discover.find_model(name).load(SHIPPED_WEIGHTS / name, "cpu", torch.float32)
    level(loaded.model, loaded.layout)
    return Donor(loaded.model.requires_grad_(False), loaded.layout, loaded.processor.tokenizer)


@torch.no_grad()
def inherit(model: nn.Module, layout: Layout, tokenizer: PreTrainedTokenizerFast, donor: Donor) -> None:
    """Copies into ``model`` what it shares with a levelled donor.

    Args:
        model: With initial weights, of the donor's widths.
        layout: Its layout.
        tokenizer: Its tokenizer.
        donor: The trained model.

    Raises:
        ValueError: widths differ.
    """
    _copy_blocks(model, layout.text, donor.model, donor.layout.text)
    _copy_vocabulary(model, layout, tokenizer, donor)
    vision, source = layout.vision, donor.layout.vision
    assert vision is not None and source is not None and layout.patch_embed and donor.layout.patch_embed
    stream_std = 1.0
    if vision.norm_place is source.norm_place:
        stream_std = VISION_STD
        _copy_blocks(model, vision, donor.model, source)
    if vision.entry_norm is not None:
        model.get_parameter(f"{vision.entry_norm}.weight").fill_(stream_std)
    _draw_positions(model, f"{layout.vision_root}.", POSITION_SHARE * stream_std)
    kernel = _still_image_kernel(donor.model.get_submodule(donor.layout.patch_embed)) * (stream_std / VISION_STD)
    patches: Any = model.get_submodule(layout.patch_embed)
    if patches.weight.shape == kernel.shape:
        patches.weight.copy_(kernel)


@torch.no_grad()
def level(model: nn.Module, layout: Layout) -> None:
    """Takes out what hardening put in and makes the streams smaller, function-preserving but for the norms' epsilon.

    Norms' gains go into their readers, and with them the outlier channels. MLP channels become equal, and with them
    the modality gap: it lives in how up_proj's rows and down_proj's columns share a channel's scale.

    Args:
        model: Its towers normalize in front of their branches and end in a norm.
        layout: Its layout.
    """
    assert layout.vision is not None
    for tower, divisor in ((layout.vision, VISION_DIVISOR), (layout.text, TEXT_DIVISOR)):
        for norm in tower.norms:
            _fold_affine(model, norm)
        for block in tower.blocks:
            if block.mlp_up is not None:
                _level_channels(model.get_submodule(block.mlp_up), model.get_submodule(block.mlp_out))
        for name in tower.writers:
            for tensor in model.get_submodule(name).parameters():
                tensor.div_(divisor)


def _fold_affine(model: nn.Module, norm: Norm) -> None:
    module: Any = model.get_submodule(norm.name)
    for name in norm.readers:
        reader: Any = model.get_submodule(name)
        if getattr(module, "bias", None) is not None:
            reader.bias += reader.weight @ module.bias.repeat(norm.affine_repeats)
        reader.weight *= module.weight.repeat(norm.affine_repeats)
    module.weight.fill_(1.0)
    if getattr(module, "bias", None) is not None:
        module.bias.zero_()


def _level_channels(up: Any, down: Any) -> None:
    """Each channel's row of ``up`` becomes as long, beside the median, as its column of ``down``."""
    ratio = (up.weight.norm(dim=1) / down.weight.norm(dim=0)).sqrt()
    factor = ratio / ratio.median()
    up.weight /= factor[:, None]
    down.weight *= factor


# --- blocks by what their layouts say ---


@dataclass(frozen=True)
class Rows:
    """Rows of a linear that make one thing (queries, a gate), head after head."""

    linear: Any
    index: Tensor

    def copy(self, source: Rows, head_dim: int = 1) -> None:
        """Takes the source's rows; where it has fewer heads each stands for several, and a missing bias is zero."""
        repeats = len(self.index) // len(source.index)
        for name in ("weight", "bias"):
            mine, given = getattr(self.linear, name, None), getattr(source.linear, name, None)
            if mine is not None:
                rows = torch.zeros_like(mine[: len(source.index)]) if given is None else given[source.index]
                heads = rows.unflatten(0, (-1, head_dim)).repeat_interleave(repeats, 0)
                mine[self.index] = heads.flatten(0, 1)


def _copy_blocks(model: nn.Module, tower: Tower, source_model: nn.Module, source: Tower) -> None:
    if tower.hidden_size != source.hidden_size:
        raise ValueError(f"the {tower.part} tower is {tower.hidden_size} wide, the donor's {source.hidden_size}")
    for block, given in zip(tower.blocks, source.blocks, strict=False):
        head_dims = [block.attention.head_dim] * 3 + [1] * 4
        pairs = zip(_parts(model, block), _parts(source_model, given), head_dims, strict=False)
        for mine, other, head_dim in pairs:
            mine.copy(other, head_dim)


def _parts(model: Any, block: Block) -> Iterator[Rows]:
    """Queries, keys, values, the attention's output, the MLP's last linear, its first or its gate and up."""
    path = block.paths[0]
    yield from _heads([model.get_submodule(name) for name in path.attention_readers], path.attention)
    for name in (path.attention.out, path.mlp_out):
        yield _all_rows(model.get_submodule(name))
    readers = [model.get_submodule(name) for name in path.mlp_readers]
    inner = model.get_submodule(path.mlp_out).in_features
    if len(readers) == 1:
        rows = torch.arange(readers[0].out_features).split(inner)
        yield from (Rows(readers[0], index) for index in rows)
    else:
        gate_first = sorted(path.mlp_readers, key=lambda name: name == path.mlp_up)
        yield from (_all_rows(model.get_submodule(name)) for name in gate_first)


def _heads(readers: Sequence[Any], attention: Attention) -> Iterator[Rows]:
    """Queries, keys and values, in linears of their own, side by side in one, or interleaved."""
    if len(readers) > 1:
        yield from map(_all_rows, readers)
        return
    (fused,) = readers
    rows, head_dim = torch.arange(fused.out_features), attention.head_dim
    if attention.value_period:
        grouped = rows.view(attention.num_kv_heads, -1, head_dim)
        yield from (Rows(fused, part.flatten()) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1]))
    else:
        keys = attention.num_kv_heads * head_dim
        yield from (Rows(fused, part) for part in rows.split([attention.num_heads * head_dim, keys, keys]))


def _all_rows(linear: Any) -> Rows:
    return Rows(linear, torch.arange(linear.out_features))


def _copy_vocabulary(model: nn.Module, layout: Layout, tokenizer: PreTrainedTokenizerFast, donor: Donor) -> None:
    """Embeddings and head rows of pieces with the same text or the same role."""
    known, given = tokenizer.get_vocab(), donor.tokenizer.get_vocab()
    pairs = {index: given[text] for text, index in known.items() if text in given}
    pairs |= {
        tokenizer.pad_token_id: donor.tokenizer.pad_token_id,
        tokenizer.eos_token_id: donor.tokenizer.eos_token_id,
    }
    rows, source_rows = torch.tensor(list(pairs)), torch.tensor(list(pairs.values()))
    for mine, other in zip(_tables(model, layout.text), _tables(donor.model, donor.layout.text), strict=True):
        mine.weight[rows] = other.weight[source_rows]


def _tables(model: nn.Module, text: Tower) -> tuple[Any, Any]:
    assert text.final_norm is not None
    embeddings = (model.get_submodule(name) for name in text.entry)
    return next(m for m in embeddings if isinstance(m, nn.Embedding)), model.get_submodule(text.final_norm.readers[0])


def _still_image_kernel(patches: Any) -> Tensor:
    """(out, 3, height, width): both frames of a still image hold the same pixels, so their kernels add up."""
    return patches.weight.sum(2) if patches.weight.dim() == 5 else patches.weight


def _draw_positions(model: nn.Module, root: str, std: float) -> None:
    """Sines of row and column in every position table below ``root``, whose first rows may be a class token's."""
    for name, table in model.named_parameters():
        if name.startswith(root) and "position" in name and table.dim() > 1:
            side = math.isqrt(table.shape[-2])
            table.view(-1, table.shape[-1])[-(side**2) :] = std * math.sqrt(2) * _waves(side, table.shape[-1])


def _waves(side: int, width: int) -> Tensor:
    """(side * side, width)."""
    speeds = math.pi / 2 * torch.logspace(0, -1, width // 4, base=LONGEST_WAVE)
    angles = torch.arange(side)[:, None] * speeds
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    shape = (side, side, -1)
    both = torch.cat([axis[:, None].expand(shape), axis[None].expand(shape)], dim=-1)
    return both.flatten(0, 1)
