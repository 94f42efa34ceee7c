"""``mqbench models check``: what it proves, what it prints when a layout lies; bare ``mqbench models`` still lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes.plugin import make_workplace
from mqbench.harness import blueprint_records, cli, discover
from mqbench.harness.discover import Registry
from mqbench.harness.errors import PluginError
from mqbench.harness.models import llama
from mqbench.harness.models.check_command import proofs_of
from mqbench.harness.models.family import Family

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mqbench(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(autouse=True)
def two_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proofs of all methods are for test_families.py."""
    found = {name: discover.find_method(name) for name in ("rtn", "mquant")}
    monkeypatch.setattr(discover, "all_methods", lambda: Registry(found))


def register(monkeypatch: pytest.MonkeyPatch, *families: Family, broken: tuple[PluginError, ...] = ()) -> None:
    registry = Registry({family.name: family for family in families}, broken)
    monkeypatch.setattr(discover, "all_families", lambda: registry)


def rows(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_a_model_that_is_right(mqbench: Run) -> None:
    code, out, err = mqbench("models", "check", "llama-2-13b")
    assert (code, err) == (0, "")
    assert rows(out) == [
        ["llama-2-13b", "names", "1 of 1", "14 linears to quantize, 1 exceptions"],
        ["llama-2-13b", "shapes", "1 of 1", "13.02 billion parameters"],
        ["llama-2-13b", "exact", "5 of 5", "rtn, mquant"],
        ["llama-2-13b", "runs", "6 of 6", "rtn, mquant"],
    ]
    assert out.endswith("all 13 proofs hold\n")


def test_every_proof_on_a_line(mqbench: Run) -> None:
    code, out, _ = mqbench("models", "check", "llama", "--every")
    names = [row[1] for row in rows(out)]
    assert code == 0
    assert names[:4] == ["names", "shapes llama-2-7b", "shapes llama-2-13b", "shapes llama-2-70b"]
    assert {"exact mquant rotation=false", "runs rtn w4a8/w4a8"} <= set(names)
    assert {row[2] for row in rows(out)} == {"yes"}


def test_a_model_with_files_has_them_checked(mqbench: Run, tmp_path: Path) -> None:
    names = [proof.name for proof in proofs_of("standin-llama", None)]
    assert names[-1] == "files standin-llama"
    assert not any(name.startswith("shapes") for name in names)

    (tmp_path / "llama-2-7b").mkdir()
    (tmp_path / "llama-2-7b" / "config.json").write_text("{}x")
    option, check = f"--models-dir={tmp_path}", ("check", "llama-2-7b")
    for arguments in ((*check, option), (option, *check)):
        code, out, _ = mqbench("models", *arguments)
        assert code == 1
        (row,) = [row for row in rows(out) if row[1] == "files llama-2-7b"]
        assert row[2] == "NO"
        assert "config.json" in row[3]


def test_a_layout_that_lies_is_named(mqbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model: Any) -> Any:
        return replace(llama.llama_layout(model), unquantized=())

    register(monkeypatch, replace(llama.FAMILY, layout=forgetful, configs={}))
    code, out, _ = mqbench("models", "check", "all")
    assert code == 1
    (names, wrong, *_) = rows(out)
    assert names == ["llama", "names", "0 of 1", ""]
    assert wrong[2] == "NO"
    assert wrong[3].startswith("'lm_head' is neither quantized nor listed as unquantized by family 'llama'")
    assert out.endswith("12 of 12 proofs fail\n")


def test_a_family_that_crashes_is_told_and_the_rest_goes_on(mqbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(model: Any, generator: Any) -> Any:
        raise KeyError("pixels")

    register(monkeypatch, replace(llama.FAMILY, tiny_inputs=crash, configs={}))
    code, out, _ = mqbench("models", "check", "llama")
    assert code == 1
    assert rows(out)[0][1:3] == ["names", "1 of 1"]
    assert ["exact rtn", "NO", "KeyError: 'pixels'"] in [row[1:] for row in rows(out)]


def test_broken_plugins_fail_all(mqbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, replace(llama.FAMILY, configs={}), broken=(PluginError("plug-in 'x' cannot be loaded"),))
    code, _, err = mqbench("models", "check", "all")
    assert code == 1
    assert err == "warning: plug-in 'x' cannot be loaded\n"


def test_unknown_names(mqbench: Run) -> None:
    code, _, err = mqbench("models", "check", "qwen2-vl-7bb")
    assert code == 2
    assert err == "error: unknown model 'qwen2-vl-7bb'; did you mean 'qwen2-vl-7b'?\n"


def test_a_model_without_a_family(mqbench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_workplace(tmp_path, monkeypatch)
    code, _, err = mqbench("models", "check", "fake-model")
    assert code == 2
    assert "no family of group 'mqbench.families' lists model 'fake-model'" in err


def test_every_registered_model_has_a_family() -> None:
    for name in discover.all_models().found:
        assert discover.family_of(name).name


def test_bare_models_still_lists(mqbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = mqbench("models")
    assert code == 0
    assert "llava-1.5-13b" in out
    monkeypatch.setattr(blueprint_records, "list_sizes", lambda: print("sizes"))
    assert mqbench("models", "--size")[:2] == (0, "sizes\n")
