"""``mqbench table`` and ``mqbench paper check`` as commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.records import make_cell, make_record
from mqbench.harness.cli import main
from mqbench.harness.store import RecordStore
from mqbench.harness.table_commands import render_all
from mqbench.harness.table_spec import spec_numbers

RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    store = RecordStore(tmp_path / "records")
    store.prepare()
    for method in ("none", "mquant"):
        store.append(make_record(make_cell("mme", method, "w4a8/w4a8"), 1234.0))
    return store.folder


def test_all_tables_go_beside_the_records(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "all", f"--out={out}"]) == 0
    files = {path.name: path.read_text(encoding="utf-8") for path in (out.parent / "rendered").iterdir()}
    assert capsys.readouterr().out == f"{len(files)} files: {out.parent / 'rendered'}\n"
    assert files == render_all(RecordStore(out).load())
    expected = {f"table{number:02d}.{style}" for number in spec_numbers() for style in ("md", "tex", "csv")}
    assert set(files) == expected | {"paper_check.md", "paper_check.csv"}
    assert "1234" in files["table07.md"]
    assert "Nothing was measured" in files["table16.md"]


def test_all_tables_go_where_render_says(out: Path, tmp_path: Path) -> None:
    assert main(["table", "all", f"--out={out}", f"--render={tmp_path / 'here' / 'tables'}"]) == 0
    assert (tmp_path / "here" / "tables" / "table03.tex").is_file()


def test_filters_reach_every_table(out: Path) -> None:
    assert "1234" not in render_all(RecordStore(out).load(), ["task=textvqa"])["table07.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "three"], "'three' is no table; give a number or 'all'; known: 1, 2, 3"),
        (["table", "all", "--where=limit"], "NAME=VALUE"),
        (["paper", "check", "--format=html"], "unknown format 'html'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_paper_check_lists_what_does_not_follow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "check"]) == 0
    short = capsys.readouterr().out
    assert main(["paper", "check", "--all", "--format=csv"]) == 0
    everything = capsys.readouterr().out
    assert "20.24" in short and "do not follow" in short
    assert len(everything.splitlines()) > 2 * short.count("\n")


def test_the_page_on_backends_shows_the_committed_records(capsys: pytest.CaptureFixture[str]) -> None:
    page = (RESULTS / "backend.md").read_text(encoding="utf-8")
    for number, folder in ((20, "records"), (3, "backend")):
        assert main(["table", str(number), "--format=md", f"--out={RESULTS / folder}"]) == 0
        assert capsys.readouterr().out.strip() in page


def test_what_the_page_on_backends_says_about_both_dtypes() -> None:
    """All rows; in float64 every token and answer equal, in float32 within a point of what other sums do."""
    records = [record for record in RecordStore(RESULTS / "records").load() if record.cell.task == "backend_agreement"]
    assert {(record.cell.model, record.cell.dtype) for record in records} == {
        (model, dtype) for model in ("standin-qwen2-vl", "standin-llama") for dtype in ("float32", "float64")
    }
    for record in records:
        metrics = record.metrics
        assert record.cell.limit is None and not record.environment["simulated_layers"]
        if record.cell.dtype == "float64":
            assert metrics["agreement_percent"] == metrics["same_answers_percent"] == 100
            assert metrics["max_logit_difference"] < 1e-9
        else:
            assert abs(metrics["agreement_percent"] - metrics["float64_sums_agreement_percent"]) < 1
            assert abs(metrics["answer_tokens_percent"] - metrics["float64_sums_answer_tokens_percent"]) < 1
