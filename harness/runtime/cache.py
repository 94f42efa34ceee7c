"""The static KV cache of a runtime: allocated once, written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StaticKVCache:
    """Keys and values of all layers, and which token stands in which slot.

    Under AIFS slots are not in the order of the text; what matters is each slot's original index.

    Args:
        batch_size: Rows.
        num_tokens: Slots per row.
        device: Of what is known about the slots.
        devices: Of each layer's keys and values.
        kv_heads: Key heads.
        head_dim: Width of one head.
        dtype: Of keys and values.

    Attributes:
        length: Slots in use, the same for all rows.
        position: (B, S) int32, original index in the sequence of the token in each slot.
        valid: (B, S) bool, True where a slot holds a token that is no padding.
        has_padding: Some slot in use is padding.
        next_position: (B, 1) int64: what rotary embeddings count a row's next token as, less its slot.
        next_on_host: The same in host memory, so that nobody waits for the device.
        slots: (T,) int64, where the running pass writes; set by the pass.
    """

    def __init__(
        self,
        batch_size: int,
        num_tokens: int,
        device: torch.device,
        devices: Sequence[torch.device],
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.batch_size, self.num_tokens = batch_size, num_tokens
        shape = batch_size, kv_heads, num_tokens, head_dim
        self.keys = [torch.zeros(shape, dtype=dtype, device=place) for place in devices]
        self.values = [torch.zeros(shape, dtype=dtype, device=place) for place in devices]
        self.position = torch.zeros(batch_size, num_tokens, dtype=torch.int32, device=device)
        self.valid = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)
        self.next_position = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.next_on_host = torch.zeros(batch_size, 1, dtype=torch.int64)
        self.has_padding = False
        self.slots: Tensor | None = None
        self.length = 0

    def fits(self, batch_size: int, num_tokens: int) -> bool:
        """Empty, it could hold these rows of these tokens."""
        return self.batch_size == batch_size and num_tokens <= self.num_tokens

    def reset(self) -> None:
        """Forgets all tokens. Old keys and values stay in memory, finite, and nobody sees them."""
        self.length = 0
        self.has_padding = False
        self.valid.zero_()
        self.next_position.zero_()
        self.next_on_host.zero_()

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Writes (B, H_kv, T, D) of a layer to the running pass's slots; returns all slots, (B, H_kv, S, D)."""
        assert self.slots is not None
        slots = self.slots.to(key.device)
        self.keys[layer].index_copy_(2, slots, key)
        self.values[layer].index_copy_(2, slots, value)
        return self.keys[layer], self.values[layer]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    @property
    def state_bytes(self) -> int:
        """Bytes of what is known about the slots."""
        return sum(x.numel() * x.element_size() for x in (self.position, self.valid, self.next_position))
