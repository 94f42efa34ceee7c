"""What ``mqbench figure`` does, once its options are read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mqbench.harness.errors import FigureError
from mqbench.harness.figure import DATA_FORMAT, Picture, compose, known_figures, load_figure, to_csv, write
from mqbench.harness.select import parse_filters
from mqbench.harness.store import DEFAULT_OUT, prepare_folder
from mqbench.harness.sweep_records import load_records
from mqbench.harness.table_commands import ALL, RENDERED, SHIPPED

DEFAULT_FORMATS = ("png", "svg")


def run_figure(name: str, style: str | None, out: Path | None, where: Sequence[str], folder: Path | None) -> None:
    """Draws one figure or all into a folder, with data and caption, or prints the data.

    Args:
        name: Number or name of a figure, or ``all``; of all, those of sweeps without records are captions alone.
        style: ``png``, ``svg`` or ``pdf``; png and svg when None; ``csv`` prints the data of one figure.
        out: Folder of the records; by default ``runs`` for one figure and the shipped records for all.
        where: Filters, ``NAME=VALUE``.
        folder: Where files go; by default ``rendered`` beside the folder of the records.

    Raises:
        MQBenchError: there is no such figure or format, records are missing or do not fit, or the folder cannot be
            written. Figures that have records are drawn before a missing one is reported.
    """
    names = known_figures() if name == ALL else [_known(name)]
    source = out or (SHIPPED if name == ALL else DEFAULT_OUT)
    pictures, missing = _pictures(names, source, where, may_be_empty=name == ALL)
    if style == DATA_FORMAT:
        sys.stdout.writelines(to_csv(picture) for picture in pictures)
    elif pictures:
        target = folder or source.parent / RENDERED
        prepare_folder(target)
        formats = (style,) if style else DEFAULT_FORMATS
        files = [path for picture in pictures for path in write(picture, target, formats)]
        print(f"{len(files)} files: {target}")
    if missing:
        others = f"; also without records: {', '.join(list(missing)[1:])}" if len(missing) > 1 else ""
        raise FigureError(next(iter(missing.values())) + others)


def _pictures(
    names: Sequence[str], source: Path, where: Sequence[str], *, may_be_empty: bool
) -> tuple[list[Picture], dict[str, str]]:
    """Figures that have their records, and by name why the others have not."""
    records, filters = load_records(source), parse_filters(where)
    pictures: list[Picture] = []
    missing: dict[str, str] = {}
    for name in names:
        spec = load_figure(name)
        try:
            pictures.append(compose(records, spec, filters, may_be_empty=may_be_empty))
        except FigureError as error:
            missing[name] = str(error)
    return pictures, missing


def _known(name: str) -> str:
    known = known_figures()
    if not name.isdecimal() and name not in known:
        raise FigureError(f"'{name}' is no figure; give a number or '{ALL}'; known: {', '.join(known)}")
    return name
