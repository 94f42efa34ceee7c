"""Panels of sweeps over the image size: gains of one system over others, and figures of a system stacked by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mqbench.harness.figure_panels import Builder, Panel, Series, Style
from mqbench.harness.record import Record
from mqbench.harness.select import check_scopes, settings_of, the_only
from mqbench.harness.sweep_records import UNSPECIFIC, VARYING, is_clamped, to_compare
from mqbench.harness.table_formulas import COMPARISONS

SIZE = "options.image_px"
SIZE_LABEL = "side of a square image (px)"
GIB = 2.0**30

Group = Mapping[float, Record]
"""The points of one model on one device: a record by image side."""

TIME_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "part:vision gemm_ms": "vision linear layers",
        "part:vision attention_ms": "vision attention",
        "part:projector_ms": "projector",
        "part:llm gemm_ms": "LLM linear layers",
        "part:llm attention_ms": "LLM attention",
        "part:quantize and norm_ms": "quantize and norm",
        "part:other_ms": "other",
        "launch_gap_ms": "launch gaps",
    }
)
MEMORY_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "weights_bytes": "weights",
        "activations_bytes": "activations",
        "kv_cache_bytes": "KV cache",
        "workspace_bytes": "workspace",
    }
)
"""Figures of a system that add up, with their names in the legend; from the bottom up."""


def gains(records: Sequence[Record], title: str, options: Mapping[str, Any]) -> list[Panel]:
    """Old / new - 1 in percent, a curve for each old system, a panel for each model and device.

    Options: ``new``, a system; ``old``, others; ``figure``, what of them is compared.
    """
    panels = []
    for name, group in _groups(records).items():
        curves = (_gain(group, old, options) for old in options["old"])
        series = tuple(curve for curve in curves if curve.x)
        if series:
            label = "speedup, old / new - 1 (%)"
            heading = f"{title} {name}".strip()
            panels.append(Panel(heading, SIZE_LABEL, label, Style.LINE, series, start_of_clamped=_clamped(group)))
    return panels


def stacked_times(records: Sequence[Record], title: str, options: Mapping[str, Any]) -> list[Panel]:
    """Time by part, a panel for each model, device and system. Option: ``systems``."""
    return _stacks(records, title, options, TIME_PARTS, "prefill (ms)", 1.0)


def stacked_memory(records: Sequence[Record], title: str, options: Mapping[str, Any]) -> list[Panel]:
    """Memory by part, a panel for each model, device and system. Option: ``systems``."""
    return _stacks(records, title, options, MEMORY_PARTS, "memory (GiB)", 1 / GIB)


def _groups(records: Sequence[Record]) -> dict[str, Group]:
    """Points in order by model and device.

    Raises:
        TableError: two records for one point, or settings that differ between points.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(f"{record.cell.model}, {record.cell.device}", []).append(record)
    groups: dict[str, Group] = {}
    for name in sorted(found):
        check_scopes(found[name], VARYING)
        by_size: dict[float, list[Record]] = {}
        for record in found[name]:
            by_size.setdefault(float(settings_of(record)[SIZE]), []).append(record)
        points = {size: the_only(by_size[size], UNSPECIFIC) for size in sorted(by_size)}
        groups[name] = {size: record for size, record in points.items() if record is not None}
    return groups


def _gain(group: Group, old: str, options: Mapping[str, Any]) -> Series:
    """Of the points where both systems ran."""
    points = []
    for size, record in group.items():
        pair = to_compare(record, *(f"{system}.{options['figure']}" for system in (options["new"], old)))
        if pair is not None:
            points.append((size, COMPARISONS["gain_percent"](*pair)))
    hue = list(options["old"]).index(old)
    return Series(f"over {old}", tuple(x for x, _ in points), tuple(y for _, y in points), hue=hue)


def _stacks(
    records: Sequence[Record],
    title: str,
    options: Mapping[str, Any],
    parts: Mapping[str, str],
    ylabel: str,
    scale: float,
) -> list[Panel]:
    panels = []
    for name, group in _groups(records).items():
        for system in options["systems"]:
            series = _stack(group, system, parts, scale)
            if series:
                heading = f"{title} {name}".strip() + f"\n{system}"
                mark = _clamped(group)
                panels.append(
                    Panel(heading, SIZE_LABEL, ylabel, Style.STACK, series, group=name, start_of_clamped=mark)
                )
    return panels


def _stack(group: Group, system: str, parts: Mapping[str, str], scale: float) -> tuple[Series, ...]:
    """Each part on top of those before it; no bar where a point lacks a part, or where the launch gap is negative."""
    tops = dict.fromkeys(group, 0.0)
    series = []
    for hue, (part, label) in enumerate(parts.items()):
        values = {size: record.metrics.get(f"{system}.{part}") for size, record in group.items()}
        known = {size: scale * value for size, value in values.items() if value is not None and value > 0}
        low = tuple(tops[size] for size in known)
        tops |= {size: tops[size] + value for size, value in known.items()}
        if known:
            series.append(Series(label, tuple(known), tuple(tops[size] for size in known), low, hue))
    return tuple(series)


def _clamped(group: Group) -> float | None:
    """The smallest image that the model makes smaller."""
    return min((size for size, record in group.items() if is_clamped(record)), default=None)


SWEEP_BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "prefill_gains": Builder("sweep_latency", gains),
        "linears_gains": Builder("sweep_linears", gains),
        "sweep_times": Builder("sweep_latency", stacked_times),
        "sweep_memory": Builder("sweep_memory", stacked_memory),
    }
)
"""Kinds of panels that a specification may name, of records of sweeps."""
