"""A local Ray cluster gives the records of a single process; dead workers lose and repeat nothing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from test_run import ALL_CELLS, FAKE_EVALUATOR, NUM_ROWS, ListView, ask, make_plan, records_of, run_here

from fakes import plugin
from fakes.plugin import Workplace, make_workplace
from mqbench.harness import ray_run
from mqbench.harness.errors import RequestError
from mqbench.harness.plan import Plan
from mqbench.harness.request import RAY, Request, check_device
from mqbench.harness.run import run_plan
from mqbench.harness.store import RecordStore

OBJECT_STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A workplace and a cluster of two CPUs whose workers find the fake plug-in; starting one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        place = make_workplace(tmp_path_factory.mktemp("ray"), patch)
        path = os.pathsep.join([str(Path(__file__).parent), str(place.root / "site")])
        variables = {"PYTHONPATH": path, plugin.CONTROL: str(place.root / "control"), "OMP_NUM_THREADS": "1"}
        quiet = {"log_to_driver": False, "include_dashboard": False, "configure_logging": False}
        ray.init(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, runtime_env={"env_vars": variables}, **quiet)
        yield place
        ray.shutdown()


@pytest.fixture
def place(cluster: Workplace) -> Workplace:
    """The cluster's workplace without traces of other tests."""
    shutil.rmtree(cluster.out, ignore_errors=True)
    for file in (cluster.root / "control").iterdir():
        file.unlink()
    return cluster


def ray_plan(place: Workplace) -> Plan:
    plan = make_plan(place)
    return replace(plan, request=replace(plan.request, executor=RAY))


def test_a_cluster_gives_the_records_of_one_process(place: Workplace) -> None:
    run_here(place)
    alone = {name: (record.cell.key, record.score, record.samples) for name, record in records_of(place).items()}
    RecordStore(place.out).path.unlink()
    view = ListView()
    outcome = run_plan(ray_plan(place), view, FAKE_EVALUATOR)
    assert outcome.failed == ()
    records = records_of(place)
    assert {name: (record.cell.key, record.score, record.samples) for name, record in records.items()} == alone
    assert view.amount == 6 * NUM_ROWS + 2 * 4


def test_a_killed_worker_loses_no_cell_and_none_runs_twice(place: Workplace) -> None:
    ask(place, "kill-good-docvqa", "1")
    ask(place, "kill-bad-textvqa", "9")
    view = ListView()
    outcome = run_plan(ray_plan(place), view, FAKE_EVALUATOR)
    assert {cell.label for cell in outcome.failed} == {
        f"fake-model bad w4a8/w4a8 {task}" for task in ("textvqa", "docvqa")
    }
    assert all("2 times" in cell.reason for cell in outcome.failed)
    assert len([line for line in view.lines if "trying once more" in line]) == 2
    records = records_of(place)
    assert records.keys() == ALL_CELLS
    assert {name for name, record in records.items() if not record.ok} == {"bad textvqa", "bad docvqa"}
    assert len(RecordStore(place.out).load()) == len(ALL_CELLS)
    assert plugin.logged("rows good-textvqa") == ["rows good-textvqa 1,2", "rows good-textvqa 3,4"]


def test_failures_travel_as_records(place: Workplace) -> None:
    ask(place, "refuse-good")
    outcome = run_plan(ray_plan(place), ListView(), FAKE_EVALUATOR)
    assert {cell.reason for cell in outcome.failed} == {"ValueError: cannot quantize this"}


def test_without_ray_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"not installed; install it with: pip install 'mqbench\[ray\]'"):
        check_device(Request(executor=RAY))


def test_a_task_on_a_gpu_sees_the_one_that_it_was_given(place: Workplace) -> None:
    started: list[ray_run.Task] = []
    plan = ray_plan(place)
    plan = replace(plan, request=replace(plan.request, device="cuda"))
    driver = ray_run.Driver(plan, ListView(), FAKE_EVALUATOR, 2, lambda task: started.append(task) or object())
    driver.start(ray_run.Job(plan.groups[0]))
    assert [task.device for task in started] == ["cuda:0"]
