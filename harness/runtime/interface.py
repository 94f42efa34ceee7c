"""What users of a runtime see: its inputs, its memory by part, and what it does.

Two functions make one: ``convert.runtime_of(loaded, system)`` from a quantized model, and ``build.build_runtime(config,
system, device=..., dtype=..., seed=...)`` from a config alone, with random values in packed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from mqbench.harness.runtime.systems import System

PARTS = (
    "vision gemm",
    "vision attention",
    "projector",
    "llm gemm",
    "llm attention",
    "quantize and norm",
    "other",
)
"""Parts of a pass whose times add up to it, launch gaps aside. Norms, quantization, Hadamard transforms and activation
functions are ``quantize and norm`` wherever they stand, in the projector too; ``projector`` is its products. Rotary
embeddings, token embedding, cache writes and reordering are ``other``; the output head belongs to ``llm gemm``."""


@dataclass(frozen=True)
class RuntimeInputs:
    """One prompt, or one more turn of a conversation, for a batch of rows.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T), 0 at left padding; None when nothing is padded.
        pixel_values: (patches, patch elements) of all images in order, or None.
        image_grid_thw: (images, 3) patches along time, height and width, or None.
        mm_token_type_ids: (B, T), 1 at image placeholders; None without images.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    mm_token_type_ids: Tensor | None = None

    @classmethod
    def from_batch(cls, batch: Mapping[str, Tensor]) -> RuntimeInputs:
        """From what an adapter's ``encode`` returns."""
        named: dict[str, Any] = {field.name: batch.get(field.name) for field in fields(cls)}
        return cls(**named)

    @property
    def batch_size(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens per row, padding included."""
        return self.input_ids.shape[1]

    def to(self, device: str | torch.device) -> RuntimeInputs:
        """The same on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.as_batch().items()}
        return RuntimeInputs(**moved)

    def as_batch(self) -> dict[str, Tensor]:
        """What the model's ``forward`` and ``generate`` take."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in named.items() if x is not None}


@dataclass(frozen=True)
class MemoryParts:
    """Bytes that a runtime keeps allocated between calls.

    Attributes:
        weights_bytes: Parameters and buffers of the model, each storage once.
        kv_cache_bytes: The static KV cache.
        workspace_bytes: Static inputs and outputs and, on a GPU, the private pools of CUDA graphs, which hold the
            activations of the captured passes.
    """

    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.workspace_bytes


class PartTimes(Protocol):
    """Times by part of an instrumented pass."""

    def milliseconds(self) -> Mapping[str, float]:
        """Milliseconds by name of ``PARTS``, all of them, since the pass began; waits for the GPU."""
        ...


class Prepared(Protocol):
    """Inputs with all that the host works out about them: positions, order of tokens, masks, angles."""

    @property
    def inputs(self) -> RuntimeInputs: ...


class Runtime(Protocol):
    """A model that runs under one system, with a static KV cache.

    ``model`` is the Transformers model with its blocks replaced: ``model.generate`` works, with a cache of its own,
    beside ``prefill`` and ``decode``.

    Attributes:
        system: What runs.
        device: Where inputs go in and logits come out.
    """

    system: System
    device: torch.device

    @property
    def model(self) -> Any:
        """The Transformers model that holds the weights."""
        ...

    def reserve(self, batch_size: int, num_tokens: int) -> None:
        """Makes the KV cache hold this many rows and tokens a row (prompt and decoded ones); empties it.

        Captured graphs are dropped when the size changes. ``prefill`` into an empty cache reserves what the prompt and
        ``DECODE_RESERVE`` tokens need when less is there; call this first to decode more than that.
        """
        ...

    def prepare(self, inputs: RuntimeInputs) -> Prepared:
        """The host's part of ``prefill``, for the tokens that are in the cache now.

        ``prefill(inputs)`` does it itself; who times the device alone does it beforehand.
        """
        ...

    def prefill(self, inputs: RuntimeInputs | Any) -> Tensor:
        """Runs a prompt, or another turn behind what the cache holds, and fills the cache.

        Args:
            inputs: ``RuntimeInputs``, or what ``prepare`` of this runtime made of them.

        Returns:
            (B, vocabulary) logits at each row's last token, in the model's dtype; overwritten by the next call.

        Raises:
            ValueError: the batch size differs from the cached one's, or the tokens do not fit the cache.
        """
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """One step: (B,) int64 tokens -> (B, vocabulary) logits, overwritten by the next call.

        Raises:
            ValueError: nothing was prefilled, another batch size, or the cache is full.
        """
        ...

    def reset(self) -> None:
        """Empties the cache; memory and graphs stay."""
        ...

    def memory(self) -> MemoryParts:
        """What is allocated now."""
        ...

    def part_of(self, name: str) -> str:
        """The part of ``PARTS`` that a module of ``model`` belongs to, by its name."""
        ...

    def instrumented(self) -> AbstractContextManager[PartTimes]:
        """While open, passes run eagerly, without graphs, and every part is timed and is a
        ``torch.profiler.record_function`` range named ``mqbench:<part>``."""
        ...

    def close(self) -> None:
        """Frees the model, the cache and the graphs; nothing else may be called afterwards."""
        ...


DECODE_RESERVE = 64
"""Tokens that ``prefill`` leaves room for when the cache is too small."""
