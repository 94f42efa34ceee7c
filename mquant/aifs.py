"""Attention-Invariant Flexible Switching (paper section 3.1): visual tokens first, so that each static scale of MSQ
serves one contiguous block of rows.

The rule behind the mask is more general than the paper's. Eq. 5 covers one image, and as printed, with indices from 1,
it is off by one (its ``n - m`` must read ``n - m + 1``). Here query i sees key j iff ``original_index(j) <=
original_index(i)`` and j is no padding, with *sequence* indices: M-RoPE repeats position ids, so they order nothing.
This holds for any number of images, padded batches and later turns.

Padding keeps its slots and only real tokens move, so with left padding a row reads ``padding, visual, text`` (A.4 too
groups the padding with the visual tokens). That makes the 2-D attention mask of a batch right before and after the
permutation, also for a KV cache whose chunks were permuted: a decoding step changes nothing and keeps no state.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.kv_cache import QUANTIZED_KV_ATTENTION
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.modality import Hooks, ModalityContext, valid_mask
from mqbench.harness.quant.session import Session

MASKED_ATTENTION = ("sdpa", "eager", QUANTIZED_KV_ATTENTION)
"""Attention implementations that take an arbitrary mask."""

TOKEN_TYPES = "token_type_ids"
"""Argument of a decoder with experts, (B, T): which of them each token takes. It moves with the tokens."""


def reorder_tokens(session: Session) -> None:
    """Step: from now on the LLM processes visual tokens first. Outputs are those of the unreordered model."""
    enable_aifs(session.model, session.layout, session.context)


def enable_aifs(model: nn.Module, layout: Layout, context: ModalityContext) -> Hooks:
    """Wraps the LLM decoder so that every chunk with visual tokens runs reordered.

    Embeddings, position ids (all rows of M-RoPE), token types, mask and ``context.visual`` are permuted on the way in,
    and hidden states come back in the original order, so callers, logits and ``generate`` notice nothing. Attention
    maps, when asked for, stay in the reordered basis. Chunks without visual tokens (decoding steps) pass untouched.

    Args:
        model: The root; ``track_modality`` must run on it with the same ``context``.
        layout: Names the decoder.
        context: Tells which tokens of the running chunk are visual.

    Returns:
        A handle whose ``remove`` restores the original order; caches filled before stay valid.

    Raises:
        LayoutError: the decoder's attention takes no mask (FlashAttention) or only looks at a sliding window.
    """
    if layout.image_token_id is None:
        return Hooks([])
    decoder = model.get_submodule(layout.text_root)
    _check_attention(decoder, layout)
    switch = _TokenSwitch(decoder, context)
    return Hooks(
        [
            decoder.register_forward_pre_hook(switch.reorder, with_kwargs=True),
            decoder.register_forward_hook(switch.restore, always_call=True),
        ]
    )


def reorder_permutation(visual: Tensor, valid: Tensor | None = None) -> Tensor:
    """The stable permutation with visual tokens before text tokens.

    Args:
        visual: (B, T) bool, True at visual tokens.
        valid: (B, T) bool, False at padding, which keeps its slots; None when nothing is padded.

    Returns:
        (B, T) order: the token in slot p of the new sequence stood in slot ``order[b, p]`` of the old one.
    """
    valid = torch.ones_like(visual) if valid is None else valid
    rank = torch.where(valid, torch.where(visual, 1, 2), 0)
    tokens = torch.argsort(rank, dim=1, stable=True)  # padding, visual, text
    slots = torch.argsort(valid.long(), dim=1, stable=True)  # slots of padding, slots of real tokens
    return torch.empty_like(tokens).scatter_(1, slots, tokens)


def aifs_mask(order: Tensor, valid: Tensor | None = None, past_valid: Tensor | None = None) -> Tensor:
    """Which keys each query of a reordered chunk may see: the causal mask of Eq. 4 under the permutation.

    Args:
        order: (B, T) original index of the token in each slot.
        valid: (B, T) bool, False at padding slots; None when nothing is padded.
        past_valid: (B, P) bool, False at padding among the P cached keys, all of which precede the chunk.

    Returns:
        (B, 1, T, P + T) bool, True where attention is allowed.
    """
    sees = order[:, :, None] >= order[:, None, :]  # (B, T, T)
    if valid is not None:
        sees = sees & valid[:, None, :]
    if past_valid is not None:
        sees = torch.cat([past_valid[:, None, :].expand(-1, order.shape[1], -1), sees], dim=-1)
    return sees[:, None]


class _TokenSwitch:
    """The two hooks on the decoder and what they share during one forward pass."""

    def __init__(self, decoder: nn.Module, context: ModalityContext) -> None:
        self.parameter_names = list(inspect.signature(decoder.forward).parameters)
        self.additive = _attention_name(decoder) == "eager"
        self.context = context
        self.order: Tensor | None = None
        self.visual: Tensor | None = None

    def reorder(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        inputs = dict(zip(self.parameter_names, args, strict=False)) | kwargs
        self.order = None
        if self.context.visual is None:
            return (), inputs
        embeds, past = inputs["inputs_embeds"], _past_length(inputs.get("past_key_values"))
        attention_mask = _padding_mask(inputs.get("attention_mask"), embeds, past)
        valid = valid_mask(attention_mask, embeds.shape[1])
        self.visual, self.order = self.context.visual, reorder_permutation(self.context.visual, valid)
        mask = aifs_mask(self.order, valid, attention_mask[:, :past].bool())
        self.context.visual = self.visual.gather(1, self.order)
        inputs["inputs_embeds"] = _select_tokens(embeds, self.order)
        inputs["position_ids"] = _permuted_positions(inputs.get("position_ids"), self.order, past)
        inputs["attention_mask"] = _additive(mask, embeds.dtype) if self.additive else mask
        if inputs.get(TOKEN_TYPES) is not None:
            inputs[TOKEN_TYPES] = inputs[TOKEN_TYPES].gather(1, self.order)
        return (), inputs

    def restore(self, _: nn.Module, args: Any, output: Any) -> Any:
        if self.order is None:
            return None
        inverse, self.order = torch.argsort(self.order, dim=1), None
        self.context.visual = self.visual
        if output is None:  # the pass raised
            return None
        if isinstance(output, tuple):
            return _select_tokens(output[0], inverse), *output[1:]
        output.last_hidden_state = _select_tokens(output.last_hidden_state, inverse)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(_select_tokens(states, inverse) for states in output.hidden_states)
        return output


def _check_attention(decoder: nn.Module, layout: Layout) -> None:
    name = _attention_name(decoder)
    if name not in MASKED_ATTENTION:
        raise LayoutError(f"AIFS needs a masked attention, not '{name}'; load the model with sdpa or eager attention")
    if getattr(getattr(decoder, "config", None), "sliding_window", None) is not None:
        raise LayoutError(
            f"AIFS does not cover the sliding-window attention of this '{layout.family}' model; leave it out"
        )


def _attention_name(decoder: nn.Module) -> str:
    return getattr(getattr(decoder, "config", None), "_attn_implementation", None) or "eager"


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _padding_mask(attention_mask: Any, embeds: Tensor, past: int) -> Tensor:
    """The (B, P + T) padding mask, all ones when the caller gave none.

    Raises:
        LayoutError: the caller brought another mask, whose columns do not name single tokens.
    """
    shape = embeds.shape[0], past + embeds.shape[1]
    if attention_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=embeds.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise LayoutError(f"AIFS needs a 2-D attention mask of shape {shape}, got {got}; use the default dynamic cache")
    return attention_mask


def _permuted_positions(position_ids: Tensor | None, order: Tensor, past: int) -> Tensor:
    """Position ids (..., B or 1, T) in the new order; without any, the sequence index counts as the decoder would."""
    if position_ids is None:
        return order + past
    return position_ids.expand(*position_ids.shape[:-2], *order.shape).gather(
        -1, order.expand(*position_ids.shape[:-2], *order.shape)
    )


def _select_tokens(states: Tensor, order: Tensor) -> Tensor:
    """Rows of (B, T, C) in another order."""
    return states.gather(1, order[..., None].expand_as(states))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
