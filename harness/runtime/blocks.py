"""Transformer blocks on flat rows, in place of those of Transformers and with their signatures.

Inside, the last residual sum of a block is left to the norm behind it: ``run`` takes and returns a stream and a branch
that is still to be added. ``forward``, which Transformers calls, adds it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.runtime.attention import Causal, Masked, PassAttention, stock_attention
from mqbench.harness.runtime.parts import LLM_ATTENTION, OTHER, QUANTIZE, VISION_ATTENTION, part
from mqbench.harness.runtime.pointwise import RowNorm
from mqbench.harness.runtime.projection import Projection

Stream = tuple[Tensor, Tensor | None]
"""(M, C) residual stream, and the (M, C) branch that is still to be added to it."""

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of a rotary embedding."""


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding's function, looked up by name when it is called.

    Attributes:
        module: Module of Transformers that defines it.
        function: Its name: (q, k, cos, sin) -> rotated q and k.
    """

    module: str
    function: str

    def __call__(self, q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        rotated: tuple[Tensor, Tensor] = getattr(sys.modules[self.module], self.function)(q, k, *angles)
        return rotated


@dataclass(frozen=True)
class Heads:
    """Shape of an attention.

    Attributes:
        query: Query heads.
        key: Key and value heads.
        width: Of one head.
    """

    query: int
    key: int
    width: int

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., (query + 2 key) * width) -> three of (..., heads, width)."""
        q, k, v = qkv.unflatten(-1, (-1, self.width)).split((self.query, self.key, self.key), dim=-2)
        return q, k, v


class FusedBlock(nn.Module):
    """What vision and text blocks have in common: norm, attention, norm, MLP.

    Args:
        attention_norm: Norm before attention.
        qkv: Queries, keys and values side by side.
        out: Output projection of attention.
        heads: Shape of the attention.
        rotary: Rotary embedding of queries and keys.
        mlp_norm: Norm before the MLP.
        mlp_in: fc1, or gate and up side by side.
        mlp_out: fc2 or down.
        activation: Key of ``pointwise.ACTIVATIONS``.
        gated: The MLP multiplies up with the activation of gate.
    """

    def __init__(
        self,
        attention_norm: RowNorm,
        qkv: Projection,
        out: Projection,
        heads: Heads,
        rotary: Rotary,
        mlp_norm: RowNorm,
        mlp_in: Projection,
        mlp_out: Projection,
        activation: str,
        gated: bool,
    ) -> None:
        super().__init__()
        self.attention_norm, self.qkv, self.out = attention_norm, qkv, out
        self.mlp_norm, self.mlp_in, self.mlp_out = mlp_norm, mlp_in, mlp_out
        self.heads, self.rotary = heads, rotary
        self.activation, self.gated = activation, gated

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(iter(self.state_tensors())).device

    def state_tensors(self) -> list[Tensor]:
        """Parameters and buffers."""
        return [*self.parameters(), *self.buffers()]

    def mlp(self, x: Tensor, residual: Tensor) -> Stream:
        """The MLP branch behind ``x + residual``, and that sum."""
        hidden, total = self.mlp_in.of_norm(self.mlp_norm, x, residual)
        project = self.mlp_out.of_gated if self.gated else self.mlp_out.of_activation
        return total, project(hidden, self.activation)


class VisionBlock(FusedBlock):
    """A block of a vision tower over patches of several images, which attend within their image."""

    def run(self, stream: Stream, angles: Angles, lengths: Sequence[int]) -> Stream:
        """One block; ``lengths`` are the patches per attention window, in order."""
        qkv, residual = self.qkv.of_norm(self.attention_norm, *stream)
        with part(OTHER):
            q, k, v = self.heads.split(qkv)
            q, k = self.rotary(q, k, angles)
        with part(VISION_ATTENTION):
            rows = _windowed_attention(q, k, v, lengths)
        return self.mlp(self.out(rows), residual)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: Angles,
        **unused: Any,
    ) -> Tensor:
        """As Transformers calls it. Shapes: (patches, C), (windows + 1,) -> (patches, C)."""
        return added(self.run((hidden_states, None), position_embeddings, cu_seqlens.diff().tolist()))


class TextBlock(FusedBlock):
    """A block of an LLM.

    Args:
        layer: Its index in the KV cache.
        parts: Of ``FusedBlock``.
    """

    def __init__(self, layer: int, **parts: Any) -> None:
        super().__init__(**parts)
        self.layer = layer

    def run(self, stream: Stream, angles: Angles, attention: PassAttention, cache: Any, batch_size: int) -> Stream:
        """One block over rows (batch_size * T, C); ``cache`` has Transformers' ``update`` or is None."""
        qkv, residual = self.qkv.of_norm(self.attention_norm, *stream)
        with part(OTHER):
            qkv = qkv.view(batch_size, -1, qkv.shape[-1])
            q, k, v = (x.transpose(1, 2) for x in self.heads.split(qkv))
            q, k = self.rotary(q, k, angles)
            cached = (k, v) if cache is None else cache.update(k, v, self.layer)
        with part(LLM_ATTENTION):
            rows = attention(q, (k, v), cached).transpose(1, 2).reshape(len(residual), -1)
        return self.mlp(self.out(rows), residual)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Angles | None = None,
        **unused: Any,
    ) -> Tensor:
        """As Transformers calls it. Shapes: (B, T, C) -> (B, T, C)."""
        batch_size, num_tokens, width = hidden_states.shape
        assert position_embeddings is not None
        is_first = past_key_values is None or not past_key_values.get_seq_length(self.layer)
        plain = Causal() if is_first and attention_mask is None else Masked(attention_mask)
        rows = hidden_states.reshape(-1, width)
        stream = self.run((rows, None), position_embeddings, plain, past_key_values, batch_size)
        return added(stream).view(batch_size, num_tokens, width)


def added(stream: Stream) -> Tensor:
    """The stream with its branch."""
    x, branch = stream
    if branch is None:
        return x
    with part(QUANTIZE):
        return x + branch


def moved(stream: Stream, device: torch.device) -> Stream:
    """The stream on the device of the next block."""
    x, branch = stream
    return x.to(device), None if branch is None else branch.to(device)


def _windowed_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention within consecutive windows; those of one length are one batch. Shapes: (P, H, D) -> (P, H * D)."""
    if len(set(lengths)) == 1:
        batches = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return stock_attention(*batches).transpose(1, 2).flatten(2).flatten(0, 1)
    windows = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    outs = [stock_attention(*(x.transpose(0, 1)[None] for x in window)) for window in windows]
    return torch.cat([out[0].transpose(0, 1).flatten(1) for out in outs])
