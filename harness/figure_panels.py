"""From records to panels: which series of a probe stand in which panel, with axes and units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from math import sqrt
from types import MappingProxyType
from typing import Any

from mqbench.harness.errors import FigureError
from mqbench.harness.record import Record

Values = tuple[float, ...]


class Style(StrEnum):
    """How a panel's series are drawn."""

    LINE = "line"
    STEPS = "steps"
    BARS = "bars"
    STACK = "stack"


@dataclass(frozen=True)
class Series:
    """One curve, or one set of bars from ``low`` to ``y``. ``hue`` fixes its place in the palette."""

    label: str
    x: Values
    y: Values
    low: Values = ()
    hue: int | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: Above it, on one line or two.
        xlabel: With unit.
        ylabel: With unit.
        style: How its series are drawn.
        series: In the order of the legend.
        xscale: ``linear``, ``log`` or ``symlog``.
        yscale: The same.
        group: Panels of one group have equal y axes.
        start_of_clamped: From this x on the model makes images smaller; marked by a line.
    """

    title: str
    xlabel: str
    ylabel: str
    style: Style
    series: tuple[Series, ...]
    xscale: str = "linear"
    yscale: str = "linear"
    group: str = ""
    start_of_clamped: float | None = None

    @property
    def name(self) -> str:
        """Its title on one line: its name in the data file."""
        return self.title.replace("\n", " ")


Build = Callable[[Sequence[Record], str, Mapping[str, Any]], list[Panel]]
"""Takes records sorted by model, the part's title and its options."""


@dataclass(frozen=True)
class Builder:
    """Makes the panels of one kind from records of one task; a record that does not ``fit`` has nothing to show."""

    task: str
    build: Build
    fits: Callable[[Record, Mapping[str, Any]], bool] = lambda record, options: True


PLACES: Mapping[str, str] = MappingProxyType(
    {
        "block_in": "hidden states",
        "attention_in": "attention input",
        "attention_out": "attention output linear's input",
        "mlp_in": "MLP input",
        "mlp_out": "last linear's input",
    }
)
"""Titles of the places where ``activation_ranges`` measures."""

SHAPES: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "square": ("side_px", "tokens", "side of a square image (px)"),
        "wide": ("wide_width_px", "wide_tokens", "width of an image 448 px high (px)"),
    }
)
"""Image shapes of ``visual_tokens`` records: series of sizes and of counts, and the axis."""

MODALITIES = ("text", "visual")
CONDITIONS: Mapping[str, str] = MappingProxyType(
    {"original": "original", "fht": "after FHT", "rms": "after FHT, with RMS"}
)
TOWERS: Mapping[str, str] = MappingProxyType({"vision": "vision", "text": "LLM"})


def visual_tokens(records: Sequence[Record], title: str, options: Mapping[str, Any]) -> list[Panel]:
    """Prefill visual tokens over image size, a curve for each model (Fig. 1a, 9); equal curves are drawn once.

    Option ``shape``: ``square`` (the default) or ``wide``; ``yscale``.
    """
    size, tokens, xlabel = SHAPES[options.get("shape", "square")]
    labels: dict[tuple[Values, Values], list[str]] = {}
    for record in records:
        labels.setdefault((values_of(record, size), values_of(record, tokens)), []).append(record.cell.model)
    series = tuple(Series(", ".join(models), x, y) for (x, y), models in labels.items())
    return [Panel(title, xlabel, "visual tokens", Style.LINE, series, yscale=options.get("yscale", "linear"))]


def activation_ranges(records: Sequence[Record], title: str, options: Mapping[str, Any]) -> list[Panel]:
    """Smallest to largest activation in each LLM block, by modality (Fig. 1b). Option ``place``: see ``PLACES``."""
    place = options.get("place", "block_in")
    panels = []
    for record in records:
        series = tuple(_range(record, place, modality) for modality in MODALITIES)
        name = f"{title} {record.cell.model}: {PLACES[place]}".strip()
        panels.append(Panel(name, "LLM block", "activation (min to max)", Style.BARS, series, yscale="symlog"))
    return panels


def activation_histogram(records: Sequence[Record], title: str, options: Mapping[str, Any]) -> list[Panel]:
    """Share of activations per logarithmic bin in one LLM block, by modality. Options ``place``, ``block``."""
    place = options.get("place", "block_in")
    panels = []
    for record in records:
        block = options.get("block", 0)
        centers = _centers(values_of(record, "edges"))
        shares = {name: values_of(record, f"{place}.block{block}.{name}.share") for name in MODALITIES}
        kept = _seen_bins(list(shares.values()))
        series = tuple(
            Series(name, centers[kept], tuple(100 * share for share in values[kept])) for name, values in shares.items()
        )
        name = f"{title} {record.cell.model}: {PLACES[place]}, block {block}".strip()
        panels.append(Panel(name, "activation", "share of values (%)", Style.STEPS, series, xscale="symlog"))
    return panels


