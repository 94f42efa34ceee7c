"""Drawing: matplotlib's Agg backend, one style for print, the same bytes for the same data and libraries."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import pairwise
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mqbench.harness.figure_panels import Panel, Series, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mqbench.harness.figure import Picture

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's palette: told apart with every common kind of colour blindness."""

MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
NUM_MARKERS = 8
MARKER_STEPS = 8
"""About how many markers a curve has, and by how many points those of different curves are shifted at most."""

MANY = 4
"""With more curves than this the legend stands beside the axes, as it does where bars would be under it."""

LEGEND_CHARACTERS = 26
BAR_WIDTH = 0.38
STACK_WIDTH = 0.8
"""Of the smallest distance between two stacks."""

SYMLOG_START = 2.0**-8
SYMLOG_TICKS = (-1000, -100, -10, -1, -0.1, 0, 0.1, 1, 10, 100, 1000)
PNG_DPI = 200

RC: Mapping[str, Any] = MappingProxyType(
    {
        "font.family": "DejaVu Sans",
        "font.size": 7,
        "axes.titlesize": 7.5,
        "axes.labelsize": 7,
        "legend.fontsize": 6.5,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.3,
        "grid.color": "#cccccc",
        "lines.linewidth": 1.0,
        "lines.markersize": 3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": True,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,
        "svg.hashsalt": "mqbench",
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
    }
)

METADATA: Mapping[str, Mapping[str, None]] = MappingProxyType(
    {
        ".png": {"Software": None},
        ".svg": {"Date": None, "Creator": None},
        ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
)
"""Dates and versions left out, so that equal data gives equal files."""


def draw(picture: Picture) -> Figure:
    """The figure, ready to be looked at or saved."""
    from matplotlib.figure import Figure

    spec = picture.spec
    columns = min(spec.columns, len(picture.panels))
    rows = ceil(len(picture.panels) / columns)
    with _style():
        figure = Figure(figsize=(spec.width_in, rows * spec.row_height_in), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        places = list(grid.flat)
        for panel, axes in zip(picture.panels, places, strict=False):
            _draw_panel(panel, axes)
        for axes in places[len(picture.panels) :]:
            axes.remove()
        _equal_groups(picture.panels, places, columns)
        _legends(picture.panels, places)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the suffix, without dates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with _style():
        figure.savefig(path, dpi=PNG_DPI, metadata=dict(METADATA[path.suffix]))


def _style() -> AbstractContextManager[None]:
    import matplotlib

    settings: Any = dict(RC)
    return matplotlib.rc_context(settings)


def _draw_panel(panel: Panel, axes: Axes) -> None:
    for position, series in enumerate(panel.series):
        hue = position if series.hue is None else series.hue
        if panel.style is Style.BARS:
            _bars(series, axes, hue, position - (len(panel.series) - 1) / 2)
        elif panel.style is Style.STACK:
            _bars(series, axes, hue, 0.0, _stack_width(panel))
        elif panel.style is Style.STEPS:
            axes.plot(series.x, series.y, color=_color(hue), label=series.label, drawstyle="steps-mid")
        else:
            axes.plot(series.x, series.y, color=_color(hue), label=series.label, **_line_style(panel, hue))
    axes.set_title(panel.title, loc="left")
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    _scale(axes, panel)
    if panel.start_of_clamped is not None:
        axes.axvline(panel.start_of_clamped, color="black", linewidth=0.5, linestyle=":")


def _bars(series: Series, axes: Axes, hue: int, offset: float, width: float = BAR_WIDTH) -> None:
    """Bars from ``low`` to ``y``, beside those of the other series or on top of them."""
    centers = [x + offset * width for x in series.x]
    heights = [high - low for high, low in zip(series.y, series.low, strict=True)]
    axes.bar(centers, heights, width, list(series.low), color=_color(hue), label=series.label)


def _stack_width(panel: Panel) -> float:
    places = sorted({x for series in panel.series for x in series.x})
    return STACK_WIDTH * min((right - left for left, right in pairwise(places)), default=1.0)


def _scale(axes: Axes, panel: Panel) -> None:
    """Scales, ticks and limits: linear axes start at zero unless a curve lies below; bars have a line there."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

    if panel.style is Style.BARS:
        axes.use_sticky_edges = False  # else the longest bar ends on the frame, as if it were cut
        axes.set_yscale(panel.yscale, **({"linthresh": 1.0} if panel.yscale == "symlog" else {}))
        axes.axhline(0, color="black", linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    axes.set_yscale(panel.yscale)
    if panel.yscale == "linear" and all(y >= 0 for series in panel.series for y in series.y):
        axes.set_ylim(bottom=0)
    elif panel.style is Style.LINE:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if panel.xscale == "symlog":
        axes.set_xscale("symlog", linthresh=SYMLOG_START, linscale=0.3)
        axes.xaxis.set_major_locator(FixedLocator(SYMLOG_TICKS))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    elif panel.xscale == "log":
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _equal_groups(panels: tuple[Panel, ...], places: list[Axes], columns: int) -> None:
    """The same y limits within a group, and one label for those that stand side by side."""
    for name in {panel.group for panel in panels if panel.group}:
        members = [axes for panel, axes in zip(panels, places, strict=False) if panel.group == name]
        lows, highs = zip(*(axes.get_ylim() for axes in members), strict=True)
        for axes in members:
            axes.set_ylim(min(lows), max(highs))
    for position, (left, right) in enumerate(pairwise(panels), start=1):
        if right.group and right.group == left.group and position % columns:
            places[position].set_ylabel("")


def _legends(panels: tuple[Panel, ...], places: list[Axes]) -> None:
    """One for every set of labels, in the first panel that has it; none where a title says it all."""
    shown = set()
    for panel, axes in zip(panels, places, strict=False):
        labels = tuple(series.label for series in panel.series)
        if len(labels) > 1 and labels not in shown:
            shown.add(labels)
            beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
            inside = {"loc": "best", "ncols": ceil(len(labels) / 2)}
            legend = axes.legend(**(beside if len(labels) > MANY or panel.style is Style.STACK else inside))
            for text in legend.get_texts():
                text.set_text("\n".join(textwrap.wrap(text.get_text(), LEGEND_CHARACTERS)))


def _line_style(panel: Panel, hue: int) -> dict[str, Any]:
    if len(panel.series) == 1:
        return {}
    points = max(len(series.x) for series in panel.series)
    return {
        "marker": MARKERS[hue % len(MARKERS)],
        "markevery": (hue % MARKER_STEPS, max(points // NUM_MARKERS, 1)),
        "linestyle": DASHES[hue // len(COLORS) % len(DASHES)],
    }


def _color(hue: int) -> str:
    return COLORS[hue % len(COLORS)]
