"""The gate's table (golden file), JSON, JUnit XML, and the command with its exit codes.

After an intended change of the table: ``MQBENCH_UPDATE_GOLDEN=1 pytest tests/test_gate_report.py``, then read the diff.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fakes.gate import record, windows, write_folder
from fakes.records import CALIBRATION, failed_record, make_cell
from mqbench.harness import cli
from mqbench.harness.environment import ROOT
from mqbench.harness.gate import compare
from mqbench.harness.gate_report import name, render, summary, to_json, to_junit
from mqbench.harness.gate_verdict import Check, GateOptions, Kind, Outcome, Report, Verdict
from mqbench.harness.record import Backend, Record

GOLDEN = Path(__file__).parent / "golden" / "gate.txt"
RECORDS = ROOT / "results" / "records"
Run = Callable[..., tuple[int, str, str]]


def timed(latency_ms: float) -> Record:
    metrics = {"latency_ms": latency_ms, "peak_memory_bytes": 2**30}
    return record("ocrbench", 300, "quarot", backend=Backend.REAL, metrics=metrics)


def sizes(num_right: int) -> list[Record]:
    """The same cell with two calibration sizes."""
    cell = make_cell("docvqa", "rtn", calibration=replace(CALIBRATION, num_samples=128))
    return [record("docvqa", num_right, "rtn"), replace(record("docvqa", num_right), cell=cell)]


def every_case() -> Report:
    """Each verdict and each kind of check."""
    nats = np.linspace(2.0, 4.0, 60)
    floats = [record("textvqa", 340, "none"), record("mme", 390, "none"), record("docvqa", 345, "none")]
    baseline = [*floats, record("textvqa", 320), record("mme", 380), timed(10.0), windows(list(nats)), *sizes(200)]
    baseline += [record("scienceqa", model="qwen2-vl-7b"), record("mme", model="qwen2-vl-7b")]
    candidate = [*floats, record("textvqa", 290, method_version="2"), record("mme", 378), timed(12.0)]
    candidate += [windows(list(nats + 0.001 * np.sin(nats))), *sizes(200), record("docvqa", 333)]
    candidate += [failed_record(make_cell("mme", model="qwen2-vl-7b"), "ValueError: \x1b[31m<broken>\x00")]
    return compare(baseline, candidate, GateOptions(min_recovery=97, num_resamples=1000))


def test_golden() -> None:
    text = render(every_case(), width=190)
    if os.environ.get("MQBENCH_UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_every_verdict_and_kind_is_in_the_golden_file() -> None:
    report = every_case()
    assert {check.verdict for check in report.checks} == set(Verdict)
    assert {check.kind for check in report.checks} == set(Kind)
    assert len({name(check) for check in report.checks}) == len(report.checks)


def test_color_is_for_terminals_only() -> None:
    assert "\x1b[" not in render(every_case(), width=190)
    assert "\x1b[1;31mfail" in render(every_case(), width=190, color=True)


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    lines = render(every_case(), width=100).splitlines()
    assert all(len(line) <= 100 for line in lines if line[0] in "│┃┏┡└")
    assert "…" not in "\n".join(lines)


def test_the_summary_counts() -> None:
    assert summary(compare([record()], [record()])) == "gate: pass (1 pass; confidence 0.95 of each bound)"
    assert summary(compare([record()], [record(num_right=200)])).startswith("gate: FAIL (1 fail;")


def test_json_is_complete() -> None:
    report = every_case()
    data = json.loads(to_json(report))
    assert set(data) == {"version", "ok", "counts", "options", "confidence_per_check", "checks", "notes"}
    assert data["ok"] is report.ok is False
    assert sum(data["counts"].values()) == len(data["checks"]) == len(report.checks)
    assert set(data["options"]) == {item.name for item in fields(GateOptions)}
    for found, check in zip(data["checks"], report.checks, strict=True):
        assert found == {item.name: _plain(getattr(check, item.name)) for item in fields(Check)}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_junit_is_valid() -> None:
    report = every_case()
    root = ElementTree.fromstring(to_junit(report).encode())
    cases = list(root.iter("testcase"))
    assert root.tag == "testsuites" and {suite.tag for suite in root} == {"testsuite"}
    assert [suite.get("name") for suite in root] == ["standin-qwen2-vl", "qwen2-vl-7b"]
    assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases) == len(report.checks)
    for element in (root, *root):
        count = {tag: str(len(list(element.iter(tag)))) for tag in ("testcase", "failure", "skipped")}
        assert (element.get("tests"), element.get("failures")) == (count["testcase"], count["failure"])
        assert (element.get("skipped"), element.get("errors")) == (count["skipped"], "0")
    assert len(list(root.iter("failure"))) == sum(check.fails for check in report.checks)
    messages = [failure.get("message") or "" for failure in root.iter("failure")]
    assert any("ValueError: \ufffd[31m<broken>\ufffd" in message for message in messages)
    assert any(message.startswith("fail: loss +7.50 pt [") for message in messages)
    skipped = [item.get("message") or "" for item in root.iter("skipped")]
    assert {message.partition(":")[0] for message in skipped} == {"undecided", "new"}


def test_undecided_is_a_failure_in_junit_when_it_fails() -> None:
    report = compare([record()], [record(num_right=317)], GateOptions(undecided=Outcome.FAIL))
    (failure,) = ElementTree.fromstring(to_junit(report).encode()).iter("failure")
    assert failure.get("type") == "undecided"


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mqbench(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; gives exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, ...]:
    baseline = write_folder(tmp_path / "baseline", [record("textvqa"), record("mme", 360)])
    write_folder(tmp_path / "worse", [record("textvqa", 280), record("mme", 360)])
    return "gate", "--resamples", "1000", "--baseline", str(baseline), "--candidate"


def test_exit_code_0(mqbench: Run, folders: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = mqbench(*folders, str(tmp_path / "baseline"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "gate: pass (2 pass; confidence 0.95 of each bound)"


def test_exit_code_1_and_files(mqbench: Run, folders: tuple[str, ...], tmp_path: Path) -> None:
    files = ("--json", str(tmp_path / "new" / "gate.json"), "--junit", str(tmp_path / "gate.xml"))
    code, out, _ = mqbench(*folders, str(tmp_path / "worse"), *files)
    assert code == 1
    assert out.splitlines()[-1] == "gate: FAIL (1 pass, 1 fail; confidence 0.95 of each bound)"
    assert json.loads((tmp_path / "new" / "gate.json").read_text())["ok"] is False
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "1"


def test_json_on_stdout_leaves_the_table_to_stderr(mqbench: Run, folders: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = mqbench(*folders, str(tmp_path / "worse"), "--json", "-")
    assert code == 1
    assert json.loads(out)["counts"] == {"pass": 1, "fail": 1, "undecided": 0, "missing": 0, "new": 0}
    assert "gate: FAIL" in err


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--max-drop", "20"], 0),
        (["--where", "task=mme"], 0),
        (["--max-latency-ratio", "0", "--max-memory-ratio", "0"], 1),
        (["--where", 'task=["mme","textvqa"]'], 1),
        (["--where", "task=mme", "--min-recovery", "97"], 1),
        (["--where", "task=mme", "--min-recovery", "97", "--missing", "pass"], 0),
    ],
)
def test_options(mqbench: Run, folders: tuple[str, ...], tmp_path: Path, options: list[str], code: int) -> None:
    assert mqbench(*folders, str(tmp_path / "worse"), *options)[0] == code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "task=docvqa"], "no record that passes the filters"),
        (["--where", "taks=mme"], "unknown setting for --where 'taks'; did you mean 'task'?"),
        (["--max-drop", "-1"], "--max-drop must be 0 or more"),
        (["--allow", "weights"], "unknown setting for --allow 'weights'"),
        (["--candidate", "/nonexistent"], "no records.jsonl in '/nonexistent'"),
        (["--junit", "/proc/gate.xml"], "cannot write '/proc/gate.xml'"),
    ],
)
def test_exit_code_2(mqbench: Run, folders: tuple[str, ...], tmp_path: Path, options: list[str], message: str) -> None:
    code, _, err = mqbench(*folders, str(tmp_path / "worse"), *options)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_other_settings_are_exit_code_2(mqbench: Run, folders: tuple[str, ...], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", [record("textvqa", dtype="bfloat16")])
    code, out, err = mqbench(*folders, str(other))
    assert (code, out) == (2, "")
    assert "textvqa: records differ in dtype (baseline float32, candidate bfloat16)" in err


def test_help_imports_nothing_heavy(mqbench: Run) -> None:
    script = (
        "import sys\nfrom mqbench.harness.cli import main\nmain(['gate', '--help'])\n"
        "print([name for name in ('numpy', 'torch', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--max-drop" in done.stdout


# --- our own records and CI -------------------------------------------------------------------------------------------


def test_the_committed_records_pass_against_themselves(mqbench: Run) -> None:
    code, out, _ = mqbench("gate", "--baseline", str(RECORDS), "--candidate", str(RECORDS))
    assert code == 0
    assert " fail" not in out and "undecided" not in out


def test_the_workflow_runs_the_gate_on_what_it_evaluated() -> None:
    text = (ROOT / ".github" / "workflows" / "accuracy.yml").read_text(encoding="utf-8")
    assert "mqbench gate --baseline results/records --candidate" in text
    out = re.search(r"mqbench eval .*--out (\S+)", text)
    assert out is not None and f"--candidate {out[1]}" in text
    junit = re.search(r"mqbench gate .*--junit (\S+)", text)
    assert junit is not None and f"path: {junit[1]}" in text
    # Every download address is left to the tools' own settings.
    assert "://" not in text