def weight_peaks(records: Sequence[Record], title: str, options: Mapping[str, Any]) -> list[Panel]:
    """Largest weight per input channel of one block's last linear, in three conditions (Fig. 6, 12)."""

    def panel(record: Record, tower: str, block: int, condition: str, hue: int) -> Panel:
        peaks = values_of(record, f"{tower}.block{block}.{condition}.channel_peak")
        step = values_of(record, f"{tower}.channels_per_group")[0]
        series = Series(CONDITIONS[condition], tuple(step * index for index in range(len(peaks))), peaks, hue=hue)
        name = _weight_title(title, record, tower, block, condition)
        group = f"{record.cell.model} {tower} peaks"
        return Panel(name, "input channel", "largest |weight|", Style.LINE, (series,), group=group)

    return _weight_panels(records, options, panel)


def weight_histograms(records: Sequence[Record], title: str, options: Mapping[str, Any]) -> list[Panel]:
    """Share of weights per bin of one block's last linear, in three conditions (Fig. 6)."""

    def panel(record: Record, tower: str, block: int, condition: str, hue: int) -> Panel:
        edges = values_of(record, f"{tower}.block{block}.edges")
        shares = values_of(record, f"{tower}.block{block}.{condition}.share")
        centers = tuple((low + high) / 2 for low, high in pairwise(edges))
        series = Series(CONDITIONS[condition], centers, tuple(100 * share for share in shares), hue=hue)
        name = _weight_title(title, record, tower, block, condition)
        group = f"{record.cell.model} {tower} shares"
        return Panel(name, "weight", "share of weights (%)", Style.STEPS, (series,), yscale="log", group=group)

    return _weight_panels(records, options, panel)


def values_of(record: Record, name: str) -> Values:
    """A stored series.

    Raises:
        FigureError: the record lacks it.
    """
    if name not in record.arrays:
        raise FigureError(f"the record of {record.cell.label} has no series '{name}'; run that cell again")
    return tuple(float(value) for value in record.arrays[name])


def _weight_panels(
    records: Sequence[Record], options: Mapping[str, Any], panel: Callable[[Record, str, int, str, int], Panel]
) -> list[Panel]:
    """A row of three panels for each record and tower.

    Options: ``towers``; ``block``: ``first``, ``middle`` (the default) or ``last``.
    """
    rows = []
    for record in records:
        for tower in _towers(record, options):
            block = _shown_block(record, tower, options.get("block", "middle"))
            rows += [panel(record, tower, block, name, hue) for hue, name in enumerate(CONDITIONS)]
    return rows


def _towers(record: Record, options: Mapping[str, Any]) -> list[str]:
    """Those wanted that the model has."""
    return [tower for tower in options.get("towers", ("vision",)) if f"{tower}.shown_blocks" in record.arrays]


def _has_towers(record: Record, options: Mapping[str, Any]) -> bool:
    return bool(_towers(record, options))


def _shown_block(record: Record, tower: str, which: str) -> int:
    """Distributions are stored for the first, the middle and the last block; tiny models have fewer."""
    blocks = [int(index) for index in values_of(record, f"{tower}.shown_blocks")]
    return {"first": blocks[0], "middle": blocks[len(blocks) // 2], "last": blocks[-1]}[which]


def _weight_title(title: str, record: Record, tower: str, block: int, condition: str) -> str:
    place = f"{record.cell.model}, {TOWERS[tower]} block {block}"
    return f"{title} {place}".strip() + f"\n{CONDITIONS[condition]}"


def _range(record: Record, place: str, modality: str) -> Series:
    high = values_of(record, f"{place}.{modality}.max")
    blocks = tuple(float(index) for index in range(len(high)))
    return Series(modality, blocks, high, values_of(record, f"{place}.{modality}.min"))


def _centers(edges: Values) -> Values:
    """Of logarithmic bins: geometric means; the open bins at both ends go on by the same step."""
    step = edges[-1] / edges[-2]
    inner = [0.0 if low < 0 < high else (1 if low > 0 else -1) * sqrt(low * high) for low, high in pairwise(edges)]
    return (inner[0] * step, *inner, inner[-1] * step)


def _seen_bins(shares: Sequence[Values]) -> slice:
    """From the first to the last bin in which any series has values, and one empty bin on each side."""
    seen = [index for index, values in enumerate(zip(*shares, strict=True)) if any(values)]
    return slice(max(seen[0] - 1, 0), seen[-1] + 2)


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "visual_tokens": Builder("visual_tokens", visual_tokens),
        "activation_ranges": Builder("activation_ranges", activation_ranges),
        "activation_histogram": Builder("activation_ranges", activation_histogram),
        "weight_peaks": Builder("weight_distribution", weight_peaks, _has_towers),
        "weight_histograms": Builder("weight_distribution", weight_histograms, _has_towers),
    }
)
"""Kinds of panels that a specification may name."""
