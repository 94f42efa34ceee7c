"""Figures from records: a declared specification, panels of series, a data file per figure, and a caption.

No model runs here. What is drawn stands in ``figureNN.csv`` too: pixels differ between machines, its figures do not.
"""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqbench.harness.environment import ROOT
from mqbench.harness.errors import FigureError
from mqbench.harness.figure_panels import BUILDERS as PANEL_BUILDERS
from mqbench.harness.figure_panels import Panel
from mqbench.harness.figure_sweeps import SWEEP_BUILDERS
from mqbench.harness.probe_values import SIGNIFICANT_DIGITS
from mqbench.harness.record import Record
from mqbench.harness.select import check_scopes, select, the_only
from mqbench.harness.sweep_records import is_sweep, measured_points
from mqbench.harness.table_caption import MEASURE_COMMAND, STANDIN_NOTE, STANDIN_PREFIX, sweep_command, sweep_facts
from mqbench.harness.tasks import TaskKind, task_info

SPECS = ROOT / "results" / "specs"
VARYING = ("device", "dtype", "batch_size", "limit")
"""Settings in which the models of a figure may differ: no panel compares their values. The caption names them."""

IMAGE_FORMATS = ("png", "svg", "pdf")
DATA_FORMAT = "csv"
CAPTION_SUFFIX = ".txt"

BUILDERS = {**PANEL_BUILDERS, **SWEEP_BUILDERS}
"""Kinds of panels that a specification may name."""


@dataclass(frozen=True)
class Part:
    """Some panels of a figure, made of the records of one task.

    Attributes:
        kind: A key of ``BUILDERS``.
        title: Before the panels' own titles.
        filters: Setting -> wanted value or list of values.
        options: Of the builder.
    """

    kind: str
    title: str = ""
    filters: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FigureSpec:
    """A figure as data (one TOML file in ``results/specs``).

    Attributes:
        number: Of the paper's figure; 0 for one that only we have.
        title: First sentence of the caption.
        parts: In reading order.
        note: How to read it.
        columns: Panels side by side.
        width_in: Printed width in inches; ACM's text block is 7 wide, one column 3.33.
        row_height_in: Height of a row of panels in inches.
        name: Of a figure without a number.
    """

    number: int
    title: str
    parts: tuple[Part, ...]
    note: str = ""
    columns: int = 1
    width_in: float = 7.0
    row_height_in: float = 2.2
    name: str = ""

    @property
    def stem(self) -> str:
        return _stem(self.name or str(self.number))

    @property
    def heading(self) -> str:
        return self.title if self.name else f"Figure {self.number}. {self.title}"

    @property
    def sweeps(self) -> frozenset[str]:
        """Tasks of its parts that are sweeps."""
        return frozenset(filter(is_sweep, (BUILDERS[part.kind].task for part in self.parts)))


@dataclass(frozen=True)
class Picture:
    """A figure before it is drawn."""

    spec: FigureSpec
    panels: tuple[Panel, ...]
    caption: str


def known_figures(folder: Path = SPECS) -> list[str]:
    """Numbers and names of all figures with a specification."""
    names = [path.stem.removeprefix("figure").lstrip("_") for path in sorted(folder.glob("figure*.toml"))]
    return [str(int(name)) if name.isdecimal() else name for name in names]


def load_figure(name: str | int, folder: Path = SPECS) -> FigureSpec:
    """Reads ``figureNN.toml`` or ``figure_NAME.toml``.

    Raises:
        FigureError: there is none, or it names an unknown field or kind.
    """
    path = folder / f"{_stem(str(name))}.toml"
    if not path.is_file():
        raise FigureError(f"figure {name} has no specification; known: {', '.join(known_figures(folder))}")
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        spec = FigureSpec(**{**data, "parts": tuple(Part(**part) for part in data["parts"])})
    except (TypeError, KeyError) as error:
        raise FigureError(f"{path.name}: {error}") from error
    for part in spec.parts:
        if part.kind not in BUILDERS:
            raise FigureError(f"{path.name}: unknown kind '{part.kind}'; known: {', '.join(BUILDERS)}")
    return spec


def _stem(name: str) -> str:
    return f"figure{int(name):02d}" if name.isdecimal() else f"figure_{name}"


def compose(
    records: Iterable[Record],
    spec: FigureSpec,
    filters: Mapping[str, Any] | None = None,
    *,
    may_be_empty: bool = False,
) -> Picture:
    """Selects records and arranges their series.

    Args:
        records: In the order written; the newest of each cell counts.
        spec: What to show.
        filters: In addition to the specification's.
        may_be_empty: A figure of sweeps may lack parts; its caption says what was not measured.

    Raises:
        FigureError: a part has no record, or a record lacks a series.
        TableError: records with different settings.
    """
    known = list(records)
    panels: list[Panel] = []
    used: dict[str, Record] = {}
    for part in spec.parts:
        part_is_sweep = is_sweep(BUILDERS[part.kind].task)
        chosen = (_points if part_is_sweep else _chosen)(known, part, filters or {})
        made = BUILDERS[part.kind].build(chosen, part.title, part.options) if chosen else []
        if not made and not (part_is_sweep and may_be_empty):
            raise _missing(spec, part)
        used |= {record.cell.key: record for record in chosen}
        panels += made
    return Picture(spec, tuple(panels), caption(list(used.values()), spec))


