"""The store: nothing complete is lost, whatever happens to the writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fakes.records import failed_record, make_cell, make_record
from mqbench.harness.errors import OutputError, RecordError
from mqbench.harness.record import SCHEMA_VERSION, canonical_json
from mqbench.harness.store import DamagedLineWarning, RecordStore

WRITER = """
import sys
from pathlib import Path
from fakes.records import make_cell, make_record
from mqbench.harness.store import RecordStore
store = RecordStore(Path(sys.argv[1]))
number = 0
while sys.argv[3] == "forever" or number < int(sys.argv[3]):
    cell = make_cell(limit=number, model=sys.argv[2])
    store.partial(cell.key).append({"1": "a"})
    store.append(make_record(cell))
    print(number, flush=True)
    number += 1
"""


def start_writer(folder: Path, name: str, count: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", WRITER, str(folder), name, count]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    made = RecordStore(tmp_path / "runs")
    made.prepare()
    return made


def test_records_come_back_in_order(store: RecordStore) -> None:
    records = [make_record(make_cell(limit=number)) for number in range(3)]
    for record in records:
        store.append(record)
    assert store.load() == records


def test_nothing_stored_is_no_error(tmp_path: Path) -> None:
    assert RecordStore(tmp_path / "absent").load() == []


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_torn_last_line_is_set_aside(store: RecordStore, cut: int) -> None:
    store.append(make_record(make_cell(limit=1)))
    torn = canonical_json(make_record(make_cell(limit=2)).to_json()).encode()[:cut]
    with store.path.open("ab") as stream:
        stream.write(torn)
    with pytest.warns(DamagedLineWarning, match=r"damaged-1"):
        assert store.load() == [make_record(make_cell(limit=1))]
    assert (store.folder / "records.jsonl.damaged-1").read_bytes() == torn + b"\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(store.load()) == 1


def test_appending_behind_a_torn_line_keeps_both_sides(store: RecordStore) -> None:
    store.append(make_record(make_cell(limit=1)))
    with store.path.open("ab") as stream:
        stream.write(b'{"schema_version": 1, "ce')
    with pytest.warns(DamagedLineWarning):
        store.append(make_record(make_cell(limit=2)))
    assert [record.cell.limit for record in store.load()] == [1, 2]


def test_a_second_torn_line_does_not_replace_the_first(store: RecordStore) -> None:
    for number in (1, 2):
        store.path.write_bytes(b'{"torn": %d' % number)
        with pytest.warns(DamagedLineWarning):
            store.load()
    kept = [(store.folder / f"records.jsonl.damaged-{number}").read_bytes() for number in (1, 2)]
    assert kept == [b'{"torn": 1\n', b'{"torn": 2\n']


def test_a_complete_line_without_newline_is_kept(store: RecordStore) -> None:
    store.path.write_text(canonical_json(make_record(make_cell(limit=1)).to_json()), encoding="utf-8")
    store.append(make_record(make_cell(limit=2)))
    assert [record.cell.limit for record in store.load()] == [1, 2]


def test_an_unreadable_record_is_named_not_dropped(store: RecordStore) -> None:
    store.append(make_record())
    store.path.write_text(store.path.read_text().replace(f'"schema_version":{SCHEMA_VERSION}', '"schema_version":99'))
    with pytest.raises(RecordError, match=r"line 1: .*newer mqbench"):
        store.load()


def test_latest_prefers_ok_over_a_later_failure(store: RecordStore) -> None:
    first, second = make_cell(limit=1), make_cell(limit=2)
    for record in (make_record(first), failed_record(first), failed_record(second)):
        store.append(record)
    latest = store.latest()
    assert latest[first.key].ok
    assert not latest[second.key].ok


def test_partial_answers_resume_and_vanish(store: RecordStore) -> None:
    cell = make_cell()
    partial = store.partial(cell.key)
    partial.append({"1": "a\nb", "2": "007"})
    with partial.path.open("ab") as stream:
        stream.write(b'{"index": "3", "pred')
    assert partial.load() == {"1": "a\nb", "2": "007"}
    partial.append({"3": "c"})
    assert partial.load() == {"1": "a\nb", "2": "007", "3": "c"}
    store.append(make_record(cell))
    assert partial.load() == {}
    assert not partial.path.exists()


def test_answers_left_behind_by_a_crash_go_and_those_of_unfinished_cells_stay(store: RecordStore) -> None:
    done, failed, running = (make_cell(limit=number) for number in range(3))
    store.append(make_record(done))
    store.append(failed_record(failed))
    for cell in (done, failed, running):
        store.partial(cell.key).append({"1": "a"})
    store.remove_leftovers()
    assert [bool(store.partial(cell.key).load()) for cell in (done, failed, running)] == [False, True, True]


def test_kill_9_loses_no_complete_record(store: RecordStore) -> None:
    with start_writer(store.folder, "killed", "forever") as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline() for _ in range(5)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.read().split("\n")
    done = [int(line) for line in acknowledged if line.strip()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedLineWarning)
        limits = [record.cell.limit for record in store.load()]
    assert limits == list(range(len(limits)))
    assert limits[: len(done)] == done


def test_concurrent_writers_do_not_mix_lines(store: RecordStore) -> None:
    writers = [start_writer(store.folder, name, "20") for name in ("one", "two")]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    records = store.load()
    for name in ("one", "two"):
        assert [record.cell.limit for record in records if record.cell.model == name] == list(range(20))


def test_a_folder_that_cannot_be_written_is_reported_early(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(OutputError, match="choose another --out"):
        RecordStore(blocker / "runs").prepare()


def test_prepare_leaves_nothing_behind(store: RecordStore) -> None:
    assert list(store.folder.iterdir()) == []
