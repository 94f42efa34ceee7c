"""Random inputs of a shape: token ids and pixels, one ``RuntimeInputs`` per turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mqbench.harness.runtime.interface import RuntimeInputs
from mqbench.harness.sweep.protocol import ImageRules, Shape, image_size, pad_tokens, prefill_length, text_segments

SPECIAL_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
TEXT_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def make_turns(
    shape: Shape, rules: ImageRules, config: Any, *, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[RuntimeInputs, ...]:
    """The prefills of a shape. All turns have the same images: what is in them changes no time.

    Args:
        shape: How many of what.
        rules: The image preprocessor.
        config: A Qwen2-VL configuration: special tokens, vocabulary.
        device: Where the tensors go.
        dtype: Of the pixels.
        seed: Of ids and pixels.

    Returns:
        Per turn: ``input_ids``, ``mm_token_type_ids`` (B, T), ``attention_mask`` (B, T) or None without padding,
        ``pixel_values`` (B * images * patches, patch elements), ``image_grid_thw`` (B * images, 3).
    """
    generator = torch.Generator().manual_seed(seed)
    size = image_size(shape.image_px, rules)
    count = shape.batch * shape.images
    pixels = torch.Generator(device).manual_seed(seed)
    values = torch.randn(count * size.patches, rules.patch_elements, generator=pixels, device=device, dtype=dtype)
    grids = torch.tensor([size.grid] * count, device=device)
    allowed = text_ids(config)
    turns = []
    for _ in range(shape.turns):
        ids = torch.stack([_row(shape, rules, row, config, allowed, generator) for row in range(shape.batch)])
        turns.append(
            RuntimeInputs(
                input_ids=ids.to(device),
                attention_mask=attention_mask(shape, rules, device),
                pixel_values=values,
                image_grid_thw=grids,
                mm_token_type_ids=(ids == config.image_token_id).int().to(device),
            )
        )
    return tuple(turns)


def attention_mask(shape: Shape, rules: ImageRules, device: torch.device) -> Tensor | None:
    """(B, T) int64 with zeros at the padding on the left; None when every row is as long as the longest."""
    pads = torch.tensor([pad_tokens(shape, rules, row) for row in range(shape.batch)])
    if not pads.any():
        return None
    return (torch.arange(prefill_length(shape, rules)) >= pads[:, None]).long().to(device)


def decode_ids(batch: int, config: Any, device: torch.device, seed: int) -> Tensor:
    """(B,) int64 ids to decode: always the same ones, so that no system waits for a sampler and none stops early."""
    allowed = text_ids(config)
    picks = torch.randint(len(allowed), (batch,), generator=torch.Generator().manual_seed(seed))
    return allowed[picks].to(device)


def text_ids(config: Any) -> Tensor:
    """(ids,) int64: the vocabulary without special tokens."""
    special = {getattr(config, name, None) for name in SPECIAL_IDS}
    special |= {getattr(config.text_config, name, None) for name in TEXT_SPECIAL_IDS}
    keep = torch.ones(config.text_config.vocab_size, dtype=torch.bool)
    keep[[one for one in special if isinstance(one, int) and one < len(keep)]] = False
    return keep.nonzero()[:, 0]


def _row(shape: Shape, rules: ImageRules, row: int, config: Any, allowed: Tensor, generator: torch.Generator) -> Tensor:
    """(T,) ids of a row; padding is a text token that the mask hides."""
    pieces = [allowed[:1].expand(pad_tokens(shape, rules, row))]
    image = torch.full((image_size(shape.image_px, rules).visual_tokens,), config.image_token_id)
    for index, length in enumerate(text_segments(shape, row)):
        text = allowed[torch.randint(len(allowed), (length,), generator=generator)]
        if index > 0:
            text[0] = config.vision_end_token_id
        if index < shape.images:
            text[-1] = config.vision_start_token_id
        pieces += [text, image] if index < shape.images else [text]
    return torch.cat(pieces)
