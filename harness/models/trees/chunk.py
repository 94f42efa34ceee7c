"""What a decoder settles before its layers run, as transformers' own decoders do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask


class Chunk(NamedTuple):
    """One pass of a decoder.

    Attributes:
        cache: The caller's, or a new one; None without.
        start: Cached tokens.
        position_ids: (B or 1, T).
        mask: As the attention implementation takes it.
    """

    cache: Any
    start: int
    position_ids: Tensor
    mask: Any


def prepare_chunk(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    use_cache: bool | None,
) -> Chunk:
    """Cache, positions and mask of a chunk.

    Args:
        config: Of the decoder.
        inputs_embeds: (B, T, C).
        attention_mask: (B, cached + T), 0 at padding, or a mask as the attention implementation takes it.
        position_ids: (B, T); None: the places behind the cached tokens.
        cache: The caller's, or None.
        use_cache: Make a cache when none is given; None: as the config says.
    """
    if cache is None and (config.use_cache if use_cache is None else use_cache):
        cache = DynamicCache(config=config)
    start = 0 if cache is None else cache.get_seq_length()
    if position_ids is None:
        position_ids = torch.arange(start, start + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    return Chunk(cache, start, position_ids, mask)
