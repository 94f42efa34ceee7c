"""Tables from records: a declared specification, measured values, deltas to float and the paper's figures.

Rendering never runs a model. A value that was not measured prints as a dash, never as zero.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqbench.harness import table_formats
from mqbench.harness.environment import ROOT
from mqbench.harness.errors import TableError
from mqbench.harness.record import Backend, Record
from mqbench.harness.select import FLOAT_METHOD, select
from mqbench.harness.sources import FOLDER_MARK

SPECS = ROOT / "results" / "specs"
PAPER = ROOT / "results" / "paper"
BACKENDS = {Backend.SIMULATED: "simulated (quantize-dequantize)", Backend.REAL: "integer kernels"}
STANDIN_PREFIX = "standin"
STANDIN_NOTE = " (a synthetic stand-in: no evidence about real checkpoints)"

Scores = Mapping[str, float]
"""Scores of one row by task."""


@dataclass(frozen=True)
class Column:
    """One column of figures: a benchmark's score, or a named formula over the row.

    Attributes:
        header: As printed.
        task: Benchmark whose score stands here; empty for a formula.
        formula: A key of ``FORMULAS``; empty for a benchmark.
        paper: Column of the paper's CSV file; empty when the paper has none.
        scale: Factor from the benchmark's scale to the printed one.
        precision: Decimals.
    """

    header: str
    task: str = ""
    formula: str = ""
    paper: str = ""
    scale: float = 1.0
    precision: int = 2


@dataclass(frozen=True)
class TableSpec:
    """A table as data (one TOML file in ``results/specs``).

    Attributes:
        number: Of the paper's table.
        title: First words of the caption.
        rows: Settings that name a row, from left to right.
        columns: Figures, from left to right.
        value: What of a record is shown: ``score`` or the name of a metric.
        filters: Setting -> wanted value or list of values.
        order: Setting -> values in printing order; others follow alphabetically.
        paper: CSV file in ``results/paper``; empty when the paper has none.
    """

    number: int
    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    value: str = "score"
    filters: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Sequence[str]] = field(default_factory=dict)
    paper: str = ""


@dataclass(frozen=True)
class Entry:
    """One place of a table; None where nothing is known. ``delta`` is measured minus float."""

    measured: float | None
    delta: float | None = None
    paper: float | None = None


@dataclass(frozen=True)
class Row:
    labels: tuple[str, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Frame:
    """A table before it is printed."""

    spec: TableSpec
    rows: tuple[Row, ...]
    caption: str


def recovery(scores: Scores, reference: Scores) -> float | None:
    """Mean over the benchmarks of score / float score, in percent.

    None when the row lacks a benchmark that the float baseline has, or a float score is zero.
    """
    if not reference or not reference.keys() <= scores.keys() or not all(reference.values()):
        return None
    return 100 * sum(scores[task] / value for task, value in reference.items()) / len(reference)


FORMULAS: Mapping[str, Callable[[Scores, Scores], float | None]] = {"recovery": recovery}
"""Derived columns: from the row's scores and the scores of the same model in floating point."""


def load_spec(number: int, folder: Path = SPECS) -> TableSpec:
    """Reads ``tableNN.toml``.

    Raises:
        TableError: there is none, or it names an unknown field or formula.
    """
    path = folder / f"table{number:02d}.toml"
    if not path.is_file():
        known = ", ".join(str(int(found.stem[5:])) for found in sorted(folder.glob("table*.toml")))
        raise TableError(f"table {number} has no specification; known: {known}")
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        columns = tuple(Column(**column) for column in data.pop("columns"))
        spec = TableSpec(**{**data, "rows": tuple(data["rows"]), "columns": columns})
    except (TypeError, KeyError) as error:
        raise TableError(f"{path.name}: {error}") from error
    unknown = sorted({column.formula for column in columns} - FORMULAS.keys() - {""})
    if unknown:
        raise TableError(f"{path.name}: unknown formula '{unknown[0]}'; known: {', '.join(sorted(FORMULAS))}")
    return spec


def render(
    records: Iterable[Record],
    spec: TableSpec,
    style: str = "terminal",
    filters: Mapping[str, Any] | None = None,
    width: int = 120,
) -> str:
    """The table as text.

    Args:
        records: In the order written; the newest of each cell counts.
        spec: What to show.
        style: ``terminal``, ``md``, ``tex`` or ``csv``.
        filters: In addition to the specification's.
        width: Columns of the terminal.

    Raises:
        TableError: unknown style, no record to show, or records with different settings.
    """
    if style not in table_formats.FORMATS:
        raise TableError(f"unknown format '{style}'; known: {', '.join(table_formats.FORMATS)}")
    return table_formats.FORMATS[style](build(records, spec, filters or {}), width)


