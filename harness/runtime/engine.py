"""A fused model with a static KV cache: prefill and decoding as passes that CUDA graphs can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mqbench.harness.runtime.attention import KV_BLOCK, Decoding
from mqbench.harness.runtime.blocks import Stream
from mqbench.harness.runtime.cache import StaticKVCache
from mqbench.harness.runtime.fuse import FusedModel, unique_bytes
from mqbench.harness.runtime.graph import PassRunner
from mqbench.harness.runtime.interface import DECODE_RESERVE, MemoryParts, RuntimeInputs
from mqbench.harness.runtime.parts import OTHER, QUANTIZE, VISION_SCOPE, PartClock, clock, part, scope
from mqbench.harness.runtime.pointwise import RowNorm
from mqbench.harness.runtime.projection import Projection
from mqbench.harness.runtime.prompt import PreparedPrompt, prepare_prompt
from mqbench.harness.runtime.systems import System


class FusedRuntime:
    """``interface.Runtime`` over a model whose blocks are the runtime's.

    Args:
        fused: The model.
        system: What runs.
        device: Where inputs go in and logits come out.
    """

    def __init__(self, fused: FusedModel, system: System, device: torch.device) -> None:
        self.fused, self.system, self.device = fused, system, device
        self.layer_devices = fused.decoder.devices
        self.runner = PassRunner(system.engine, [device, *self.layer_devices], system.attention)
        self.cache: StaticKVCache | None = None
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def model(self) -> Any:
        """The Transformers model."""
        return self.fused.model

    def reserve(self, batch_size: int, num_tokens: int) -> None:
        """See ``interface.Runtime``; the capacity is rounded up to whole blocks of keys."""
        capacity = -(-num_tokens // KV_BLOCK) * KV_BLOCK
        if self.cache is not None and (self.cache.batch_size, self.cache.num_tokens) == (batch_size, capacity):
            return self.cache.reset()
        self.runner.drop()
        self.cache = None
        heads = self.fused.layout.text.blocks[0].attention
        shape = heads.num_kv_heads, heads.head_dim
        self.cache = StaticKVCache(
            batch_size, capacity, self.device, self.layer_devices, *shape, self.fused.model.dtype
        )

    def prepare(self, inputs: RuntimeInputs) -> PreparedPrompt:
        """See ``interface.Runtime``."""
        cache = self._cache_for(inputs)
        return prepare_prompt(inputs, self.fused, cache, self.system.order, self.device)

    @torch.no_grad()
    def prefill(self, inputs: RuntimeInputs | PreparedPrompt) -> Tensor:
        """See ``interface.Runtime``."""
        prompt = self.prepare(inputs) if isinstance(inputs, RuntimeInputs) else inputs
        cache = self._cache_for(prompt.inputs)
        if cache.length != prompt.past:
            raise ValueError(f"inputs were prepared behind {prompt.past} tokens, the cache holds {cache.length}")
        new = slice(cache.length, cache.length + prompt.inputs.num_tokens)
        cache.position[:, new] = prompt.slots.position
        cache.valid[:, new] = prompt.slots.valid
        logits = self.runner(prompt.key, lambda tensors: self._run_prompt(prompt, tensors), prompt.tensors)
        cache.length = new.stop
        cache.has_padding = prompt.slots.is_padded
        cache.next_on_host.copy_(prompt.slots.next_on_host)
        cache.next_position.copy_(prompt.slots.next_position)
        return logits

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """See ``interface.Runtime``."""
        cache = self.cache
        if cache is None or not cache.length:
            raise ValueError("nothing was prefilled; call prefill first")
        if tokens.shape != (cache.batch_size,):
            raise ValueError(f"tokens must have shape ({cache.batch_size},), got {tuple(tokens.shape)}")
        if cache.length == cache.num_tokens:
            raise ValueError(f"the cache is full with {cache.length} tokens; reserve more, or reset it")
        self._slot.fill_(cache.length)
        logits = self.runner("decode", self._run_step, {"tokens": tokens.to(self.device), "slot": self._slot})
        cache.length += 1
        return logits

    def reset(self) -> None:
        """See ``interface.Runtime``."""
        if self.cache is not None:
            self.cache.reset()

    def memory(self) -> MemoryParts:
        """See ``interface.Runtime``."""
        kv_bytes, state_bytes = (0, 0) if self.cache is None else (self.cache.num_bytes, self.cache.state_bytes)
        return MemoryParts(unique_bytes(self.model), kv_bytes, state_bytes + self.runner.workspace_bytes)

    def part_of(self, name: str) -> str:
        """See ``interface.Runtime``."""
        path = name.split(".")
        for end in range(len(path), 0, -1):
            module = self.model.get_submodule(".".join(path[:end]))
            if isinstance(module, Projection):
                return QUANTIZE if path[end : end + 1] == ["sites"] else module.gemm_part
            if isinstance(module, RowNorm):
                return QUANTIZE
        return OTHER

    @contextmanager
    def instrumented(self) -> Iterator[PartClock]:
        """See ``interface.Runtime``."""
        self.runner.paused = True
        try:
            with clock(self.device) as parts:
                yield parts
        finally:
            self.runner.paused = False

    def close(self) -> None:
        """See ``interface.Runtime``."""
        self.runner.drop()
        self.cache = None
        del self.fused

    def _cache_for(self, inputs: RuntimeInputs) -> StaticKVCache:
        """The cache, with room for these inputs."""
        cache, needed = self.cache, inputs.num_tokens
        if cache is None or (not cache.length and not cache.fits(inputs.batch_size, needed)):
            self.reserve(inputs.batch_size, needed + DECODE_RESERVE)
        assert self.cache is not None
        if self.cache.batch_size != inputs.batch_size:
            raise ValueError(f"the cache holds {self.cache.batch_size} rows, got {inputs.batch_size}; reset it")
        if self.cache.length + needed > self.cache.num_tokens:
            room = self.cache.num_tokens - self.cache.length
            raise ValueError(f"{needed} tokens do not fit the {room} free slots of the cache; reserve more beforehand")
        return self.cache

    def _run_prompt(self, prompt: PreparedPrompt, tensors: Mapping[str, Tensor]) -> Tensor:
        decoder, rows, cache = self.fused.decoder, self.fused.rows, self.cache
        assert cache is not None
        with scope(VISION_SCOPE):
            features = self._features(tensors, prompt.lengths) if "pixels" in tensors else None
        with part(OTHER):
            ids = tensors["ids"]
            x = decoder.get_input_embeddings()(ids).flatten(0, 1)
            if features is not None:
                x.index_copy_(0, tensors["feature_rows"], features.to(x.dtype))
            angles = decoder.angles(x, tensors["positions"])
        slices = (tensors["text_rows"], tensors["visual_rows"]) if "text_rows" in tensors else None
        cache.slots = tensors["slots"]
        rows.use(tensors.get("row_index"), slices)
        try:
            stream = decoder.run(x, angles, prompt.attention(tensors), cache, len(ids))
        finally:
            rows.use(None)
        return self._logits(stream, tensors["last"])

    def _run_step(self, tensors: Mapping[str, Tensor]) -> Tensor:
        decoder, cache = self.fused.decoder, self.cache
        assert cache is not None
        with part(OTHER):
            slot, batch_size = tensors["slot"], cache.batch_size
            cache.valid.index_fill_(1, slot, True)
            cache.position.index_copy_(1, slot, slot.int().expand(batch_size, 1))
            cache.slots = slot
            x = decoder.get_input_embeddings()(tensors["tokens"])
            positions = (cache.next_position + slot).expand(decoder.position_rows, -1, -1)
            angles = decoder.angles(x, positions)
        return self._logits(decoder.run(x, angles, Decoding(cache.valid), cache, batch_size))

    def _features(self, tensors: Mapping[str, Tensor], lengths: tuple[int, ...]) -> Tensor:
        """Visual tokens of all images, (tokens, LLM width)."""
        angles = tensors["vision_cos"], tensors["vision_sin"]
        stream: Stream = (self.fused.patch_embed(tensors["pixels"]), None)
        for block in self.fused.vision_blocks:
            stream = block.run(stream, angles, lengths)
        features: Tensor = self.fused.projector(*stream)
        return features

    def _logits(self, stream: Stream, rows: Tensor | None = None) -> Tensor:
        hidden = self.fused.decoder.finish(stream, rows)
        logits: Tensor = self.fused.head(hidden)
        return logits
