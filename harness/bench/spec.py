"""What is measured and what is wanted, as data: ``results/specs/kernels.toml``."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mqbench.harness.bench.catalog import CONTENDERS
from mqbench.harness.environment import ROOT
from mqbench.harness.errors import RequestError, UnknownNameError
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import INTEGER, Cell, canonical_json

SPEC = ROOT / "results" / "specs" / "kernels.toml"
FULL, QUICK, CHECK = "full", "quick", "check"
METHOD = "kernels"
SEED = 0

PEAKS = "kernel_peaks"
TASKS: Mapping[str, str] = MappingProxyType(
    {
        PEAKS: "measured peaks",
        "kernel_linear": "linear layers",
        "kernel_hadamard": "Hadamard transform",
        "kernel_fusion": "fused quantization",
        "kernel_attention": "AIFS attention",
    }
)
"""Tasks with their titles, in the order in which they are measured."""

SPEEDUP, COST, BANDWIDTH = "speedup", "cost", "bandwidth"
MEASURES = (SPEEDUP, COST, BANDWIDTH)
ANY_ROWS = 1 << 62


@dataclass(frozen=True)
class Case:
    """One shape at one number of rows: everything that is timed side by side.

    Attributes:
        task: A key of ``TASKS``.
        model: Name of the set of shapes.
        name: Of the layer, the width or the operation.
        rows: M, or the number of tokens.
        shape: The other sizes by name.
    """

    task: str
    model: str
    name: str
    rows: int
    shape: Mapping[str, int]

    @property
    def label(self) -> str:
        return f"{TASKS[self.task]}, {self.name}, {self.rows} row{'s' if self.rows > 1 else ''}"

    def cell(self, device: str, version: str, rounds: int) -> Cell:
        """The settings of its record; ``limit`` counts the timed rounds."""
        inputs = canonical_json({**asdict(self), "shape": dict(self.shape)})
        return Cell(
            model=self.model,
            weights_sha256=f"random:{SEED}",
            recipe=Recipe(METHOD, seed=SEED, options={"case": self.name, "rows": self.rows}),
            method_version=version,
            task=self.task,
            limit=rounds,
            data_sha256=hashlib.sha256(inputs.encode()).hexdigest(),
            calibration=None,
            device=device,
            dtype="bfloat16",
            batch_size=1,
            backend=INTEGER,
        )


@dataclass(frozen=True)
class Profile:
    """A choice of cases and how long each is timed.

    Attributes:
        cases: In the order in which they are measured.
        rounds: Samples of every contender.
        sample_ms: A sample lasts about as long as this, or one call where that takes longer.
    """

    cases: tuple[Case, ...]
    rounds: int
    sample_ms: float


@dataclass(frozen=True)
class Target:
    """What a contender has to reach.

    Attributes:
        title: For people.
        task: Where it is measured.
        contender: Who has to reach it.
        measure: One of ``MEASURES``.
        against: Compared with whom; empty for ``bandwidth``.
        at_least: Smallest value, or None.
        at_most: Largest value, or None.
        rows_min: From this number of rows on.
        rows_max: Up to this one.
        names: Cases that it holds for, all when empty.
    """

    title: str
    task: str
    contender: str
    measure: str
    against: str = ""
    at_least: float | None = None
    at_most: float | None = None
    rows_min: int = 1
    rows_max: int = ANY_ROWS
    names: tuple[str, ...] = ()

    def covers(self, task: str, name: str, rows: int) -> bool:
        right_name = not self.names or name in self.names
        return task == self.task and right_name and self.rows_min <= rows <= self.rows_max

    def is_met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def limit_text(self) -> str:
        """``>= 1.6x bf16 at 2048 rows and more``."""
        sign, limit = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        of = "% of the copy bandwidth" if self.measure == BANDWIDTH else f"x {self.against}"
        of += "'s time" if self.measure == COST else ""
        names = f" ({', '.join(self.names)})" if self.names else ""
        return f"{sign} {limit:g}{of if of.startswith('x') else ' ' + of}{self._rows_text()}{names}"

    def _rows_text(self) -> str:
        if self.rows_min == self.rows_max:
            return f" at M = {self.rows_min}"
        if self.rows_max == ANY_ROWS:
            return "" if self.rows_min == 1 else f" at M >= {self.rows_min}"
        return f" at M = {self.rows_min} to {self.rows_max}"


@cache
def load(path: Path = SPEC) -> Mapping[str, Any]:
    """The whole file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def profile(name: str, tasks: Collection[str] = tuple(TASKS)) -> Profile:
    """The cases of one profile, those of some tasks; peaks always come first, since percentages need them.

    Raises:
        UnknownNameError: no such task.
    """
    for task in tasks:
        if task not in TASKS:
            raise UnknownNameError("kernel task", task, TASKS)
    data = load()["profiles"][name]
    cases: list[Case] = []
    for task in TASKS:
        if task == PEAKS or task in tasks:
            cases += _cases(task, data)
    return Profile(tuple(cases), data["rounds"], data["sample_ms"])


def _cases(task: str, data: Mapping[str, Any]) -> Sequence[Case]:
    shapes = load()["sets"][data["set"]][task]
    names = data.get("names", {}).get(task, list(shapes))
    return [Case(task, data["set"], name, rows, shapes[name]) for name in names for rows in data["rows"][task]]


def targets() -> tuple[Target, ...]:
    """All targets in the order of the file.

    Raises:
        RequestError: a field is unknown or missing, there is no limit or two of them, or the measure is unknown.
        UnknownNameError: no such contender.
    """
    return tuple(_target(entry) for entry in load()["targets"])


def _target(entry: Mapping[str, Any]) -> Target:
    where = f"{SPEC.name}, target '{entry.get('title', '?')}'"
    unknown = entry.keys() - {item.name for item in fields(Target)}
    missing = {item.name for item in fields(Target) if item.default is MISSING} - entry.keys()
    if unknown or missing:
        raise RequestError(f"{where}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    target = Target(**{**entry, "names": tuple(entry.get("names", ()))})
    if (target.at_least is None) == (target.at_most is None) or target.measure not in MEASURES:
        raise RequestError(f"{where} needs one limit and a measure of {', '.join(MEASURES)}")
    for name in (target.contender, target.against) if target.measure != BANDWIDTH else (target.contender,):
        if name not in CONTENDERS:
            raise UnknownNameError("contender", name, CONTENDERS)
    return target
