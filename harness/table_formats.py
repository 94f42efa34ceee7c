"""How a table is printed: terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqbench.harness.table import Column, Entry, Frame

DASH = "-"
TEX_DASH = "--"
MIN_CAPTION_WIDTH = 60
UNLIMITED_WIDTH = 1000
CSV_SUFFIXES = {"measured": "", "text": "", "delta": " delta", "paper": " paper"}


def place(entry: Entry, column: Column, separator: str = " ", dash: str = DASH) -> str:
    """``measured (delta) [paper]``; parts that do not apply are left out, a missing measurement is a dash."""
    if column.text:
        return entry.text or dash
    parts = [entry.text or _number(entry.measured, column.precision, dash)]
    if entry.delta is not None:
        parts.append(f"({_signed(entry.delta, column.precision)})")
    if entry.paper is not None:
        parts.append(f"[{entry.paper:.{column.precision}f}]")
    return separator.join(parts)


def to_terminal(frame: Frame, width: int) -> str:
    """Box-drawing table; rows of one model and bit setting stand together. Never cut, however narrow the terminal."""
    lines = _terminal_lines(frame, " ")
    if max(map(len, lines)) > width:
        lines = _terminal_lines(frame, "\n")
    caption = textwrap.wrap(frame.caption, width=max(width, MIN_CAPTION_WIDTH))
    return "\n".join([*lines, *caption]) + "\n"


def _terminal_lines(frame: Frame, separator: str) -> list[str]:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for name in frame.spec.rows:
        table.add_column(name, no_wrap=True)
    for column in frame.spec.columns:
        table.add_column(column.header, justify="left" if column.text else "right", no_wrap=True)
    num_shared = frame.spec.num_group_labels
    before: tuple[str, ...] = ()
    for row in frame.rows:
        if before and before[:num_shared] != row.labels[:num_shared]:
            table.add_section()
        places = [
            place(entry, column, separator) for entry, column in zip(row.entries, frame.spec.columns, strict=True)
        ]
        table.add_row(*_without_repeats(row.labels, before, num_shared), *places)
        before = row.labels
    stream = io.StringIO()
    Console(file=stream, width=UNLIMITED_WIDTH, color_system=None, markup=False, highlight=False).print(table)
    return [line.strip("\n").rstrip() for line in stream.getvalue().strip("\n").splitlines()]


def _without_repeats(labels: tuple[str, ...], before: tuple[str, ...], num_shared: int) -> list[str]:
    """Labels with those of the first ``num_shared`` blanked that the row above shows already."""
    shared = 0
    while shared < num_shared and labels[: shared + 1] == before[: shared + 1]:
        shared += 1
    return [""] * shared + list(labels[shared:])


def to_markdown(frame: Frame, width: int = 0) -> str:
    columns = frame.spec.columns
    header = [*frame.spec.rows, *(column.header for column in columns)]
    lines = [header, ["---"] * len(frame.spec.rows) + ["---" if column.text else "---:" for column in columns]]
    for row in frame.rows:
        lines.append([*row.labels, *(place(*pair) for pair in zip(row.entries, columns, strict=True))])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{frame.caption}\n"


def to_latex(frame: Frame, width: int = 0) -> str:
    """A ``table`` environment with booktabs rules."""
    columns = frame.spec.columns
    alignment = "l" * len(frame.spec.rows) + "".join("l" if column.text else "r" for column in columns)
    lines = [
        r"\begin{table}",
        rf"\caption{{{_tex(frame.caption.removeprefix(f'Table {frame.spec.number}. '))}}}",  # LaTeX numbers it
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        _tex_line([*frame.spec.rows, *(column.header for column in columns)]),
        r"\midrule",
    ]
    for row in frame.rows:
        places = [place(entry, column, dash=TEX_DASH) for entry, column in zip(row.entries, columns, strict=True)]
        lines.append(_tex_line([*row.labels, *places]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def to_csv(frame: Frame, width: int = 0) -> str:
    """One column each for measured, delta and paper; no caption, so that programs can read it."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    header = list(frame.spec.rows)
    for column in frame.spec.columns:
        header += [column.header + CSV_SUFFIXES[value] for value in column.values]
    writer.writerow(header)
    for row in frame.rows:
        cells = list(row.labels)
        for entry, column in zip(row.entries, frame.spec.columns, strict=True):
            cells += [_csv_value(entry, column, value) for value in column.values]
        writer.writerow(cells)
    return stream.getvalue()


FORMATS: Mapping[str, Callable[[Frame, int], str]] = {
    "terminal": to_terminal,
    "md": to_markdown,
    "tex": to_latex,
    "csv": to_csv,
}


def _csv_value(entry: Entry, column: Column, name: str) -> str:
    if name == "text" or (name == "measured" and entry.text):
        return entry.text or DASH
    return _number(getattr(entry, name), column.precision, DASH)


def _number(value: float | None, precision: int, dash: str) -> str:
    return dash if value is None else f"{_rounded(value, precision):.{precision}f}"


def _signed(value: float, precision: int) -> str:
    return f"{_rounded(value, precision):+.{precision}f}"


def _rounded(value: float, precision: int) -> float:
    """Rounded, without a negative zero."""
    return round(value, precision) + 0.0


TEX_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _tex(text: str) -> str:
    return "".join(TEX_SPECIAL.get(character, character) for character in text)


def _tex_line(cells: list[str]) -> str:
    # Braces keep a place that starts with "[" from being read as the row's optional argument.
    escaped = [_tex(cell) for cell in cells]
    return " & ".join(f"{{{cell}}}" if cell.startswith("[") else cell for cell in escaped) + r" \\"
