"""Answers of a model to a benchmark, between VLMEvalKit's prompts and VLMEvalKit's scores (``vlmeval_kit``).

The loop that generates answers is ours, since VLMEvalKit's runs one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image

from mqbench.harness.datasets.catalog import Task
from mqbench.harness.datasets.files import TaskData
from mqbench.harness.models.adapter import LoadedModel, Message, ModelAdapter
from mqbench.harness.vlmeval_kit.prompts import build_messages, calibration_prompts, prompts_sha256
from mqbench.harness.vlmeval_kit.scores import score

__all__ = ["build_messages", "calibration_prompts", "evaluate_task", "make_batches", "prompts_sha256", "score"]

PIXELS_PER_TOKEN = 28 * 28
CHARACTERS_PER_TOKEN = 4

Share = Callable[[list[list[int]]], list[list[int]]]
"""Chooses some of all batches."""

OnProgress = Callable[[Mapping[str, str]], None]
"""Called after every batch with its new predictions by row index."""


def evaluate_task(
    loaded: LoadedModel,
    adapter: ModelAdapter,
    task: Task,
    data: TaskData,
    batch_size: int,
    on_progress: OnProgress | None = None,
    done: Mapping[str, str] | None = None,
    share: Share = list,
) -> dict[str, str]:
    """Greedy answers of a model to every row.

    Batches depend on the rows and ``batch_size`` alone, never on ``done``: a batch that was not finished before a crash
    is run again as a whole, so that an interrupted run gives the same answers as an uninterrupted one.

    Args:
        loaded: The model.
        adapter: Its family's way to encode and generate.
        task: The benchmark.
        data: Its rows.
        batch_size: Prompts per forward pass.
        on_progress: Told about every finished batch.
        done: Predictions of an earlier run with the same settings, by row index.
        share: Of all batches, those to run here.

    Returns:
        Row index -> answer, in the order of the rows; rows of batches that run elsewhere are left out.
    """
    messages = build_messages(task, data, loaded.layout.family)
    indices = data.indices
    kept = done or {}
    predictions = {index: kept[index] for index in indices if index in kept}
    limit = min(task.max_new_tokens, getattr(adapter, "max_new_tokens", None) or task.max_new_tokens)
    for batch in share(make_batches(messages, batch_size)):
        if all(indices[row] in predictions for row in batch):
            continue
        with torch.no_grad():
            encoded = adapter.encode(loaded, [messages[row] for row in batch])
            answers = adapter.generate(loaded, encoded, limit)
        new = {indices[row]: answer for row, answer in zip(batch, answers, strict=True)}
        predictions |= new
        if on_progress is not None:
            on_progress(new)
    return {index: predictions[index] for index in indices if index in predictions}


def make_batches(messages: Sequence[Message], batch_size: int) -> list[list[int]]:
    """Positions of prompts in batches of similar length, longest first; the same for the same prompts.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(messages)), key=lambda row: (-_num_tokens_estimate(messages[row]), row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _num_tokens_estimate(message: Message) -> int:
    total = 0
    for item in message:
        if item["type"] == "image":
            with Image.open(item["value"]) as image:
                total += image.width * image.height // PIXELS_PER_TOKEN
        else:
            total += len(item["value"]) // CHARACTERS_PER_TOKEN
    return total
