"""What adapters of models with a class in transformers share: finding, checking and loading files, greedy answers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mqbench.harness.errors import MissingWeightsError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.decoding import greedy_answers, left_padded
from mqbench.harness.models.weights import (
    CONFIG_FILE,
    MULTIMODAL_FILES,
    FileChoices,
    check_complete,
    check_finite_weights,
    find_folder,
    from_pretrained,
)
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.session import Batch

ATTENTION = "sdpa"
"""Pinned: the attention backend changes scores, and AIFS needs one that takes a mask."""


@dataclass(frozen=True)
class NativeAdapter(ABC):
    """One registered model; a family says which classes, what layout, and how to encode.

    Attributes:
        name: As users type it.
        paper_name: Its row in the paper's tables, or None.
        how_to_get: One line for users who lack the weights.
        repo_id: Its Hugging Face repository.
        attn_implementation: The attention that it runs with.
        max_new_tokens: Longest answer in tokens, where benchmarks allow more; None for the benchmarks' own limit.
        needed: What its folder must hold beside weights.
    """

    needed: ClassVar[FileChoices] = MULTIMODAL_FILES

    name: str
    paper_name: str | None
    how_to_get: str
    repo_id: str
    attn_implementation: str = ATTENTION
    max_new_tokens: int | None = None

    @property
    @abstractmethod
    def model_type(self) -> str:
        """``model_type`` of the family's config.json."""

    @abstractmethod
    def model_class(self) -> Any:
        """Transformers' class of the model."""

    @abstractmethod
    def load_processor(self, path: Path) -> Any:
        """Transformers' processor from local files."""

    @abstractmethod
    def layout(self, model: nn.Module) -> Layout:
        """The layout of a loaded model."""

    @abstractmethod
    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; ``answers``' tokens follow the prompts."""

    def find_weights(self, models_dir: Path | None) -> Path | None:
        """``models_dir/NAME``; or the snapshot in the Hugging Face cache; or None."""
        return find_folder(self.name, self.repo_id, Path(), models_dir, self.needed)

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """Loads weights and processor from local files.

        Raises:
            LayoutError: the model has a linear that the family does not know.
            MissingWeightsError: the folder holds another family, lacks a file or a weight, or a file cannot be read.
            NonFiniteError: a weight is NaN or Inf.
        """
        check_complete(path, self.how_to_get, self.needed)
        check_model_type(path, self.model_type, self.how_to_get)
        model = from_pretrained(self.model_class(), path, dtype, self.attn_implementation, self.how_to_get)
        check_finite_weights(model)
        processor = self.load_processor(path)
        layout = self.layout(model)
        layout.check(model)
        return LoadedModel(self.name, model.to(device).eval().requires_grad_(False), processor, layout)

    def generate(self, loaded: LoadedModel, batch: Batch, max_new_tokens: int) -> list[str]:
        """Greedy answers of one encoded batch, without special tokens and spaces around them."""
        tokenizer = loaded.processor.tokenizer
        answers = greedy_answers(loaded.model, tokenizer, batch, max_new_tokens, pad_id(tokenizer))
        return [answer.strip() for answer in answers]


def padded_batch(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[str] | None,
    pixels: Tensor | None,
) -> Batch:
    """Prompts as token ids, with their answers behind them and ``pixel_values`` where there are any."""
    tokenizer = loaded.processor.tokenizer
    rows = [list(prompt) for prompt in prompts]
    if answers is not None:
        tails = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        rows = [row + tail for row, tail in zip(rows, tails, strict=True)]
    batch = left_padded(rows, pad_id(tokenizer))
    if pixels is not None:
        batch["pixel_values"] = pixels
    device = next(loaded.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pad_id(tokenizer: Any) -> int:
    """What stands at masked places does not matter: a tokenizer without a padding token pads with its last one."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_model_type(path: Path, wanted: str, how_to_get: str) -> None:
    """Raises MissingWeightsError when a folder's config.json cannot be read or describes another family."""
    file = path / CONFIG_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MissingWeightsError(f"'{file}' names no model type ({error}); {how_to_get}") from None
    if found != wanted:
        raise MissingWeightsError(f"'{path}' holds a model of type '{found}', not '{wanted}'; {how_to_get}")
