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
        prompts: What the model is asked, or the first halves of windows of text; left-padded.
        forced: Prompts with the right answers behind them, or whole windows of text; left-padded.
        answers: Has the model, as it is when this is called, answer the prompts greedily.
    """

    prompts: Batch
    forced: Batch
    answers: Callable[[], list[str]]

    @property
    def predicts_answer(self) -> Tensor:
        """Where in ``forced`` the next token is one of the right answer, or ends it: (B, T) bool.

        These predictions alone make an answer right or wrong: those of a prompt's last token and of the answer's own.
        """
        given = self.forced["attention_mask"]
        answer_lengths = given.sum(1) - self.prompts["attention_mask"].sum(1)
        from_the_end = torch.arange(given.shape[1], 0, -1, device=given.device)
        return from_the_end <= answer_lengths[:, None] + 1


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
            asked = [messages[row] for row in rows]
            forced = adapter.encode(loaded, asked, [right[row] for row in rows])
            prompts = adapter.encode(loaded, asked)
            yield EvaluatedBatch(prompts, forced, _answers(loaded, adapter, prompts, limit))


def window_batches(
    loaded: LoadedModel, adapter: ModelAdapter, windows: Tensor, batch_size: int
) -> Iterator[EvaluatedBatch]:
    """Windows of text, (windows, context_length) token ids."""
    device = next(loaded.model.parameters()).device
    for chunk in windows.to(device).split(batch_size):
        prompts = _without_padding(chunk[:, : chunk.shape[1] // 2])
        yield EvaluatedBatch(prompts, _without_padding(chunk), _answers(loaded, adapter, prompts, NEW_TOKENS))


def _without_padding(input_ids: Tensor) -> Batch:
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _answers(loaded: LoadedModel, adapter: ModelAdapter, prompts: Batch, limit: int) -> Callable[[], list[str]]:
    return lambda: adapter.generate(loaded, prompts, limit)
