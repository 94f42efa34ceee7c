"""What ``mqbench methods`` prints about options."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

from mqbench.harness import discover
from mqbench.harness.cli import main


@pytest.mark.parametrize("name", sorted(point.name for point in entry_points(group="mqbench.methods")))
def test_every_option_of_a_method_has_a_row(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--options", name]) == 0
    rows = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    options = discover.find_method(name).options
    assert rows == [[option.name, option.default_text, option.values, option.help] for option in options]


def test_an_alias_will_do_and_a_typo_will_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--options", "sq"]) == 0
    assert "alpha" in capsys.readouterr().out
    assert main(["methods", "--options", "mquan"]) == 2
    assert "did you mean 'mquant'?" in capsys.readouterr().err


def test_a_foreign_method_that_declares_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(discover, "find_method", lambda name: SimpleNamespace(name=name))
    assert main(["methods", "--options", "theirs"]) == 0
    assert "'theirs' does not say which options it has" in capsys.readouterr().out
