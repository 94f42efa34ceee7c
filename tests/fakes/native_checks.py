"""What every adapter of a native family must do, whatever the family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqbench.harness.errors import MissingWeightsError, MQBenchError, NonFiniteError
from mqbench.harness.models.adapter import LoadedModel, Message


def message(*parts: str) -> Message:
    return [{"type": "image" if part.endswith(".png") else "text", "value": part} for part in parts]


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_family(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"model_type": "', '"model_type": "not_'))


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def drop_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], type[MQBenchError], str]] = {
    "no config": (remove("config.json"), MissingWeightsError, r"lacks config\.json"),
    "no tokenizer": (remove("tokenizer.json"), MissingWeightsError, r"lacks tokenizer\.json"),
    "no weights": (remove("model.safetensors"), MissingWeightsError, r"lacks model\.safetensors"),
    "half a file": (truncate, MissingWeightsError, "cannot be loaded"),
    "another family": (other_family, MissingWeightsError, "holds a model of type 'not_"),
    "config is no JSON": (no_json, MissingWeightsError, "names no model type"),
    "a weight is missing": (drop_weight, MissingWeightsError, r"layers\.1\.mlp\.down_proj\.weight"),
    "a weight is NaN": (poison, NonFiniteError, r"layers\.1\.mlp\.down_proj\.weight"),
}


def check_damage(adapter: Any, folder: Path, copy: Path, damage: str) -> None:
    """A damaged folder gives one line that names what is wrong."""
    harm, error, pattern = DAMAGES[damage]
    harm(Path(shutil.copytree(folder, copy)))
    with pytest.raises(error, match=pattern) as caught:
        adapter.load(copy, "cpu", torch.float32)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def check_batch(adapter: Any, loaded: LoadedModel, messages: list[Message]) -> None:
    """Rows of a batch are padded on the left, and give the logits that they give alone."""
    batch = adapter.encode(loaded, messages)
    logits = loaded.model(**batch).logits
    for row, single in enumerate(messages):
        alone = adapter.encode(loaded, [single])
        mask = batch["attention_mask"][row].bool()
        assert mask.tolist() == sorted(mask.tolist())
        assert torch.equal(batch["input_ids"][row][mask], alone["input_ids"][0])
        torch.testing.assert_close(logits[row, -1], loaded.model(**alone).logits[0, -1], rtol=0, atol=1e-4)


def check_answers(adapter: Any, loaded: LoadedModel, messages: list[Message]) -> None:
    """Answers' tokens follow the prompts."""
    answers = ["yes", "", "B. two"][: len(messages)]
    prompts, whole = adapter.encode(loaded, messages), adapter.encode(loaded, messages, answers)
    for row, answer in enumerate(answers):
        prompt, both = (part["input_ids"][row][part["attention_mask"][row].bool()] for part in (prompts, whole))
        assert torch.equal(both[: len(prompt)], prompt)
        assert loaded.processor.tokenizer.decode(both[len(prompt) :]) == answer


@torch.no_grad()
def check_greedy(adapter: Any, loaded: LoadedModel, messages: list[Message], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are argmaxes of whole forward passes, however the checkpoint wants to sample."""
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0}.items():
        monkeypatch.setattr(loaded.model.generation_config, name, value)
    answers = adapter.generate(loaded, adapter.encode(loaded, messages), 4)
    for answer, single in zip(answers, messages, strict=True):
        assert answer == _greedy(loaded, dict(adapter.encode(loaded, [single])), 4)


def _greedy(loaded: LoadedModel, batch: dict[str, torch.Tensor], max_new_tokens: int) -> str:
    new: list[int] = []
    for _ in range(max_new_tokens):
        token = loaded.model(**batch).logits[0, -1].argmax()
        if token == loaded.model.generation_config.eos_token_id:
            break
        new.append(int(token))
        for name, value in {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0}.items():
            if name in batch:
                batch[name] = torch.cat([batch[name], torch.full_like(batch[name][:, :1], int(value))], dim=1)
    text = loaded.processor.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()
