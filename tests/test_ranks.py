"""Ranks of torchrun share each cell's batches; records are those of a single process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import ALL_CELLS, NUM_ROWS, ask, records_of, run_here

from fakes import plugin
from fakes.plugin import Workplace, make_workplace
from mqbench.harness.errors import RequestError
from mqbench.harness.ranks import Ranks, join_ranks
from mqbench.harness.store import RecordStore

LIMIT_S = 240
RUNNER = """
import os, sys
from pathlib import Path
from test_run import FAKE_EVALUATOR, ListView, Workplace, make_plan, run_plan
view = ListView()
outcome = run_plan(make_plan(Workplace(Path(sys.argv[1]))), view, FAKE_EVALUATOR)
summary = f"{view.amount} {sorted(cell.reason for cell in outcome.failed)}"
Path(sys.argv[1], "rank" + os.environ["RANK"]).write_text(summary)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return make_workplace(tmp_path, monkeypatch)


def run_ranks(place: Workplace, size: int = 2) -> subprocess.CompletedProcess[str]:
    """A run under torchrun, gloo between the ranks."""
    script = place.root / "ranks.py"
    script.write_text(RUNNER)
    path = os.pathsep.join([str(Path(__file__).parent), str(place.root / "site")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", str(script)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(place.root)], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def summary(place: Workplace, rank: int) -> str:
    """Progress and failures as a rank saw them."""
    return (place.root / f"rank{rank}").read_text()


def test_two_ranks_give_the_records_of_one_process(place: Workplace) -> None:
    run_here(place)
    alone = {name: (record.cell.key, record.score, record.samples) for name, record in records_of(place).items()}
    RecordStore(place.out).path.unlink()
    plugin.logged()
    done = run_ranks(place)
    assert done.returncode == 0, done.stderr
    records = records_of(place)
    assert {name: (record.cell.key, record.score, record.samples) for name, record in records.items()} == alone
    assert len(RecordStore(place.out).load()) == len(ALL_CELLS)
    rows = plugin.logged("rows good-textvqa")
    assert sorted(rows) == ["rows good-textvqa 1,2", "rows good-textvqa 3,4"]  # each batch on one rank, none twice
    assert summary(place, 0) == summary(place, 1) == f"{6 * NUM_ROWS + 2 * 4} []"


def test_a_rank_that_fails_fails_the_cell_on_all_and_the_others_go_on(place: Workplace) -> None:
    ask(place, "fail-good-textvqa")  # raised by the rank that has the first batch
    done = run_ranks(place)
    assert done.returncode == 0, done.stderr
    records = records_of(place)
    assert {name for name, record in records.items() if not record.ok} == {"good textvqa"}
    assert records["good textvqa"].reason == "ValueError: no such luck"
    assert "rank 0 failed: ValueError: no such" in summary(place, 1)


def test_a_killed_rank_loses_no_record_and_a_rerun_runs_what_is_missing(place: Workplace) -> None:
    ask(place, "kill-good-docvqa", "1")  # the rank with the second batch ends by SIGKILL
    assert run_ranks(place).returncode != 0
    before = RecordStore(place.out).load()
    assert {"none textvqa", "none docvqa", "good textvqa"} <= records_of(place).keys() < ALL_CELLS
    plugin.logged()
    assert run_ranks(place).returncode == 0
    assert records_of(place).keys() == ALL_CELLS
    assert RecordStore(place.out).load()[: len(before)] == before
    assert not [line for line in plugin.logged("rows") if "none" in line or "good-textvqa" in line]


def test_shares_cover_everything_once() -> None:
    items = list(range(11))
    for size in (1, 2, 3, 16):
        shares = [Ranks(rank, size).share(items) for rank in range(size)]
        assert sorted(item for share in shares for item in share) == items


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_ranks() == Ranks()
    assert Ranks().merge(lambda: {"1": "a"}) == {"1": "a"}
    assert Ranks(1, 2, 1).device("cuda") == "cuda:1"
    assert Ranks(1, 2, 1).device("cpu") == "cpu"


def test_incomplete_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RequestError, match="'RANK' is not; start mqbench by torchrun"):
        join_ranks()
