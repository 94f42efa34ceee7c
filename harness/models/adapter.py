"""What a model family provides: where its weights are, how to load and encode, and its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.session import Batch

Message = Sequence[dict[str, str]]
"""VLMEvalKit's form: ``[{"type": "image", "value": path}, {"type": "text", "value": prompt}]``."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with all that is needed to feed it."""

    name: str
    model: nn.Module
    processor: Any
    layout: Layout


class ModelAdapter(Protocol):
    """One registered model; entry points of group ``mqbench.models`` name a list of these.

    Attributes:
        name: As users type it (``qwen2-vl-7b``).
        paper_name: Its row in the paper's tables, or None.
        how_to_get: One line for users who lack the weights.
        max_new_tokens: Longest answer in tokens, where benchmarks allow more; None, or left out, for the benchmarks'
            own limit.

    A model whose files hold Python code that must run says so in one more attribute, ``needs_remote_code``: what that
    code is (``"tokenizer"``). Its ``load`` then takes ``trust_remote_code=True``, and is only called when the user
    passed ``--trust-remote-code``.
    """

    name: str
    paper_name: str | None
    how_to_get: str
    max_new_tokens: int | None

    def find_weights(self, models_dir: Path | None) -> Path | None:
        """The folder with the weights: shipped, under ``models_dir/NAME``, or in the Hugging Face cache; else None."""
        ...

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """Loads weights and processor; never touches the network.

        Raises:
            MissingWeightsError: the folder lacks a file.
            NonFiniteError: a weight is NaN or Inf.
        """
        ...

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; ``answers``' tokens follow the prompts."""
        ...

    def generate(self, loaded: LoadedModel, batch: Batch, max_new_tokens: int) -> list[str]:
        """Greedy answers of one encoded batch."""
        ...