def _missing(spec: FigureSpec, part: Part) -> FigureError:
    task = BUILDERS[part.kind].task
    command = sweep_command(task) if is_sweep(task) else MEASURE_COMMAND
    return FigureError(
        f"figure {spec.name or spec.number} needs an ok record of task '{task}'; run '{command}' first, or give "
        "the folder of its records with --out"
    )


def _points(records: Sequence[Record], part: Part, filters: Mapping[str, Any]) -> list[Record]:
    return measured_points(records, {BUILDERS[part.kind].task}, {**part.filters, **filters})


def _chosen(records: Sequence[Record], part: Part, filters: Mapping[str, Any]) -> list[Record]:
    """One record per model, by name of the model.

    Of float records that differ in their calibration set alone, which ``select`` ignores, the largest set's counts.
    """
    builder = BUILDERS[part.kind]
    of_task = [record for record in records if record.cell.task == builder.task]
    chosen = select(of_task, {**part.filters, **filters})
    chosen = [record for record in chosen if builder.fits(record, part.options)]
    check_scopes(chosen, VARYING)
    by_model: dict[str, list[Record]] = {}
    for record in sorted(chosen, key=_num_calibration_samples, reverse=True):
        by_model.setdefault(record.cell.model, []).append(record)
    kept = (the_only(by_model[model]) for model in sorted(by_model))
    return [record for record in kept if record is not None]


def _num_calibration_samples(record: Record) -> int:
    return 0 if record.cell.calibration is None else record.cell.calibration.num_samples


def caption(records: Sequence[Record], spec: FigureSpec) -> str:
    """What a reader must know: models, device, calibration, and how to read the panels."""
    sweeps = [record for record in records if is_sweep(record.cell.task)]
    records = [record for record in records if not is_sweep(record.cell.task)]
    models = sorted({record.cell.model for record in records})
    named = [f"{name}{STANDIN_NOTE if name.startswith(STANDIN_PREFIX) else ''}" for name in models]
    measured = [record.cell for record in records if task_info(record.cell.task).kind is not TaskKind.BLUEPRINT]
    devices = sorted({f"{cell.device}, {cell.dtype}" for cell in measured})
    sets = {cell.calibration for cell in measured if cell.calibration is not None}
    drawn = sorted(f"{info.num_samples} samples of {info.dataset}, {info.split}, seed {info.seed}" for info in sets)
    sentences = [
        spec.heading,
        f"Models: {', '.join(named)}" if named else "",
        f"Measured on: {'; '.join(devices)}" if devices else "",
        f"Activations over: {'; '.join(drawn)}" if drawn else "",
        "" if len(measured) == len(records) else "Token counts follow from configurations; nothing ran for them",
        *(sweep_facts(sweeps, spec.sweeps) if spec.sweeps else []),
        spec.note,
    ]
    return " ".join(f"{sentence.rstrip('.')}." for sentence in sentences if sentence) + "\n"


def to_csv(picture: Picture) -> str:
    """Everything drawn, one point a line: panel from left to right and down, series, x, y and a bar's lower end."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["panel", "title", "series", "x", "y", "low"])
    for number, panel in enumerate(picture.panels, start=1):
        for series in panel.series:
            lows: Sequence[float | None] = series.low or [None] * len(series.x)
            for x, y, low in zip(series.x, series.y, lows, strict=True):
                writer.writerow([number, panel.name, series.label, _number(x), _number(y), _number(low)])
    return stream.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.{SIGNIFICANT_DIGITS}g}"


def write(picture: Picture, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Writes ``figureNN`` in each format, its data (csv) and its caption (txt); returns what was written.

    Of a figure without panels there is only the caption.

    Raises:
        FigureError: an unknown format.
    """
    from mqbench.harness.figure_draw import draw, save

    for name in formats:
        if name not in IMAGE_FORMATS:
            raise FigureError(f"unknown format '{name}'; known: {', '.join((*IMAGE_FORMATS, DATA_FORMAT))}")
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / picture.spec.stem
    data, words = base.with_suffix(f".{DATA_FORMAT}"), base.with_suffix(CAPTION_SUFFIX)
    words.write_text(picture.caption, encoding="utf-8")
    if not picture.panels:
        return [words]
    data.write_text(to_csv(picture), encoding="utf-8")
    drawing = draw(picture)
    images = [base.with_suffix(f".{name}") for name in formats]
    for path in images:
        save(drawing, path)
    return [*images, data, words]
