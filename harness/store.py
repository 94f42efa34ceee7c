"""Records on disk: an append-only JSONL file that survives kill -9 at any moment.

Layout of the output folder (``--out``, by default ``runs`` in the working directory)::

    records.jsonl             one finished cell per line, failures included
    records.jsonl.damaged-1   a half-written line that was set aside
    partial/<cell key>.jsonl  answers of a running cell; removed when its record is written
    failures/<cell key>.txt   traceback of a failed cell
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from mqbench.harness.errors import OutputError, RecordError
from mqbench.harness.record import Record, canonical_json

DEFAULT_OUT = Path("runs")
RECORDS_NAME = "records.jsonl"


class DamagedLineWarning(UserWarning):
    """A half-written line was found and set aside."""


class RecordStore:
    """All records of one output folder. Several processes may append at once.

    Attributes:
        folder: The output folder.
        path: The file of records.
    """

    def __init__(self, folder: Path, name: str = RECORDS_NAME) -> None:
        self.folder = folder
        self.path = folder / name

    def prepare(self) -> None:
        """Creates the folder and proves that it can be written.

        Raises:
            OutputError: it cannot.
        """
        prepare_folder(self.folder)
        try:
            if self.path.exists():
                self.path.open("ab").close()
        except OSError as error:
            raise OutputError(f"cannot write to '{self.path}': {error.strerror}; choose another --out") from error

    def append(self, record: Record) -> None:
        """Adds one line and waits until it is on disk; then drops the cell's partial answers.

        Raises:
            OutputError: the file cannot be written.
        """
        line = canonical_json(record.to_json()).encode() + b"\n"
        try:
            with self._locked():
                if not _ends_with_newline(self.path):
                    self._repair()
                _write_durably(self.path, line)
        except OSError as error:
            raise OutputError(f"cannot append to '{self.path}': {error.strerror}; free the disk and rerun") from error
        self.partial(record.cell.key).remove()

    def load(self) -> list[Record]:
        """Every complete record in the order written. A half-written line is set aside with a warning.

        Raises:
            RecordError: a complete line is not a record that this version can read.
        """
        if not self.path.exists():
            return []
        with self._locked():
            self._repair()
            lines = self.path.read_bytes().splitlines()
        return [self._parse(number, line) for number, line in enumerate(lines, start=1)]

    def latest(self) -> dict[str, Record]:
        """The newest ok record of every cell by key; the newest failure where no ok one exists."""
        newest: dict[str, Record] = {}
        for record in self.load():
            key = record.cell.key
            if record.ok or key not in newest or not newest[key].ok:
                newest[key] = record
        return newest

    def partial(self, key: str) -> PartialAnswers:
        return PartialAnswers(self.folder / "partial" / f"{key}.jsonl")

    def remove_leftovers(self) -> None:
        """Drops partial answers whose record was written just before a crash."""
        for key, record in self.latest().items():
            if record.ok:
                self.partial(key).remove()

    def write_failure(self, key: str, text: str) -> Path:
        """Keeps the traceback of a failed cell."""
        path = self.folder / "failures" / f"{key}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            return Record.from_json(json.loads(line))
        except RecordError as error:
            raise RecordError(f"{self.path}, line {number}: {error}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclusive lock on the folder itself, so that no lock file is left behind."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _repair(self) -> None:
        """Sets torn lines aside and ends the file with a newline; call under the lock."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        lines = content.splitlines()
        torn = [line for line in lines if not _is_json_object(line)]
        if not torn and (not content or content.endswith(b"\n")):
            return
        if torn:
            aside = self._next_damaged_path()
            _write_durably(aside, b"".join(line + b"\n" for line in torn))
            message = f"{self.path}: {len(torn)} half-written line(s) moved to {aside.name}; those cells run again"
            warnings.warn(message, DamagedLineWarning, stacklevel=3)
        _replace_durably(self.path, b"".join(line + b"\n" for line in lines if _is_json_object(line)))

    def _next_damaged_path(self) -> Path:
        number = 1
        while (path := self.folder / f"{self.path.name}.damaged-{number}").exists():
            number += 1
        return path


class PartialAnswers:
    """Answers of a cell that is still running, by row index, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, str]:
        """Answers so far; a half-written last line is dropped (that row runs again)."""
        if not self.path.exists():
            return {}
        content = self.path.read_bytes()
        lines = content.splitlines()
        whole = [line for line in lines if _is_json_object(line)]
        if len(whole) < len(lines) or not content.endswith(b"\n"):
            _replace_durably(self.path, b"".join(line + b"\n" for line in whole))
        return {entry["index"]: entry["prediction"] for entry in map(json.loads, whole)}

    def append(self, answers: Mapping[str, str]) -> None:
        """Adds answers and waits until they are on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [canonical_json({"index": index, "prediction": text}) for index, text in answers.items()]
        _write_durably(self.path, "".join(line + "\n" for line in lines).encode())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def prepare_folder(folder: Path) -> None:
    """Creates a folder and proves that it can be written.

    Raises:
        OutputError: it cannot.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write to output folder '{folder}': {reason}; choose another --out") from error


def _ends_with_newline(path: Path) -> bool:
    """True also for a file that is empty or not there yet."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _write_durably(path: Path, content: bytes) -> None:
    """Appends ``content`` in one write and waits for the disk."""
    is_new = not path.exists()
    with path.open("ab") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    if is_new:
        _sync_folder(path.parent)


def _replace_durably(path: Path, content: bytes) -> None:
    """Swaps the file's content in one step, so that a crash leaves the old or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    _write_durably(temporary, content)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
