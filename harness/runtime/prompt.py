"""What the host works out about a prompt before the device runs it: positions, order, masks, angles, slots."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mqbench.harness.runtime.attention import Causal, PassAttention, Planned, plan_tensors, with_tensors
from mqbench.harness.runtime.cache import StaticKVCache
from mqbench.harness.runtime.decoder import order_of
from mqbench.harness.runtime.fuse import FusedModel
from mqbench.harness.runtime.interface import RuntimeInputs
from mqbench.harness.runtime.rows import slices_of
from mqbench.harness.runtime.systems import Order
from mqbench.kernels.attention import AttentionPlan, plan_attention

PLAN = "plan."


@dataclass(frozen=True)
class NewSlots:
    """What the cache knows about its slots behind a prompt.

    Attributes:
        position: (B, T) int32, original index of the token in each new slot.
        valid: (B, T) bool, False where a new slot is padding.
        is_padded: Some slot is padding, of this prompt or before it.
        next_position: (B, 1) int64: what rotary embeddings count a row's next token as, less its slot.
        next_on_host: The same in host memory.
    """

    position: Tensor
    valid: Tensor
    is_padded: bool
    next_position: Tensor
    next_on_host: Tensor


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt as the device runs it; it fits the cache as it was when it was prepared.

    Attributes:
        inputs: As given.
        past: Tokens in the cache before it.
        tensors: What the pass reads, on the device; their shapes and ``key`` decide what runs, their values do not.
        lengths: Patches per attention window of the vision tower.
        plan: Attention under a plan, whose tensors are in ``tensors`` too; None for plain causal attention.
        num_keys: Cached keys that the plan covers; None for the chunk alone.
        slots: What the cache knows afterwards.
    """

    inputs: RuntimeInputs
    past: int
    tensors: Mapping[str, Tensor]
    lengths: tuple[int, ...]
    plan: AttentionPlan | None
    num_keys: int | None
    slots: NewSlots

    @property
    def key(self) -> Hashable:
        """Equal for prompts that one CUDA graph can run."""
        variant = None if self.plan is None else self.plan.variant
        shapes = tuple((name, tuple(x.shape)) for name, x in sorted(self.tensors.items()))
        return "prefill", self.lengths, variant, self.num_keys, shapes

    def attention(self, tensors: Mapping[str, Tensor]) -> PassAttention:
        """The attention of a pass that reads ``tensors``, these or copies of them."""
        if self.plan is None:
            return Causal()
        count = len(plan_tensors(self.plan))
        return Planned(with_tensors(self.plan, [tensors[f"{PLAN}{i}"] for i in range(count)]), self.num_keys)


@torch.no_grad()
def prepare_prompt(
    inputs: RuntimeInputs, fused: FusedModel, cache: StaticKVCache, order: Order, device: torch.device
) -> PreparedPrompt:
    """Prepares a prompt behind what the cache holds. Small tensors are worked out on the host.

    Raises:
        ValueError: ``attention_mask`` has padding elsewhere than on the left.
    """
    host, past = _on_host(inputs), cache.length
    valid, visual = _valid_tokens(host), _visual_tokens(host, fused)
    is_padded = cache.has_padding or not bool(valid.all())
    reorders = order is Order.AIFS and bool(visual.any())
    tokens = order_of(visual, valid if is_padded else None) if reorders else _in_order(host)
    positions = fused.family.text_positions(fused.model, host) + cache.next_on_host + past
    named = _placed(host, tokens, positions, past)
    if bool(visual.any()):
        named |= _visual_rows(visual, tokens, order)
    tensors = {name: x.to(device) for name, x in named.items()}
    lengths = _add_pixels(tensors, inputs, host, fused, device)
    position, placed = (past + tokens).int().to(device), valid.gather(1, tokens).to(device)
    plan, num_keys = _plan(cache, position, placed if is_padded else None, is_plain=not (reorders or past or is_padded))
    if plan is not None:
        tensors |= {f"{PLAN}{index}": x for index, x in enumerate(plan_tensors(plan))}
    ends = positions.amax(0).masked_fill(~valid, 0).amax(1, keepdim=True) + 1
    following = ends - past - host.num_tokens
    state = NewSlots(position, placed, is_padded, following.to(device), following)
    return PreparedPrompt(inputs, past, tensors, lengths, plan, num_keys, state)


