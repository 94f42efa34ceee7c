"""A third-party package in miniature: one model, two methods, their data and an evaluator that needs no vlmeval.

It is found through real entry points (``install`` writes its metadata), so worker processes find it too. A control
folder, named by an environment variable, makes it misbehave and keeps a log of what it did.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mqbench.harness.errors import MissingWeightsError
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.quant.layout import Layout, Norm, NormKind, Part, Tower
from mqbench.harness.quant.linear import wrap_linears
from mqbench.harness.quant.session import LayerReport, QuantReport

CONTROL = "FAKE_PLUGIN_CONTROL"
ENTRY_POINTS = """
[mqbench.models]
fake = fakes.plugin:ADAPTERS

[mqbench.methods]
good = fakes.plugin:GOOD
bad = fakes.plugin:BAD
broken = fakes.absent:METHOD
"""
LAYOUT = Layout(
    family="fake",
    text=Tower(Part.TEXT, 4, NormKind.RMSNORM, (), (), Norm("norm", ())),
    vision=None,
    patch_embed=None,
    projector=("linear",),
    unquantized=(),
    image_token_id=None,
    vision_root=None,
    text_root="",
)


class FakeModel(nn.Module):
    """Answers right with a share of its rows; quantizing lowers the share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.method = "none"

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(x))


class FakeAdapter:
    paper_name = None
    how_to_get = "put a folder fake-model into --models-dir"

    def __init__(self, name: str) -> None:
        self.name = name

    def find_weights(self, models_dir: Path | None) -> Path | None:
        folder = None if models_dir is None else models_dir / self.name
        return folder if folder is not None and folder.is_dir() else None

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        if control("refuse-load").exists():
            raise MissingWeightsError("the file is gone; get it again")
        torch.manual_seed(0)
        return LoadedModel(self.name, FakeModel().to(dtype), None, LAYOUT)

    def encode(self, loaded: LoadedModel, messages: Sequence[Any], answers: Sequence[str] | None = None) -> Any:
        return {"messages": list(messages), "answers": answers}

    def generate(self, loaded: LoadedModel, batch: Any, max_new_tokens: int) -> list[str]:
        if control(f"nan-{loaded.model.method}").exists():
            loaded.model.linear.weight.data.fill_(float("nan"))
        loaded.model(torch.zeros(1, 4))
        wrong = {"none": 0, "good": 1, "bad": 3}[loaded.model.method]
        return ["wrong" if int(message.rsplit(" ", 1)[1]) < wrong else "right" for message in batch["messages"]]


@dataclass(frozen=True)
class FakeMethod:
    name: str
    aliases: tuple[str, ...]
    summary: str = "for tests"
    version: str = "3"

    def quantize(self, model: Any, layout: Layout, recipe: Any, batches: Sequence[Any]) -> QuantReport:
        log(f"quantize {self.name} {recipe.bits} {sum(len(batch['answers']) for batch in batches)}")
        if control(f"refuse-{self.name}").exists():
            raise ValueError("cannot\nquantize this")
        linears = wrap_linears(model, list(layout.quantized_linears()))
        model.method = self.name
        return QuantReport({name: LayerReport(name, layout.quantized_linears()[name]) for name in linears})

    def restore(self, model: Any, layout: Layout, recipe: Any, context: Any) -> None:
        model.method = recipe.method


ADAPTERS = [FakeAdapter("fake-model"), FakeAdapter("absent-model")]
GOOD = FakeMethod("good", ("g",))
BAD = FakeMethod("bad", ())


# --- the evaluator ---------------------------------------------------------------------------------------------------


def make_batches(messages: Sequence[Any], batch_size: int) -> list[list[int]]:
    rows = list(range(len(messages)))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def calibration_prompts(calibration: Any, family: str) -> list[tuple[str, str]]:
    return [(row["question"], "right") for part in calibration.parts for row in part.rows()]


def evaluate_task(
    loaded: LoadedModel,
    adapter: Any,
    task: Any,
    data: Any,
    batch_size: int,
    on_progress: Any,
    done: Mapping[str, str],
    share: Any,
) -> dict[str, str]:
    messages = [row["question"] for row in data.rows()]
    answers = {index: done[index] for index in data.indices if index in done}
    for batch in share(make_batches(messages, batch_size)):
        if all(data.indices[row] in answers for row in batch):
            continue
        where = f"{loaded.model.method}-{task.name}"
        log(f"rows {where} {','.join(data.indices[row] for row in batch)}")
        if 0 in batch and control(f"fail-{where}").exists():
            raise ValueError("no such\nluck")
        if 0 not in batch:
            kill_if_asked(where)
        if control("slow").exists():
            time.sleep(0.2)
        texts = adapter.generate(loaded, adapter.encode(loaded, [messages[row] for row in batch]), 8)
        new = {data.indices[row]: text for row, text in zip(batch, texts, strict=True)}
        answers |= new
        on_progress(new)
    return {index: answers[index] for index in data.indices if index in answers}


def prompts_sha256(task: Any, data: Any, family: str) -> str:
    return "e" * 64


def score(task: Any, data: Any, predictions: Mapping[str, str], work_dir: Path) -> SimpleNamespace:
    hits = {index: float(text == "right") for index, text in predictions.items()}
    total = 100 * sum(hits.values()) / len(hits)
    return SimpleNamespace(score=total, metrics={"Overall": total}, hits=hits)


def kill_if_asked(where: str) -> None:
    """Dies as often as the control file says, like a process that the system kills for its memory."""
    file = control(f"kill-{where}")
    times = int(file.read_text()) if file.exists() else 0
    if times:
        file.write_text(str(times - 1))
        os.kill(os.getpid(), signal.SIGKILL)


def control(name: str) -> Path:
    return Path(os.environ[CONTROL]) / name


def log(line: str) -> None:
    with control("log").open("a") as stream:
        stream.write(line + "\n")


def logged(prefix: str = "") -> list[str]:
    """Lines of the log that start so; empties the log."""
    path = control("log")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line for line in lines if line.startswith(prefix)]


# --- installing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workplace:
    """Folders of a test: the plug-in is installed, has weights and data, and obeys ``control``."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "runs"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def arguments(self) -> list[str]:
        """Options of ``mqbench eval`` that keep it inside this workplace."""
        return [
            "--models=fake-model", "--methods=good,bad", "--bits=w4a8", "--tasks=textvqa,docvqa", "--calib-samples=4",
            f"--out={self.out}", f"--data-dir={self.data}", f"--models-dir={self.models}", "--batch-size=2", "--jobs=1",
        ]  # fmt: skip


def make_workplace(root: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    metadata = root / "site" / "fakeplugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fakeplugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(root / "site")
    (root / "control").mkdir()
    monkeypatch.setenv(CONTROL, str(root / "control"))
    place = Workplace(root)
    (place.models / "fake-model").mkdir(parents=True)
    save_file({"linear.weight": torch.eye(4)}, place.models / "fake-model" / "model.safetensors")
    for folder, word in ((place.data, "evaluated"), (place.data / "calibration", "calibrated")):
        folder.mkdir()
        for name in ("TextVQA_VAL", "DocVQA_VAL"):
            write_tsv(folder / f"{name}.tsv", [f"{word} {name} {number}" for number in range(4)])
    return place


def write_tsv(path: Path, questions: Sequence[str]) -> None:
    answers = str(["right"] * 10)
    rows = [f"{number + 1}\t[]\t{question}\t{answers}" for number, question in enumerate(questions)]
    path.write_text("\n".join(["index\timage_path\tquestion\tanswer", *rows]) + "\n")