def build(records: Iterable[Record], spec: TableSpec, filters: Mapping[str, Any] | None = None) -> Frame:
    """Selects, arranges and computes.

    Raises:
        TableError: no record to show, or records with different settings.
    """
    tasks = {column.task for column in spec.columns}
    chosen = [record for record in select(records, {**spec.filters, **(filters or {})}) if record.cell.task in tasks]
    if not chosen:
        raise TableError(
            f"no ok record for table {spec.number}; run 'mqbench eval' first, or give its folder with --out"
        )
    scores: dict[tuple[str, ...], dict[str, float]] = {}
    for record in chosen:
        scores.setdefault(_labels(record, spec.rows), {})[record.cell.task] = _value(record, spec.value)
    references = {record.cell.model: _labels(record, spec.rows) for record in chosen if _is_float(record)}
    models = {_labels(record, spec.rows): base_model(record.cell.model) for record in chosen}
    paper = paper_figures(spec)
    rows = []
    for labels in sorted(scores, key=lambda labels: _sort_key(labels, spec)):
        reference = references.get(models[labels], ())
        rows.append(_row(spec, labels, scores[labels], {} if reference == labels else scores.get(reference, {}), paper))
    return Frame(spec, tuple(rows), caption(chosen, spec))


def paper_figures(spec: TableSpec, folder: Path = PAPER) -> dict[tuple[str, str, str], dict[str, float]]:
    """The paper's figures by (model, bits, method), on the paper's scale; empty places are left out."""
    if not spec.paper:
        return {}
    figures = {}
    with (folder / spec.paper).open(encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            bits = _paper_bits(line["visual_bits"], line["llm_bits"])
            values = {column.paper: line[column.paper] for column in spec.columns if column.paper}
            figures[line["model"], bits, line["method"]] = {name: float(text) for name, text in values.items() if text}
    return figures


def caption(records: Sequence[Record], spec: TableSpec) -> str:
    """What a reader must know: models, device, arithmetic, calibration, rows evaluated, and how to read a place."""
    models = sorted({record.cell.model for record in records})
    named = [f"{name}{STANDIN_NOTE if name.startswith(STANDIN_PREFIX) else ''}" for name in models]
    cell = records[0].cell
    backends = sorted({BACKENDS[record.backend] for record in records if not _is_float(record)})
    parts = [
        f"Table {spec.number}. {spec.title}",
        f"Models: {', '.join(named)}",
        f"Device: {cell.device}, {cell.dtype}" + (f"; quantized layers: {', '.join(backends)}" if backends else ""),
        f"Calibration: {_calibration_text(records)}",
        "Rows per benchmark: all" if cell.limit is None else f"Rows per benchmark: at most {cell.limit}",
        "Each place: measured (delta to float) [paper]; -: not measured",
    ]
    return ". ".join(parts) + "."


def _calibration_text(records: Sequence[Record]) -> str:
    found = {record.cell.calibration for record in records if record.cell.calibration is not None}
    texts = [
        f"{info.num_samples} samples of {info.dataset}, split {info.split}, seed {info.seed}, sha256 {info.sha256[:12]}"
        for info in found
    ]
    return "; ".join(sorted(texts)) or "none"


def _row(
    spec: TableSpec,
    labels: tuple[str, ...],
    scores: Scores,
    reference: Scores,
    paper: Mapping[tuple[str, str, str], Mapping[str, float]],
) -> Row:
    named = dict(zip(spec.rows, labels, strict=True))
    printed = paper.get((base_model(named.get("model", "")), named.get("bits", ""), named.get("method", "")), {})
    return Row(labels, tuple(_entry(column, scores, reference, printed) for column in spec.columns))


def _entry(column: Column, scores: Scores, reference: Scores, printed: Mapping[str, float]) -> Entry:
    if column.formula:
        value = FORMULAS[column.formula](scores, reference)
        return Entry(None if value is None else value * column.scale)
    measured = scores.get(column.task)
    base = reference.get(column.task)
    return Entry(
        measured=None if measured is None else measured * column.scale,
        delta=None if measured is None or base is None else (measured - base) * column.scale,
        paper=printed.get(column.paper),
    )


def base_model(name: str) -> str:
    """``standin-qwen2-vl`` also for the quantized folder ``standin-qwen2-vl@FOLDER``."""
    return name.partition(FOLDER_MARK)[0]


def _labels(record: Record, rows: Sequence[str]) -> tuple[str, ...]:
    cell = record.cell
    known = {"model": cell.model, "bits": cell.recipe.bits, "method": cell.recipe.method, "seed": str(cell.recipe.seed)}
    return tuple(known[name] for name in rows)


def _value(record: Record, name: str) -> float:
    if name == "score" and record.score is not None:
        return record.score
    if name not in record.metrics:
        raise TableError(f"{record.cell.label}: no metric '{name}'; it has: {', '.join(sorted(record.metrics))}")
    return record.metrics[name]


def _sort_key(labels: tuple[str, ...], spec: TableSpec) -> tuple[tuple[int, str], ...]:
    key = []
    for name, label in zip(spec.rows, labels, strict=True):
        order = list(spec.order.get(name, ()))
        key.append((order.index(label) if label in order else len(order), label))
    return tuple(key)


def _paper_bits(visual: str, llm: str) -> str:
    """The paper's spelling as ours: ``BF16`` is ``float``."""
    ours = ["float" if bits == "BF16" else bits.lower() for bits in (visual, llm)]
    return "/".join(ours)


def _is_float(record: Record) -> bool:
    return record.cell.recipe.method == FLOAT_METHOD
