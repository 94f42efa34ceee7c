"""Evaluated rows as a model gets them, and which of their tokens the answers depend on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mqbench.harness import discover
from mqbench.harness.datasets.catalog import TASKS
from mqbench.harness.datasets.files import TaskData, load_task, reference_answer
from mqbench.harness.evaluated import EvaluatedBatch, benchmark_batches, window_batches
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.decoding import left_padded

MODELS = Path(__file__).parents[1] / "harness" / "models"


def batch_of(prompts: list[list[int]], answers: list[list[int]]) -> EvaluatedBatch:
    forced = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return EvaluatedBatch(left_padded(prompts, 0), left_padded(forced, 0), list)


def test_answers_depend_on_the_prompts_last_token_and_their_own() -> None:
    """Rows of different lengths, the longest prompt not the one with the longest answer, and an empty answer."""
    batch = batch_of([[5, 5, 5, 5, 5], [6, 6], [7, 7, 7]], [[1], [2, 2, 2], []])
    expected = [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    assert torch.equal(batch.predicts_answer, torch.tensor(expected).bool())


def loaded_model(name: str, folder: str) -> tuple[LoadedModel, Any]:
    adapter = discover.find_model(name)
    return adapter.load(MODELS / folder / "weights" / name, "cpu", torch.float32), adapter


def plain_messages(task: Any, data: TaskData, family: str) -> list[Message]:
    """Images and question, without a benchmark's instructions."""
    return [
        [*({"type": "image", "value": path} for path in row["images"]), {"type": "text", "value": row["question"]}]
        for row in data.rows()
    ]


def two_batches(messages: list[Message], batch_size: int) -> list[list[int]]:
    return [list(range(batch_size)), list(range(batch_size, len(messages)))]


@pytest.mark.parametrize("name", ["textvqa", "ocrbench"])
def test_tokens_predicted_there_spell_the_right_answers(name: str) -> None:
    loaded, adapter = loaded_model("standin-qwen2-vl", "standin")
    task = TASKS[name]
    data = load_task(task, None, 5)
    evaluate = SimpleNamespace(build_messages=plain_messages, make_batches=two_batches)
    spelled = [
        loaded.processor.tokenizer.decode(row[1:][wanted[:-1]])
        for batch in benchmark_batches(loaded, adapter, [data], 3, evaluate)
        for row, wanted in zip(batch.forced["input_ids"], batch.predicts_answer, strict=True)
    ]
    assert spelled == [reference_answer(task, row) for row in data.rows()]


def test_second_halves_are_the_answers_of_windows() -> None:
    loaded, adapter = loaded_model("standin-llama", "standin_text")
    windows: Tensor = torch.arange(3, 27).view(3, 8)
    first, second = window_batches(loaded, adapter, windows, 2)
    assert torch.equal(torch.cat([first.forced["input_ids"], second.forced["input_ids"]]), windows)
    assert torch.equal(first.prompts["input_ids"], windows[:2, :4])
    assert torch.equal(second.predicts_answer, torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]).bool())
    assert len(first.answers()) == 2
