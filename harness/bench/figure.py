"""The figure: speedup over M with the roofline, a panel per linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mqbench.harness.bench.catalog import CONTENDERS
from mqbench.harness.bench.render import NOTHING
from mqbench.harness.bench.report import Entry, Report
from mqbench.harness.figure import CAPTION_SUFFIX, FigureSpec, Picture, write
from mqbench.harness.figure_panels import Panel, Series, Style

STEM = "kernels_speedup"
FORMATS = ("png", "svg")
TASK, BASELINE = "kernel_linear", "bf16"
DRAWN = ("w8a8", "w4a8", "w4a16", "fp8", "int_mm", "tinygemm", "torchao", "gemlite")
ROOFLINES = ("w8a8", "w4a8")
"""Contenders whose bound is drawn: the baseline's roofline time over theirs, at the measured peaks."""

COLUMNS = 3
NOTE = (
    "Speedup: time of BF16 (cuBLAS) over time, by number of rows M. Rooflines: the same of the times that bytes and "
    "operations take at the peaks measured in the same run; BF16 itself may stay below its own, so that a speedup can "
    "exceed the roofline"
)


@dataclass(frozen=True)
class KernelFigure(FigureSpec):
    """A figure of ours, with a name in place of a number of the paper."""

    @property
    def stem(self) -> str:
        return STEM


def write_figure(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Writes drawing, data and caption; without reports only a caption that says that nothing was measured."""
    panels = [panel for report in reports for panel in _panels(report)]
    if not panels:
        path = folder / f"{STEM}{CAPTION_SUFFIX}"
        path.write_text(f"Speedup of the kernels over M. {NOTHING}\n", encoding="utf-8")
        return [path]
    spec = KernelFigure(number=0, title="", parts=(), columns=COLUMNS)
    devices = ", ".join(f"{report.device} (code version {report.version})" for report in reports)
    caption = f"Speedup of linear layers over BF16, with the roofline, on {devices}. {NOTE}.\n"
    return write(Picture(spec, tuple(panels), caption), folder, FORMATS)


def _panels(report: Report) -> list[Panel]:
    entries = [entry for entry in report.entries if entry.task == TASK and entry.time_ms is not None]
    panels = []
    for case in dict.fromkeys(entry.case for entry in entries):
        own = [entry for entry in entries if entry.case == case]
        series = [_measured(own, name) for name in DRAWN]
        series += [_roofline(report, own, name) for name in ROOFLINES]
        shown = tuple(one for one in series if one.x)
        title = f"{report.device}: {case}"
        panels.append(Panel(title, "M (rows)", "speedup over BF16", Style.LINE, shown, xscale="log"))
    return panels


def _measured(entries: Sequence[Entry], name: str) -> Series:
    points = sorted((entry.rows, entry.ratio) for entry in entries if entry.contender == name)
    x, y = [float(rows) for rows, _ in points], [ratio for _, ratio in points]
    return Series(CONTENDERS[name].title, tuple(x), tuple(y), hue=DRAWN.index(name))


def _roofline(report: Report, entries: Sequence[Entry], name: str) -> Series:
    floors = {(entry.contender, entry.rows): report.floor_ms(entry) for entry in entries}
    points = []
    for (contender, rows), floor in sorted(floors.items()):
        base = floors.get((BASELINE, rows))
        if contender == name and floor and base:
            points.append((rows, base / floor))
    x, y = tuple(float(rows) for rows, _ in points), tuple(value for _, value in points)
    return Series(f"roofline of {CONTENDERS[name].title}", x, y, hue=len(DRAWN) + ROOFLINES.index(name))
