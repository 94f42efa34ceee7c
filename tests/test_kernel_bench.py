"""The benchmark of the kernels: what is checked before it is timed, resuming, lost workers, the commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes.kernel_bench import CASE, SETTINGS, die_on_one_row, lose_all, lose_one
from mqbench.harness.bench import contender, measure, run, spec
from mqbench.harness.bench.catalog import CONTENDERS
from mqbench.harness.bench.contender import Check, Contender, Unavailable, WrongResult, check_equal
from mqbench.harness.bench.device import parse_state
from mqbench.harness.bench.report import broken, entries_of
from mqbench.harness.bench.run import jobs_of, missing, run_jobs, store_in
from mqbench.harness.bench.spec import Case, Profile
from mqbench.harness.bench.worker import Bench, DeviceLost, Settings, WorkerDied
from mqbench.harness.cli import main
from mqbench.harness.errors import RequestError, UnknownNameError
from mqbench.kernels import api

# What is measured, and who is not.


def test_shipped_targets_name_what_is_measured() -> None:
    cases = spec.profile(spec.FULL).cases
    for target in spec.targets():
        assert [case for case in cases if target.covers(case.task, case.name, case.rows)], target.title
        names = {case.name for case in cases if case.task == target.task}
        assert names.issuperset(target.names), target.title


TARGET = {"title": "t", "task": "kernel_linear", "contender": "w8a8", "measure": "speedup", "against": "bf16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs one limit"),
        ({"at_least": 1.0, "at_most": 2.0}, "needs one limit"),
        ({"at_least": 1.0, "measure": "speed"}, "a measure of speedup, cost, bandwidth"),
        ({"at_leats": 1.0}, "unknown ['at_leats']"),
        ({"at_least": 1.0, "contender": "w8a9"}, "unknown contender 'w8a9'"),
        ({"at_least": 1.0, "against": ""}, "unknown contender ''"),
    ],
)
def test_wrong_targets_are_refused(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "load", lambda: {"targets": [TARGET | changes]})
    with pytest.raises((RequestError, UnknownNameError)) as caught:
        spec.targets()
    assert message in str(caught.value)


def test_targets_lack_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "load", lambda: {"targets": [{"title": "t", "at_least": 1.0}]})
    with pytest.raises(RequestError, match=r"target 't': unknown .*missing .*'contender', 'measure', 'task'"):
        spec.targets()


def test_peaks_are_measured_whatever_is_chosen() -> None:
    tasks = [case.task for case in spec.profile(spec.QUICK, ["kernel_fusion"]).cases]
    assert tasks == ["kernel_peaks"] + ["kernel_fusion"] * 4
    with pytest.raises(UnknownNameError, match="kernel task"):
        spec.profile(spec.FULL, ["kernel_fussion"])


class Layer:
    """A contender that counts its calls; ``wrong_from``: from this call on, the result is wrong."""

    def __init__(self, log: list[str], name: str, wrong_from: int = 1 << 30) -> None:
        self.log, self.name, self.wrong_from = log, name, wrong_from

    def __call__(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        return x + 1 + (self.log.count(self.name) >= self.wrong_from)

    def make(self) -> Contender:
        x = torch.zeros(4)
        return Contender(self, (x,), partial(check_equal, expected=x + 1), 32)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def measure_these(monkeypatch: pytest.MonkeyPatch) -> Callable[..., measure.Measurement]:
    """Measures made-up contenders in this process."""

    def run_them(*, rounds: int = 3, **makers: Callable[[], Contender]) -> measure.Measurement:
        monkeypatch.setattr(measure, "TASKS", {CASE.task: lambda case, device: makers})
        return measure.measure(CASE, "cpu", rounds, 1.0)

    return run_them


def test_all_have_a_turn_in_every_round_and_everything_is_kept(log: list[str], measure_these: Any) -> None:
    names = ("bf16", "w8a8", "w4a8")
    found = measure_these(**{name: Layer(log, name).make for name in names})
    rounds = [log[9:][start : start + 3] for start in range(0, 12, 3)]  # after two checks and one preparation of each
    assert all(sorted(turn) == sorted(names) for turn in rounds)
    assert len({turn[0] for turn in rounds}) == 3  # who begins changes
    assert set(found.timed) == set(names)
    for entry in found.timed.values():
        assert len(entry.times_ms) == 3 and min(entry.times_ms) > 0
        low, _, high = quantiles(entry.times_ms, n=4, method="inclusive")
        assert entry.iqr_ms == pytest.approx(high - low)


def test_a_wrong_result_is_never_timed(log: list[str], measure_these: Any) -> None:
    found = measure_these(bf16=Layer(log, "bf16").make, w8a8=Layer(log, "w8a8", wrong_from=2).make)
    assert log.count("w8a8") == 2  # the two calls of the check
    assert set(found.timed) == {"bf16"} and found.notes["w8a8"].startswith("wrong: error 1")


def test_a_result_that_goes_wrong_while_timed_has_no_time(log: list[str], measure_these: Any) -> None:
    found = measure_these(bf16=Layer(log, "bf16").make, w8a8=Layer(log, "w8a8", wrong_from=4).make)
    assert set(found.timed) == {"bf16"} and found.notes["w8a8"].startswith("wrong: right at first")


def test_a_result_that_is_not_written_again_is_wrong(log: list[str], measure_these: Any) -> None:
    kept = torch.ones(4)
    lazy = Contender(lambda x: kept, (torch.zeros(4),), partial(check_equal, expected=torch.ones(4)), 32)
    found = measure_these(bf16=Layer(log, "bf16").make, w8a8=lambda: lazy)
    assert found.notes["w8a8"].startswith("wrong")


def test_reasons_are_told_apart(log: list[str], measure_these: Any) -> None:
    def unavailable() -> Contender:
        raise Unavailable("not installed")

    found = measure_these(bf16=Layer(log, "bf16").make, fp8=unavailable, w8a8=lambda: 1 / 0)
    assert found.notes == {"fp8": "unavailable: not installed", "w8a8": "failed: ZeroDivisionError: division by zero"}
    record = run.record_of(CASE.cell("cpu", "1", 3), found, "2026-01-02T03:04:05+00:00", 1.0, "cpu")
    assert list(broken(record)) == ["w8a8 failed: ZeroDivisionError: division by zero"]
    assert record.arrays["bf16_ms"] == found.timed["bf16"].times_ms  # raw samples


def test_no_ratio_without_a_baseline(log: list[str], measure_these: Any) -> None:
    with pytest.raises(WrongResult, match="bf16: wrong"):
        measure_these(bf16=Layer(log, "bf16", wrong_from=1).make, w8a8=Layer(log, "w8a8").make)


def test_an_error_while_timed_names_who_was_at_work(log: list[str], measure_these: Any) -> None:
    def breaks(x: Tensor) -> Tensor:
        log.append("w8a8")
        if log.count("w8a8") == 4:
            raise RuntimeError("an illegal memory access")
        return x + 1

    maker = lambda: replace(Layer(log, "w8a8").make(), run=breaks)  # noqa: E731
    with pytest.raises(DeviceLost) as caught:
        measure_these(bf16=Layer(log, "bf16").make, w8a8=maker)
    assert caught.value.contender == "w8a8" and "illegal memory access" in caught.value.message


def test_checks_can_fail() -> None:
    truth = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(8, 8)
    rounded = truth.bfloat16()
    assert contender.check_rounded(rounded, lambda rows: truth[rows]).ok
    assert contender.check_norm(rounded, lambda rows: truth[rows]).ok
    assert not contender.check_rounded(rounded * 1.05, lambda rows: truth[rows]).ok
    assert not contender.check_norm(rounded * 1.05, lambda rows: truth[rows]).ok
    assert not contender.check_norm(rounded * float("nan"), lambda rows: truth[rows]).ok
    assert not contender.check_rounded(rounded * float("nan"), lambda rows: truth[rows]).ok
    levels = torch.zeros(1000, 1, dtype=torch.int8)
    off = levels.clone()
    off[:5] += 1
    assert contender.check_levels(off, levels).ok
    off[0] += 1
    assert not contender.check_levels(off, levels).ok


def test_state_of_the_gpu_leaves_out_what_is_unknown() -> None:
    line = "700.00, 120.5, 1980, 1980, [N/A], 2619, 41\n"
    found = parse_state(line)
    assert (found["power_limit_w"], found["sm_clock_mhz"], found["temperature_c"]) == (700.0, 1980.0, 41.0)
    assert "memory_clock_mhz" not in found


# Resuming.


class FakeBench:
    """Gives made-up measurements; the case with ``stop_at`` rows is interrupted, the one with ``fail_at`` fails."""

    def __init__(self, settings: Settings, stop_at: int = 0, fail_at: int = 0) -> None:
        self.stop_at, self.fail_at = stop_at, fail_at

    def __enter__(self) -> FakeBench:
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self, case: Case) -> measure.Measurement:
        if case.rows == self.stop_at:
            raise KeyboardInterrupt
        if case.rows == self.fail_at:
            raise WorkerDied("the worker process died")
        return measure.Measurement("bf16", {"bf16": measure.Timed((1.0, 2.0), 1.0, Check(0.0, 1.0), 8, 0)})


def test_only_missing_cases_run(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    jobs = jobs_of(Profile(tuple(replace(CASE, rows=rows) for rows in (1, 2, 3, 4)), 2, 1.0), "Alpha 100")

    def go(**changes: int) -> list[int]:
        seen: list[int] = []
        bench: Any = partial(FakeBench, **changes)
        run_jobs(
            missing(jobs, store),
            replace(SETTINGS, device="cpu"),
            store,
            lambda job, _: seen.append(job.case.rows),
            bench,
        )
        return seen

    with pytest.raises(KeyboardInterrupt):
        go(stop_at=3)
    assert [job.case.rows for job in missing(jobs, store)] == [3, 4]
    with store.path.open("ab") as file:
        file.write(b'{"killed while wri')
    with pytest.warns(UserWarning, match="half-written"):
        assert go(fail_at=3) == [3, 4]
    assert go() == [3]  # failures run again
    assert go() == []
    assert missing(jobs_of(Profile((CASE,), 2, 1.0), "Beta 200"), store)  # another GPU


def test_a_failed_case_keeps_its_reason(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    jobs = jobs_of(Profile((CASE,), 2, 1.0), "Alpha 100")
    bench: Any = partial(FakeBench, fail_at=CASE.rows)
    (record,) = run_jobs(jobs, replace(SETTINGS, device="cpu"), store, lambda *_: None, bench)
    assert list(broken(record)) == ["WorkerDied: the worker process died"]
    assert "WorkerDied" in (tmp_path / "failures" / f"{record.cell.key}.txt").read_text(encoding="utf-8")


def test_other_code_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text("x = 1", encoding="utf-8")
    monkeypatch.setattr(run, "CODE", tmp_path)
    version = run.code_version.__wrapped__
    before = version()
    assert before == version()
    (tmp_path / "one.py").write_text("x = 2", encoding="utf-8")
    assert version() != before


# Worker processes.


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(function: Callable[..., Any]) -> Bench:
        made.append(Bench(SETTINGS, function))
        return made[-1]

    yield make
    for one in made:
        one.__exit__(None, None, None)


def test_breaking_the_device_poisons_only_that_contender(bench: Callable[..., Bench]) -> None:
    found: Any = bench(lose_one).measure(CASE)
    assert found[0] == {"w8a8": "failed: broke the GPU's context: an illegal memory access"}
    assert found[1] != os.getpid()


def test_a_case_is_given_up_when_everyone_breaks_the_device(bench: Callable[..., Bench]) -> None:
    with pytest.raises(DeviceLost):
        bench(lose_all).measure(CASE)


def test_a_dead_worker_is_replaced(bench: Callable[..., Bench]) -> None:
    one = bench(die_on_one_row)
    with pytest.raises(WorkerDied):
        one.measure(replace(CASE, rows=1))
    assert one.measure(replace(CASE, rows=2)) != os.getpid()


def test_a_killed_run_leaves_no_worker(tmp_path: Path) -> None:
    told = tmp_path / "worker"
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-m", "fakes.kernel_bench", str(told)], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        wait_until(lambda: told.is_file() and told.read_text(encoding="utf-8") != "")
        worker = int(told.read_text(encoding="utf-8"))
        assert is_running(worker)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not is_running(worker))


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


# The commands.

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["bench", "kernels", f"--out={tmp_path / 'records'}", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_functional_check_runs_every_task_and_resumes(bench_command: Run, tmp_path: Path) -> None:
    code, out, err = bench_command("--device=cpu")
    assert code == 0, err
    assert "no speeds" in out and " ms" not in out
    records = store_in(tmp_path / "records").load()
    assert {record.cell.task for record in records} == set(spec.TASKS)
    entries = [entry for record in records for entry in entries_of(record)]
    assert {entry.contender for entry in entries} == set(CONTENDERS)
    assert all(entry.time_ms is not None or entry.note.startswith("unavailable") for entry in entries)
    code, _, err = bench_command("--device=cpu")
    assert code == 0 and f"{len(records)} done, 0 to measure" in err
    assert len(store_in(tmp_path / "records").load()) == len(records)


def test_a_wrong_kernel_is_named_and_the_exit_code_is_1(bench_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = api.linear_int8
    monkeypatch.setattr(api, "linear_int8", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    code, _, err = bench_command("--device=cpu", "--tasks=kernel_linear")
    assert code == 1 and "w8a8 wrong: error" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=tpu"], "unknown device 'tpu'; give cuda, cuda:N or cpu"),
        (["--device=cuda:x"], "unknown device 'cuda:x'"),
        (["--device=cuda:97"], "no NVIDIA GPU for 'cuda:97'"),
        (["--tasks=linear"], "unknown kernel task 'linear'"),
    ],
)
def test_wrong_requests_are_one_line(bench_command: Run, arguments: list[str], message: str, tmp_path: Path) -> None:
    code, out, err = bench_command(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not (tmp_path / "records").exists()


def test_cases_are_listed_without_a_gpu(bench_command: Run, tmp_path: Path) -> None:
    code, out, err = bench_command("--device=cuda:97", "--dry-run")
    count = len(spec.profile(spec.FULL).cases)
    assert code == 0 and out.count("to measure") == count and f"{count} cases" in err
    assert not (tmp_path / "records").exists()
