"""What ``mqbench table`` and ``mqbench paper`` do, once their options are read."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mqbench.harness import paper_check
from mqbench.harness.environment import ROOT
from mqbench.harness.errors import RequestError
from mqbench.harness.record import Record
from mqbench.harness.select import parse_filters
from mqbench.harness.store import DEFAULT_OUT, prepare_folder
from mqbench.harness.sweep_records import load_records
from mqbench.harness.table import load_spec, render, spec_numbers

ALL = "all"
STYLES = ("md", "tex", "csv")
PAPER_CHECK_STYLES = ("md", "csv")
SHIPPED = ROOT / "results" / "records"
RENDERED = "rendered"


def run_table(name: str, style: str, out: Path | None, where: Sequence[str], folder: Path | None, width: int) -> None:
    """Prints one table, or renders all of them into a folder.

    Args:
        name: Number of a table, or ``all``.
        style: Form of one table.
        out: Folder of the records; by default ``runs`` for one table and the shipped records for all.
        where: Filters, ``NAME=VALUE``.
        folder: Where all tables go; by default ``rendered`` beside the folder of the records.
        width: Columns of the terminal.

    Raises:
        MQBenchError: there is no such table, the records do not fit into one, or the folder cannot be written.
    """
    if name != ALL and not name.isdigit():
        raise RequestError(f"'{name}' is no table; give a number or '{ALL}'; known: {_known()}")
    if name != ALL:
        spec = load_spec(int(name))
        sys.stdout.write(render(load_records(out or DEFAULT_OUT), spec, style, parse_filters(where), width))
        return
    source = out or SHIPPED
    target = folder or source.parent / RENDERED
    files = render_all(load_records(source), where)
    prepare_folder(target)
    for file, text in files.items():
        (target / file).write_text(text, encoding="utf-8")
    print(f"{len(files)} files: {target}")


def render_all(records: Sequence[Record], where: Sequence[str] = ()) -> Mapping[str, str]:
    """Every table in every form for files, and the check of the paper: text by file name.

    Raises:
        TableError: the records do not fit into a table.
    """
    filters = parse_filters(where)
    specs = {number: load_spec(number) for number in spec_numbers()}
    files = {
        f"table{number:02d}.{style}": render(records, spec, style, filters, may_be_empty=True)
        for number, spec in specs.items()
        for style in STYLES
    }
    return files | _paper_check_files()


def run_paper_check(style: str, everything: bool, width: int) -> None:
    """Lists the paper's derived numbers that do not follow from the numbers beside them.

    Raises:
        TableError: unknown style, or a rule that fits no row.
    """
    sys.stdout.write(paper_check.render(paper_check.check(), style, everything=everything, width=width))


def _paper_check_files() -> dict[str, str]:
    """The list of what does not follow for people, all numbers for programs."""
    findings = paper_check.check()
    return {
        f"paper_check.{style}": paper_check.render(findings, style, everything=style == "csv")
        for style in PAPER_CHECK_STYLES
    }


def _known() -> str:
    return ", ".join(map(str, spec_numbers()))
