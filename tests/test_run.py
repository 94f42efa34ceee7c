"""Runs of a made-up model: records, failures, kills and resuming.

What one process does with its groups is tested in this process; what the pool does, with real worker processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import plugin
from fakes.plugin import Workplace, make_workplace, write_tsv
from mqbench.harness.execute import Advanced, Executor, Finished
from mqbench.harness.plan import Plan, expand
from mqbench.harness.record import Record
from mqbench.harness.request import Request
from mqbench.harness.run import run_plan, worker_devices
from mqbench.harness.store import RecordStore

FAKE_EVALUATOR = "fakes.plugin"
NUM_ROWS = 4
DEADLINE_S = 120
ALL_CELLS = {f"{method} {task}" for method in ("none", "good", "bad") for task in ("textvqa", "docvqa")}


class ListView:
    """Remembers what a run tells."""

    def __init__(self) -> None:
        self.amount = 0
        self.cells: list[Finished] = []
        self.lines: list[str] = []

    @property
    def failed(self) -> dict[str, str]:
        return {cell.label: cell.reason for cell in self.cells if cell.reason}

    def take(self, message: Advanced | Finished) -> None:
        if isinstance(message, Advanced):
            self.advance(message.amount)
        else:
            self.finish(message)

    def advance(self, amount: int) -> None:
        self.amount += amount

    def finish(self, cell: Finished) -> None:
        self.cells.append(cell)

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return make_workplace(tmp_path, monkeypatch)


def make_plan(place: Workplace, jobs: int = 1, methods: tuple[str, ...] = ("good", "bad")) -> Plan:
    return expand(
        Request(
            models=("fake-model",),
            methods=methods,
            tasks=("textvqa", "docvqa"),
            bits=("w4a8",),
            calib_samples=4,
            out=place.out,
            data_dir=place.data,
            models_dir=place.models,
            jobs=jobs,
            batch_size=2,
        )
    )


def run_here(place: Workplace, methods: tuple[str, ...] = ("good", "bad")) -> ListView:
    """A run without worker processes."""
    plan, view = make_plan(place, methods=methods), ListView()
    executor = Executor(plan.request, "cpu", view.take, FAKE_EVALUATOR)
    for group in plan.groups:
        executor.run_group(group)
    return view


def records_of(place: Workplace) -> dict[str, Record]:
    """Newest record by ``method task``."""
    records = RecordStore(place.out).latest().values()
    return {f"{record.cell.recipe.method} {record.cell.task}": record for record in records}


def ask(place: Workplace, name: str, text: str = "") -> None:
    (place.root / "control" / name).write_text(text)


def test_every_cell_gets_a_record_with_all_that_tables_need(place: Workplace) -> None:
    view = run_here(place)
    records = records_of(place)
    assert {name: record.score for name, record in records.items()} == {
        f"{method} {task}": score
        for method, score in {"none": 100.0, "good": 75.0, "bad": 25.0}.items()
        for task in ("textvqa", "docvqa")
    }
    record = records["good textvqa"]
    assert [sample.prediction for sample in record.samples] == ["wrong", "right", "right", "right"]
    assert [sample.score for sample in record.samples] == [0.0, 1.0, 1.0, 1.0]
    assert record.environment["packages"]["torch"]
    assert view.failed == {}
    assert len(view.cells) == 6
    assert view.amount == 6 * NUM_ROWS + 2 * 4
    assert list((place.out / "partial").iterdir()) == []


def test_a_model_is_quantized_once_with_the_calibration_samples(place: Workplace) -> None:
    run_here(place)
    assert plugin.logged("quantize") == ["quantize good w4a8/w4a8 4", "quantize bad w4a8/w4a8 4"]


def test_two_runs_are_equal(place: Workplace) -> None:
    first = run_records(place)
    RecordStore(place.out).path.unlink()
    assert run_records(place) == first


def run_records(place: Workplace) -> list[Record]:
    """Records of a run, without what differs by time."""
    run_here(place)
    return [replace(record, started_at="", duration_s=0, quantize_s=0) for record in RecordStore(place.out).load()]


def test_a_finished_run_runs_nothing_again(place: Workplace) -> None:
    run_here(place)
    plugin.logged()
    run_here(place)
    assert plugin.logged() == []


def test_a_new_method_runs_alone(place: Workplace) -> None:
    run_here(place, methods=("good",))
    plugin.logged()
    run_here(place)
    assert {line.split()[1].split("-")[0] for line in plugin.logged("rows")} == {"bad"}


def test_a_failing_cell_is_recorded_and_the_others_go_on(place: Workplace) -> None:
    ask(place, "fail-good-textvqa")
    view = run_here(place)
    assert view.failed == {"fake-model good w4a8/w4a8 textvqa": "ValueError: no such luck"}
    records = records_of(place)
    assert {name for name, record in records.items() if not record.ok} == {"good textvqa"}
    failed = records["good textvqa"]
    assert failed.reason == "ValueError: no such luck"
    assert "Traceback" in (place.out / "failures" / f"{failed.cell.key}.txt").read_text()


def test_a_failed_cell_alone_runs_again(place: Workplace) -> None:
    ask(place, "fail-good-textvqa")
    run_here(place)
    (place.root / "control" / "fail-good-textvqa").unlink()
    plugin.logged()
    assert run_here(place).failed == {}
    assert {line.split()[1] for line in plugin.logged("rows")} == {"good-textvqa"}
    assert records_of(place)["good textvqa"].ok


@pytest.mark.parametrize(
    ("request_", "methods", "reason"),
    [
        ("refuse-good", {"good"}, "ValueError: cannot quantize this"),
        ("refuse-load", {"none", "good", "bad"}, "the file is gone; get it again"),
        (
            "nan-bad",
            {"bad"},
            "NaN or Inf in the output of 'linear'; check the weights, the dtype and the bits of this layer",
        ),
    ],
)
def test_other_failures_reach_the_records(place: Workplace, request_: str, methods: set[str], reason: str) -> None:
    ask(place, request_)
    view = run_here(place)
    assert {label.split()[1] for label in view.failed} == methods
    assert set(view.failed.values()) == {reason}
    assert {name.split()[0] for name, record in records_of(place).items() if not record.ok} == methods


def test_changed_data_during_a_run_fails_the_cell(place: Workplace) -> None:
    plan, view = make_plan(place), ListView()
    write_tsv(place.data / "TextVQA_VAL.tsv", ["another 0"])
    Executor(plan.request, "cpu", view.take, FAKE_EVALUATOR).run_group(plan.groups[0])
    assert [reason for reason in view.failed.values() if "changed while the run" in reason]


def test_changed_weights_during_a_run_fail_the_group(place: Workplace) -> None:
    plan, view = make_plan(place), ListView()
    (place.models / "fake-model" / "config.json").write_text("{}")
    Executor(plan.request, "cpu", view.take, FAKE_EVALUATOR).run_group(plan.groups[0])
    assert len(view.failed) == 2
    assert all("changed while the run was under way" in reason for reason in view.failed.values())


def test_partial_answers_of_a_killed_run_are_used(place: Workplace) -> None:
    plan = make_plan(place)
    RecordStore(place.out).partial(plan.cells[0].key).append({"1": "kept", "2": "kept"})
    view = run_here(place)
    assert [sample.prediction for sample in records_of(place)["none textvqa"].samples] == [
        "kept",
        "kept",
        "right",
        "right",
    ]
    assert plugin.logged("rows none-textvqa") == ["rows none-textvqa 3,4"]
    assert view.amount == 6 * NUM_ROWS + 2 * 4


def test_killed_workers_are_replaced_and_nobody_waits_for_a_lost_cause(place: Workplace) -> None:
    ask(place, "kill-good-docvqa", "1")
    ask(place, "kill-bad-textvqa", "9")
    view = ListView()
    outcome = run_plan(make_plan(place), view, FAKE_EVALUATOR)
    died = "its worker process was killed by SIGKILL (often: out of memory); trying once more"
    assert view.lines == [f"fake-model good w4a8/w4a8: {died}", f"fake-model bad w4a8/w4a8: {died}"]
    rows = ["textvqa 1,2", "textvqa 3,4", "docvqa 1,2", "docvqa 3,4", "docvqa 3,4"]
    assert plugin.logged("rows good-") == [f"rows good-{row}" for row in rows]
    assert {cell.label for cell in outcome.failed} == {
        f"fake-model bad w4a8/w4a8 {task}" for task in ("textvqa", "docvqa")
    }
    assert all("SIGKILL" in cell.reason and "2 times" in cell.reason for cell in outcome.failed)
    records = records_of(place)
    assert {name for name, record in records.items() if not record.ok} == {"bad textvqa", "bad docvqa"}
    assert len(RecordStore(place.out).load()) == 6


def test_two_workers_give_the_same_records(place: Workplace) -> None:
    run_here(place)
    alone = {name: (record.score, record.samples) for name, record in records_of(place).items()}
    RecordStore(place.out).path.unlink()
    outcome = run_plan(make_plan(place, jobs=2), ListView(), FAKE_EVALUATOR)
    assert outcome.failed == ()
    records = records_of(place)
    assert {name: (record.score, record.samples) for name, record in records.items()} == alone
    assert {record.environment["threads"] for record in records.values()} == {1}


def test_the_spread_over_devices() -> None:
    assert worker_devices("cuda", 2) == ["cuda:0", "cuda:1"]
    assert worker_devices("cuda:1", 1) == ["cuda:1"]
    assert worker_devices("cpu", 2) == ["cpu", "cpu"]


RUNNER = """
import sys
from pathlib import Path
from test_run import FAKE_EVALUATOR, ListView, Workplace, make_plan, run_plan
if __name__ == "__main__":
    run_plan(make_plan(Workplace(Path(sys.argv[1]))), ListView(), FAKE_EVALUATOR)
