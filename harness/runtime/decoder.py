"""The LLM's decoder over flat rows, in place of that of Transformers and with its signature.

Under AIFS it permutes tokens once on the way in and back on the way out (paper Sec. 3.1). Query i sees key j iff the
original index of j is at most that of i and j is no padding, so any number of images, left padding and later turns are
covered. Padding keeps its slots; behind it come visual tokens, then text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.quant.modality import ModalityContext, valid_mask
from mqbench.harness.runtime.attention import Causal, Masked, PassAttention, Planned
from mqbench.harness.runtime.blocks import Angles, Stream, TextBlock, added, moved
from mqbench.harness.runtime.pointwise import RowNorm
from mqbench.harness.runtime.rows import Rows, slices_of
from mqbench.harness.runtime.systems import Order
from mqbench.kernels.attention import plan_attention


class RuntimeDecoder(nn.Module):
    """Embeddings in, normalized hidden states out.

    Children of the original decoder keep their names, its hooks are gone.

    Args:
        original: The decoder of Transformers whose children are taken over, its blocks and last norm replaced already.
        blocks: Name of its list of ``TextBlock``.
        norm: Name of its last ``RowNorm``.
        order: How rows of two modalities are ordered.
        rows: What the sites of this decoder's linears read.
        context: Tells which tokens of a pass through Transformers' interface are visual.
        position_rows: Rows of position ids that the rotary embedding takes; 1 for plain ones.
    """

    def __init__(
        self,
        original: Any,
        blocks: str,
        norm: str,
        order: Order,
        rows: Rows,
        context: ModalityContext,
        position_rows: int,
    ) -> None:
        super().__init__()
        self.config = original.config
        for name, child in original.named_children():
            self.add_module(name, child)
        self.names = blocks, norm
        self.order, self.rows, self.context, self.position_rows = order, rows, context, position_rows

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = getattr(self, self.names[0])
        return blocks

    @property
    def devices(self) -> list[torch.device]:
        """Where each block is."""
        return [block.device for block in self.blocks if isinstance(block, TextBlock)]

    @property
    def final_norm(self) -> RowNorm:
        norm: RowNorm = getattr(self, self.names[1])
        return norm

    def get_input_embeddings(self) -> nn.Module:
        """As Transformers asks for it."""
        return self.get_submodule("embed_tokens")

    def angles(self, x: Tensor, positions: Tensor) -> Angles:
        """Cosines and sines, (B, T, head_dim), of positions (position_rows, B, T), in the dtype of ``x``."""
        angles: Angles = self.get_submodule("rotary_emb")(x, positions if self.position_rows > 1 else positions[0])
        return angles

    def run(self, x: Tensor, angles: Angles, attention: PassAttention, cache: Any, batch_size: int) -> Stream:
        """All blocks over rows (batch_size * T, C)."""
        stream: Stream = (x, None)
        place = x.device
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            if block.device != place:
                place = block.device
                stream, attention = moved(stream, place), attention.to(place)
                angles = angles[0].to(place), angles[1].to(place)
            stream = block.run(stream, angles, attention, cache, batch_size)
        return moved(stream, x.device)

    def finish(self, stream: Stream, rows: Tensor | None = None) -> Tensor:
        """The last norm, of all rows or of those named by ``rows`` (int64), in the order in which they ran."""
        x, branch = stream
        if rows is not None:
            x, branch = x[rows], None if branch is None else branch[rows]
        return self.final_norm(added((x, branch)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **unused: Any,
    ) -> Any:
        """As Transformers calls it; returns a ``BaseModelOutputWithPast``. Shapes: (B, T, C) -> (B, T, C)."""
        from transformers import DynamicCache
        from transformers.modeling_outputs import BaseModelOutputWithPast

        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        positions = self._positions(position_ids, x, past)
        visual, order = self.context.visual, None
        if self.order is Order.AIFS and visual is not None:
            order = order_of(visual, _valid_tokens(attention_mask, visual.shape[1], past))
            attention = _permuted_attention(attention_mask, order, past)
            x, visual = _select(x, order), visual.gather(1, order)
            positions = positions.expand(-1, *order.shape).gather(2, order.expand_as(positions))
        else:
            attention = self._attention(attention_mask, x, past_key_values, past)
        hidden = self._states(x, positions, attention, past_key_values, visual)
        if order is not None:
            hidden = _select(hidden, order.argsort(1))
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _states(
        self, x: Tensor, positions: Tensor, attention: PassAttention, cache: Any, visual: Tensor | None
    ) -> Tensor:
        index = None if visual is None else visual.reshape(-1).to(torch.uint8)
        self.rows.use(index, None if index is None or self.order is not Order.SLICED else slices_of(index))
        try:
            stream = self.run(x.reshape(-1, x.shape[-1]), self.angles(x, positions), attention, cache, len(x))
        finally:
            self.rows.use(None)
        return self.finish(stream).view(x.shape)

    def _positions(self, position_ids: Tensor | None, x: Tensor, past: int) -> Tensor:
        """(position_rows, B or 1, T). Of four rows the first is the sequence index, which M-RoPE does not read."""
        if position_ids is None:
            return (torch.arange(x.shape[1], device=x.device) + past).expand(self.position_rows, 1, -1)
        if position_ids.dim() == 2:
            return position_ids.expand(self.position_rows, -1, -1)
        return position_ids[-self.position_rows :]

    def _attention(self, attention_mask: Any, x: Tensor, cache: Any, past: int) -> PassAttention:
        from transformers.masking_utils import create_causal_mask

        mask = _prepared_mask(attention_mask)
        if mask is None:
            mask = create_causal_mask(
                config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=cache
            )
        return Causal() if mask is None and not past else Masked(mask)


def order_of(visual: Tensor, valid: Tensor | None = None) -> Tensor:
    """The stable permutation with visual tokens first; padding keeps its slots.

    Args:
        visual: (B, T) bool.
        valid: (B, T) bool, False at padding; None when nothing is padded.

    Returns:
        (B, T) int64: the token in slot p stood in slot ``order[b, p]`` before.
    """
    if valid is None:
        return torch.argsort((~visual).to(torch.uint8), dim=1, stable=True)
    rank = torch.where(valid, torch.where(visual, 1, 2), 0)
    tokens = torch.argsort(rank, dim=1, stable=True)  # padding, visual, text
    slots = torch.argsort(valid.to(torch.uint8), dim=1, stable=True)  # slots of padding, then those of tokens
    return torch.empty_like(tokens).scatter_(1, slots, tokens)


def _permuted_attention(attention_mask: Any, order: Tensor, past: int) -> PassAttention:
    """Attention of a chunk whose tokens stand in another order, behind ``past`` cached ones."""
    mask = _prepared_mask(attention_mask)
    if mask is not None:
        num_queries, num_keys = mask.shape[2:]
        columns = torch.arange(num_keys, device=order.device).repeat(len(order), 1)
        columns[:, past : past + num_queries] = past + order
        mask = mask.expand(len(order), -1, -1, -1).gather(2, order[:, None, :, None].expand(-1, 1, -1, num_keys))
        return Masked(mask.gather(3, columns[:, None, None].expand_as(mask)))
    chunk = (past + order).int()
    before = torch.arange(past, dtype=torch.int32, device=order.device).expand(len(order), -1)
    position = torch.cat([before, chunk], dim=1)
    valid = valid_mask(attention_mask, position.shape[1])
    return Planned(plan_attention(position, valid, num_queries=order.shape[1]), position.shape[1])


def _valid_tokens(attention_mask: Any, num_tokens: int, past: int) -> Tensor | None:
    """The chunk's tokens that are no padding, (B, T) bool; None for all. A row's last token sees all of them."""
    mask = _prepared_mask(attention_mask)
    if mask is None:
        return valid_mask(attention_mask, num_tokens)
    seen = mask[:, 0, -1, past : past + num_tokens]
    return seen if seen.dtype == torch.bool else seen == 0


def _prepared_mask(attention_mask: Any) -> Tensor | None:
    """The 4-D mask that ``generate`` made beforehand, if it did."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    return attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 else None


def _select(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of (B, T, C) in another order."""
    return x.gather(1, order[..., None].expand_as(x))