def _on_host(inputs: RuntimeInputs) -> RuntimeInputs:
    """All but the pixels, in host memory."""
    host: dict[str, Tensor] = {name: x.cpu() for name, x in inputs.as_batch().items() if name != "pixel_values"}
    return RuntimeInputs(**host)


def _valid_tokens(host: RuntimeInputs) -> Tensor:
    """(B, T) bool, False at padding."""
    if host.attention_mask is None:
        return torch.ones_like(host.input_ids, dtype=torch.bool)
    valid = host.attention_mask.bool()
    if not bool((valid[:, 1:] >= valid[:, :-1]).all()) or not bool(valid[:, -1].all()):
        raise ValueError("attention_mask must pad on the left and nowhere else, so that each row's last token is real")
    return valid


def _visual_tokens(host: RuntimeInputs, fused: FusedModel) -> Tensor:
    """(B, T) bool, True at image placeholders."""
    if fused.layout.image_token_id is None:
        return torch.zeros_like(host.input_ids, dtype=torch.bool)
    return torch.eq(host.input_ids, fused.layout.image_token_id)


def _in_order(host: RuntimeInputs) -> Tensor:
    """(B, T): every token where it stands."""
    return torch.arange(host.num_tokens).repeat(host.batch_size, 1)


def _placed(host: RuntimeInputs, tokens: Tensor, positions: Tensor, past: int) -> dict[str, Tensor]:
    """Tokens and their rotary positions in the order of processing, the row of each last one, slots of the cache."""
    return {
        "ids": host.input_ids.gather(1, tokens),
        "positions": positions.gather(2, tokens.expand_as(positions)),
        "last": _rows_of(tokens)[:, -1],
        "slots": torch.arange(past, past + host.num_tokens),
    }


def _rows_of(tokens: Tensor) -> Tensor:
    """(B, T): the flat row, in the order of processing, of each token."""
    batch_size, num_tokens = tokens.shape
    return torch.arange(batch_size)[:, None] * num_tokens + tokens.argsort(1)


def _visual_rows(visual: Tensor, tokens: Tensor, order: Order) -> dict[str, Tensor]:
    """Where visual features go, and each row's modality; flat row indices in the order of processing."""
    index = visual.gather(1, tokens).reshape(-1).to(torch.uint8)
    named = {"feature_rows": _rows_of(tokens)[visual], "row_index": index}
    if order is Order.SLICED:
        named["text_rows"], named["visual_rows"] = slices_of(index)
    return named


def _add_pixels(
    tensors: dict[str, Tensor], inputs: RuntimeInputs, host: RuntimeInputs, fused: FusedModel, device: torch.device
) -> tuple[int, ...]:
    """Adds pixels and their angles; returns patches per attention window."""
    if inputs.pixel_values is None:
        return ()
    assert fused.family.vision_positions is not None and host.image_grid_thw is not None
    dtype = fused.model.dtype
    (cos, sin), lengths = fused.family.vision_positions(fused.visual, host.image_grid_thw, dtype)
    tensors |= {"pixels": inputs.pixel_values.to(device, dtype), "vision_cos": cos, "vision_sin": sin}
    return lengths


def _plan(
    cache: StaticKVCache, position: Tensor, valid: Tensor | None, is_plain: bool
) -> tuple[AttentionPlan | None, int | None]:
    """A plan over the chunk, or over all that is cached behind it; None when plain causal attention will do."""
    if is_plain:
        return None, None
    past, num_tokens = cache.length, position.shape[1]
    position = torch.cat([cache.position[:, :past], position], dim=1)
    if valid is not None:
        valid = torch.cat([cache.valid[:, :past], valid], dim=1)
    return plan_attention(position, valid, num_queries=num_tokens), past + num_tokens if past else None
