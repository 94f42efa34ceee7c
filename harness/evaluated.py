"""What is evaluated as model inputs, for probes that look at predictions rather than scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mqbench.harness.datasets.files import reference_answer
from mqbench.harness.models.adapter import LoadedModel, ModelAdapter
from mqbench.harness.quant.session import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from mqbench.harness.datasets.files import TaskData

NEW_TOKENS = 32
"""How many tokens continue half a window of text."""


@dataclass(frozen=True)
class EvaluatedBatch:
    """Some evaluated rows.

    Attributes:
        forced: Prompts with the right answers behind them, or whole windows of text.
        answers: Has the model, as it is when this is called, answer the prompts greedily, or continue the windows'
            first halves.
    """

    forced: Batch
    answers: Callable[[], list[str]]


def rows_sha256(parts: Sequence[TaskData]) -> str:
    """Hash of the rows of several benchmarks."""
    return hashlib.sha256("\n".join(part.content_hash for part in parts).encode()).hexdigest()


def benchmark_batches(
    loaded: LoadedModel, adapter: ModelAdapter, parts: Sequence[TaskData], batch_size: int, evaluate: Any
) -> Iterator[EvaluatedBatch]:
    """The rows of benchmarks, in the batches in which they are evaluated.

    Args:
        loaded: The model.
        adapter: Encodes and generates.
        parts: The benchmarks.
        batch_size: Prompts per forward pass.
        evaluate: Module with ``build_messages`` and ``make_batches`` (``harness.evaluate``).
    """
    for data in parts:
        messages = evaluate.build_messages(data.task, data, loaded.layout.family)
        right = [reference_answer(data.task, row) for row in data.rows()]
        limit = min(data.task.max_new_tokens, getattr(adapter, "max_new_tokens", None) or data.task.max_new_tokens)
        for rows in evaluate.make_batches(messages, batch_size):
            prompts = [messages[row] for row in rows]
            forced = adapter.encode(loaded, prompts, [right[row] for row in rows])
            yield EvaluatedBatch(forced, _answers(loaded, adapter, adapter.encode(loaded, prompts), limit))


def window_batches(
    loaded: LoadedModel, adapter: ModelAdapter, windows: Tensor, batch_size: int
) -> Iterator[EvaluatedBatch]:
    """Windows of text, (windows, context_length) token ids."""
    device = next(loaded.model.parameters()).device
    for chunk in windows.to(device).split(batch_size):
        prompt = _without_padding(chunk[:, : chunk.shape[1] // 2])
        yield EvaluatedBatch(_without_padding(chunk), _answers(loaded, adapter, prompt, NEW_TOKENS))


def _without_padding(input_ids: Tensor) -> Batch:
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _answers(loaded: LoadedModel, adapter: ModelAdapter, prompts: Batch, limit: int) -> Callable[[], list[str]]:
    return lambda: adapter.generate(loaded, prompts, limit)
