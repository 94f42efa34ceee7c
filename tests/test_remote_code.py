"""Code from a model's own files runs only for models that say they need it, and only when the user said so."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes import plugin
from fakes.plugin import FakeAdapter, Workplace, make_workplace
from mqbench.harness import cli, commands, export
from mqbench.harness.execute import Executor
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.plan import Plan
from mqbench.harness.run import Outcome


class RemoteAdapter(FakeAdapter):
    needs_remote_code = "tokenizer"
    trusted: list[Any]

    def load(self, path: Path, device: str, dtype: torch.dtype, trust_remote_code: bool | None = None) -> LoadedModel:
        self.trusted.append(trust_remote_code)
        return super().load(path, device, dtype)


def run_here(plan: Plan, view: Any) -> Outcome:
    executor = Executor(plan.request, "cpu", lambda message: None, "fakes.plugin")
    for group in plan.groups:
        executor.run_group(group)
    return Outcome(())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.setattr(commands, "run_plan", run_here)
    monkeypatch.setattr(export, "Executor", partial(Executor, evaluator="fakes.plugin"))
    place = make_workplace(tmp_path, monkeypatch)
    adapter = RemoteAdapter("fake-model")
    adapter.trusted = []
    monkeypatch.setattr(plugin, "ADAPTERS", [adapter])
    return place


def arguments(command: str, place: Workplace) -> list[str]:
    if command == "eval":
        return ["eval", *place.arguments]
    if command == "run":
        plan = place.root / "plan.toml"
        lines = [
            'models = ["fake-model"]',
            'methods = ["good"]',
            'bits = ["w4a8"]',
            'tasks = ["textvqa"]',
            "calib_samples = 4",
        ]
        plan.write_text("\n".join(["[[run]]", *lines]))
        folders = [f"--out={place.out}", f"--data-dir={place.data}", f"--models-dir={place.models}"]
        return ["run", f"--plan={plan}", *folders]
    folders = [f"--out={place.root / 'new'}", f"--data-dir={place.data}", f"--models-dir={place.models}"]
    return ["quantize", "--model=fake-model", "--method=good", "--bits=w4a8", "--calib-samples=4", *folders]


@pytest.mark.parametrize("command", ["eval", "quantize", "run"])
def test_without_the_option_one_line_says_so_before_anything_runs(
    place: Workplace, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(command, place)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the tokenizer of 'fake-model' is Python code")
    assert "--trust-remote-code" in line
    assert plugin.ADAPTERS[0].trusted == []


@pytest.mark.parametrize("command", ["eval", "quantize", "run"])
def test_the_option_reaches_the_adapter(place: Workplace, command: str) -> None:
    cli.main([*arguments(command, place), "--trust-remote-code"])
    assert set(plugin.ADAPTERS[0].trusted) == {True}


def test_all_leaves_it_out_and_says_why(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in arguments("eval", place) if not word.startswith("--models=")]
    assert cli.main([*words, "--models=all", "--dry-run"]) in (0, 2)
    assert "the tokenizer of 'fake-model' is Python code" in capsys.readouterr().err


def test_other_models_are_never_told(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """``FakeAdapter.load`` takes no such argument."""
    monkeypatch.setattr(plugin, "ADAPTERS", [FakeAdapter("fake-model")])
    assert cli.main([*arguments("quantize", place), "--trust-remote-code"]) == 0