"""


def test_kill_9_of_the_parent_ends_the_workers_and_a_rerun_runs_what_is_missing(place: Workplace) -> None:
    ask(place, "slow")
    with start_runner(place) as runner:
        wait_for_line(place, "rows good-docvqa 1,2")
        runner.kill()
    wait_for_end(runner.pid)
    before = RecordStore(place.out).load()
    assert all(record.ok for record in before)
    assert {"none textvqa", "none docvqa", "good textvqa"} <= records_of(place).keys() < ALL_CELLS
    (place.root / "control" / "slow").unlink()
    plugin.logged()
    assert run_here(place).failed == {}
    assert records_of(place).keys() == ALL_CELLS
    assert RecordStore(place.out).load()[: len(before)] == before
    assert not [line for line in plugin.logged("rows") if "none" in line or "good-textvqa" in line]


def start_runner(place: Workplace) -> subprocess.Popen[str]:
    """A run in a process group of its own."""
    script = place.root / "runner.py"
    script.write_text(RUNNER)
    path = os.pathsep.join([str(Path(__file__).parent), str(place.root / "site")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, str(script), str(place.root)], env=environment, start_new_session=True)


def wait_for_line(place: Workplace, start: str) -> None:
    log = place.root / "control" / "log"
    deadline = time.monotonic() + DEADLINE_S
    while not (log.exists() and any(line.startswith(start) for line in log.read_text().splitlines())):
        assert time.monotonic() < deadline, f"never saw {start}"
        time.sleep(0.02)


def wait_for_end(group: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while group_alive(group):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def group_alive(group: int) -> bool:
    """Whether a process of the group still runs; zombies do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False
