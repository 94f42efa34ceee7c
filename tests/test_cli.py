"""The command line: instant help, one-line errors, exit codes, and the main commands end to end on a made-up model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fakes import plugin
from fakes.plugin import Workplace, make_workplace, write_tsv
from mqbench.harness import cli, commands, export
from mqbench.harness.execute import Advanced, Executor, Finished
from mqbench.harness.plan import Plan
from mqbench.harness.progress import duration_text
from mqbench.harness.run import Outcome, View
from mqbench.harness.store import RecordStore

Run = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "pandas", "transformers", "vlmeval", "matplotlib", "numpy")


def run_here(plan: Plan, view: View) -> Outcome:
    """Stands in for worker processes."""
    cells: list[Finished] = []

    def take(message: Advanced | Finished) -> None:
        if isinstance(message, Finished):
            cells.append(message)
            view.finish(message)
        else:
            view.advance(message.amount)

    executor = Executor(plan.request, "cpu", take, "fakes.plugin")
    for group in plan.groups:
        executor.run_group(group)
    return Outcome(tuple(cells))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.setattr(commands, "run_plan", run_here)
    monkeypatch.setattr(commands, "SHIPPED_RECORDS", tmp_path / "shipped")
    monkeypatch.setattr(export, "Executor", partial(Executor, evaluator="fakes.plugin"))
    return make_workplace(tmp_path, monkeypatch)


@pytest.fixture
def mqbench(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; gives exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_help_imports_nothing_heavy_and_is_fast() -> None:
    script = (
        "import sys\nfrom mqbench.harness.cli import main\ncode = main(['--help'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    # The target is 1 s; a busy machine gets a margin that importing torch would still break on an idle one.
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("command", ["eval", "table", "models", "methods", "tasks", "quantize"])
def test_every_command_has_help(mqbench: Run, command: str) -> None:
    code, out, err = mqbench(command, "--help")
    assert code == 0
    assert "Usage:" in out
    assert err == ""


def test_help_of_eval_shows_examples_line_by_line(mqbench: Run) -> None:
    _, out, _ = mqbench("eval", "--help")
    lines = [line.strip(" │") for line in out.splitlines()]
    assert "mqbench eval --methods mquant --bits w4a8 --limit 20" in lines


ERRORS = [
    (["--models=nobody"], "unknown model 'nobody'"),
    (["--models=absent-model"], "weights of 'absent-model' were not found"),
    (["--methods=godo"], "unknown method 'godo'; did you mean 'good'"),
    (["--methods=broken"], "cannot be loaded"),
    (["--methods=,"], "--methods names nothing"),
    (["--tasks=textvq"], "unknown task 'textvq'; did you mean 'textvqa'"),
    (["--bits=w2"], "unknown bit setting 'w2'"),
    (["--dtype=int4"], "unknown dtype"),
    (["--device=gpu"], "unknown device"),
    (["--limit=0"], "--limit must be at least 1"),
    (["--calib-samples=0"], "--calib-samples must be at least 1"),
    (["--calib-split=nowhere"], "unknown calibration split"),
    (["--data-dir=/nonexistent"], "no file for task 'textvqa'"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    place: Workplace, mqbench: Run, options: list[str], message: str
) -> None:
    code, out, err = mqbench("eval", *place.arguments, *options)
    assert (code, out) == (2, "")
    assert_one_line(err, message)
    assert not (place.root / "control" / "log").exists()


def assert_one_line(err: str, message: str) -> None:
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tquestion\n1\tx\n", "lacks column"),
        (
            "index\timage_path\tquestion\tanswer\n1\t[]\tx 1\t['a','a','a','a']\n1\t[]\tx 2\t['a','a','a','a']\n",
            "index '1'",
        ),
        ("index\timage_path\tquestion\tanswer\n1\tabsent.png\tx 1\t['a','a','a','a']\n", "absent.png"),
    ],
)
def test_unusable_data_is_an_early_error(place: Workplace, mqbench: Run, content: str, message: str) -> None:
    (place.data / "TextVQA_VAL.tsv").write_text(content)
    code, _, err = mqbench("eval", *place.arguments)
    assert code == 2
    assert_one_line(err, message)


def test_overlap_and_unwritable_folder_are_early_errors(place: Workplace, mqbench: Run) -> None:
    write_tsv(place.data / "calibration" / "TextVQA_VAL.tsv", [f"evaluated DocVQA_VAL {row}" for row in range(4)])
    code, _, err = mqbench("eval", *place.arguments)
    assert code == 2
    assert_one_line(err, "calibration samples too")
    place.out.rmdir()
    place.out.write_text("")
    code, _, err = mqbench("eval", *place.arguments)
    assert code == 2
    assert_one_line(err, "cannot write to output folder")


def test_eval_prints_the_table_and_where_the_records_are(place: Workplace, mqbench: Run) -> None:
    code, out, err = mqbench("eval", *place.arguments)
    assert code == 0
    assert "75.00 (-25.00)" in out
    assert "Table 3." in out
    assert str(RecordStore(place.out).path) in err
    assert "[6/6]" in err


def test_eval_table_holds_the_requested_cells_only(place: Workplace, mqbench: Run) -> None:
    mqbench("eval", *place.arguments, "--limit=2")
    code, out, _ = mqbench("eval", *place.arguments)
    assert code == 0
    assert "75.00" in out
    code, _, err = mqbench("table", "3", f"--out={place.out}")
    assert code == 2
    assert_one_line(err, "records differ in limit (2 | none)")
    code, out, _ = mqbench("table", "3", f"--out={place.out}", "--where=limit=2")
    assert code == 0
    assert "50.00 (-50.00)" in out


def test_failed_cells_give_exit_code_1_and_a_dash(place: Workplace, mqbench: Run) -> None:
    (place.root / "control" / "fail-good-textvqa").touch()
    code, out, err = mqbench("eval", *place.arguments)
    assert code == 1
    assert "1 cell(s) failed" in err
    assert "ValueError: no such luck" in err
    assert "Traceback" not in err
    (row,) = [line for line in out.splitlines() if "good" in line]
    assert row.split()[-7:] == ["-", "75.00", "(-25.00)", "-", "-", "-", "-"]


def test_dry_run_runs_nothing(place: Workplace, mqbench: Run) -> None:
    code, out, err = mqbench("eval", *place.arguments, "--dry-run")
    assert code == 0
    assert out.count("to run") == 6
    assert "6 cells: 0 done, 6 to run; 1 worker(s), no earlier run to estimate from" in err
    assert plugin.logged() == []
    code, out, _ = mqbench("eval", *place.arguments, "--dry-run", "--json")
    assert [entry["run"] for entry in json.loads(out)] == [True] * 6


def test_dry_run_knows_what_is_done_and_how_long_the_rest_takes(place: Workplace, mqbench: Run) -> None:
    mqbench("eval", *place.arguments, "--methods=good")
    _, out, err = mqbench("eval", *place.arguments, "--dry-run")
    assert (out.count("to run"), out.count("done")) == (2, 4)
    assert "about 1 s" in err


def test_json_gives_every_record(place: Workplace, mqbench: Run) -> None:
    code, out, _ = mqbench("eval", *place.arguments, "--json")
    records = json.loads(out)
    assert code == 0
    assert [record["score"] for record in records] == [100.0, 100.0, 75.0, 75.0, 25.0, 25.0]


def test_models_without_weights_are_listed(place: Workplace, mqbench: Run) -> None:
    _, out, _ = mqbench("models", f"--models-dir={place.models}")
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert "ready" in lines["fake-model"]
    assert "put a folder" in lines["absent-model"]
    assert "MODELS_DIR" in lines["qwen2-vl-7b"]


def test_methods_are_listed_with_aliases_and_broken_plugins(place: Workplace, mqbench: Run) -> None:
    code, out, err = mqbench("methods")
    assert code == 0
    assert "smoothquant" in out
    assert "sq" in out
    assert "fakeplugin" in err


def test_tasks_are_listed_with_what_to_do(place: Workplace, mqbench: Run) -> None:
    _, out, _ = mqbench("tasks", f"--data-dir={place.data}")
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert "ready" in lines["textvqa"]
    assert "put VLMEvalKit's MME.tsv" in lines["mme"]


@pytest.mark.parametrize("style", ["terminal", "md", "tex", "csv"])
def test_table_renders_from_records(place: Workplace, mqbench: Run, style: str) -> None:
    mqbench("eval", *place.arguments)
    plugin.logged()
    code, out, err = mqbench("table", "3", f"--format={style}", f"--out={place.out}")
    assert (code, err) == (0, "")
    assert "75.00" in out
    assert plugin.logged() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["99"], "table 99"), (["3", "--format=html"], "unknown format"), (["3"], "run 'mqbench eval' first")],
)
def test_table_errors_are_one_line(
    place: Workplace, mqbench: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(place.root)
    code, out, err = mqbench("table", *arguments)
    assert (code, out) == (2, "")
    assert_one_line(err, message)


def test_a_damaged_line_is_a_warning_not_an_error(place: Workplace, mqbench: Run) -> None:
    mqbench("eval", *place.arguments)
    with RecordStore(place.out).path.open("ab") as stream:
        stream.write(b'{"half')
    code, _, err = mqbench("table", "3", f"--out={place.out}")
    assert code == 0
    assert err.startswith("warning: ")
    assert "damaged-1" in err


def test_interrupting_says_how_to_go_on(place: Workplace, mqbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(plan: Plan, view: View) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_plan", interrupted)
    code, out, err = mqbench("eval", *place.arguments)
    assert (code, out) == (130, "")
    assert "the same command goes on" in err


def quantize(place: Workplace, mqbench: Run, folder: Path, *options: str) -> tuple[int, str, str]:
    common = ["quantize", "--model=fake-model", "--method=good", f"--models-dir={place.models}", f"--out={folder}"]
    return mqbench(*common, f"--data-dir={place.data}", "--calib-samples=4", *options)


def test_eval_takes_a_quantized_folder_and_its_baseline(place: Workplace, mqbench: Run) -> None:
    folder = place.root / "mine"
    code, out, _ = quantize(place, mqbench, folder)
    assert code == 0
    assert f"mqbench eval --models {folder}" in out
    plugin.logged()
    code, out, _ = mqbench("eval", *place.arguments, f"--models={folder}", "--json")
    assert code == 0
    records = [
        (record["cell"]["model"], record["cell"]["recipe"]["method"], record["score"]) for record in json.loads(out)
    ]
    assert records == [("fake-model", "none", 100.0)] * 2 + [("fake-model@mine", "good", 75.0)] * 2
    assert plugin.logged("quantize") == []
    _, out, _ = mqbench("table", "3", f"--out={place.out}")
    assert "75.00 (-25.00)" in out


def test_a_quantized_folder_stands_beside_methods_run_directly(place: Workplace, mqbench: Run) -> None:
    quantize(place, mqbench, place.root / "mine", "--seed=1", "--calib-samples=3")
    code, out, _ = mqbench("eval", *place.arguments, f"--models=fake-model,{place.root / 'mine'}", "--methods=good")
    assert code == 0
    assert "fake-model@mine" in out
    assert "3 samples" in out
    assert "4 samples" in out


def test_a_folder_calibrated_on_evaluated_rows_is_refused(place: Workplace, mqbench: Run) -> None:
    quantize(place, mqbench, place.root / "mine", "--calib-samples=8")
    write_tsv(place.data / "TextVQA_VAL.tsv", ["calibrated DocVQA_VAL 2", "new 1"])
    code, _, err = mqbench("eval", *place.arguments, f"--models={place.root / 'mine'}")
    assert code == 2
    assert_one_line(err, "was calibrated on 1 evaluated row(s)")


def test_a_damaged_quantized_folder_is_one_line(place: Workplace, mqbench: Run) -> None:
    quantize(place, mqbench, place.root / "mine")
    (place.root / "mine" / "provenance.json").write_text("{")
    code, _, err = mqbench("eval", *place.arguments, f"--models={place.root / 'mine'}")
    assert code == 2
    assert_one_line(err, "run 'mqbench quantize' again")


def test_quantize_refuses_what_makes_no_sense(place: Workplace, mqbench: Run) -> None:
    common = ["quantize", "--model=fake-model", f"--models-dir={place.models}", f"--data-dir={place.data}"]
    folder = place.root / "quantized"
    for options, message in (
        (["--method=none"], "quantizes nothing"),
        (["--method=good", "--bits=w4a8,w8a8"], "one setting"),
        (["--method=good", f"--out={place.models}"], "holds other files"),
        (["--method=good", "--model=absent-model"], "were not found"),
    ):
        code, _, err = mqbench(*common, f"--out={folder}", *options)
        assert code == 2
        assert_one_line(err, message)


def test_durations_read_well() -> None:
    assert [duration_text(seconds) for seconds in (0.2, 45, 200, 7500)] == ["1 s", "45 s", "3 min", "2 h 05 min"]
