"""The report as Markdown, as CSV and on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from mqbench.harness.bench.catalog import CONTENDERS, UNAVAILABLE, Rate
from mqbench.harness.bench.report import MET, MISSED, NOT_MEASURED, Entry, Report, Verdict
from mqbench.harness.bench.spec import BANDWIDTH, PEAKS, TASKS, targets

COMMAND = "mqbench bench kernels --device cuda --out results/records"
NOTHING = f"Nothing was measured: no records from a GPU. `{COMMAND}` measures everything; it needs an NVIDIA GPU."

METHOD = (
    "Random data. Each contender is checked on the timed inputs before and after it is timed; one that fails its check "
    "is not timed. Times are medians of CUDA-graph replays, per call, all contenders in turns. Inputs and results "
    "rotate through up to 128 copies that together exceed the L2 cache twice. Layers with integer activations start "
    "from integers, unless they say per-token quantization; what quantizing costs stands under fused quantization. "
    "Ratio: time of the first column over this one's, median over the rounds. Peak: the time that reading and writing "
    "once, or the arithmetic, takes at the peaks measured in the same run, in percent of the time."
)
MAX_MISSED = 3
SHOWN_PACKAGES = ("torch", "triton", "fast-hadamard-transform", "torchao", "gemlite")

BYTES_PER_MS_TO_GB_PER_S = 1e-6
OPS_PER_MS_TO_TERA = 1e-9

CSV_HEADER = ("device", "task", "case", "rows", "contender", "time_ms", "iqr_ms", "ratio", "percent_of_peak", "note")


def to_markdown(reports: Sequence[Report]) -> str:
    """``kernels.md``; without reports it says so, and lists the targets."""
    parts = ["# Speed of the kernels"]
    if reports:
        parts.append(METHOD)
        for report in reports:
            parts += _sections(report)
    else:
        unmeasured = [Verdict(target, NOT_MEASURED) for target in targets()]
        parts += [NOTHING, "## Targets", _markdown(*_verdict_lines(unmeasured))]
    return "\n\n".join(parts) + "\n"


def to_csv(reports: Sequence[Report]) -> str:
    """``kernels.csv``: a line per contender and case."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for report in reports:
        for entry in report.entries:
            figures = (entry.time_ms, entry.iqr_ms, entry.ratio, report.percent_of_peak(entry))
            shown = ["" if value is None or entry.time_ms is None else f"{value:.6g}" for value in figures]
            writer.writerow([report.device, *entry.place, entry.contender, *shown, entry.note])
    return stream.getvalue()


def targets_table(report: Report) -> Table:
    """The verdicts, for a terminal."""
    header, lines = _verdict_lines(report.verdicts)
    table = Table(*header, title=report.device)
    for line in lines:
        table.add_row(*line)
    return table


def checks_table(entries: Iterable[Entry]) -> Table:
    """Who passed the checks, without a time: for runs that say nothing about speed."""
    table = Table("task", "case", "rows", "contender", "check", title="functional check, no speeds")
    for entry in entries:
        title = CONTENDERS[entry.contender].title
        table.add_row(TASKS[entry.task], entry.case, str(entry.rows), title, entry.note or "passed")
    return table


def _sections(report: Report) -> Iterable[str]:
    yield f"## {report.device}"
    yield f"{_peaks_text(report)} {_conditions_text(report)}"
    yield "### Targets"
    yield _markdown(*_verdict_lines(report.verdicts))
    for task in TASKS:
        if task == PEAKS:
            continue
        entries = [entry for entry in report.entries if entry.task == task]
        if entries:
            yield f"### {TASKS[task].capitalize() if TASKS[task].islower() else TASKS[task]}"
            yield from (_case_table(report, case, entries) for case in dict.fromkeys(entry.case for entry in entries))
    notes = list(_notes(report))
    if notes:
        yield "### Not timed"
        yield "\n".join(f"- {note}" for note in notes)


def _peaks_text(report: Report) -> str:
    copy = report.copy_bytes_per_ms
    known = [] if copy is None else [f"copy {copy * BYTES_PER_MS_TO_GB_PER_S:,.0f} GB/s (read and written)"]
    for rate, unit in ((Rate.BF16, "TFLOP/s"), (Rate.INT8, "TOP/s"), (Rate.FP8, "TFLOP/s")):
        peak = report.peak_ops_per_ms(rate)
        if peak is not None:
            known.append(f"{rate.value.upper()} {peak * OPS_PER_MS_TO_TERA:,.0f} {unit}")
    return f"Measured peaks: {', '.join(known)}." if known else "Peaks were not measured."


def _conditions_text(report: Report) -> str:
    """Versions and, as read after each case, the GPU's state."""
    last = report.records[-1].environment
    packages = last.get("packages", {}) | last.get("kernels", {}).get("packages", {})
    versions = [f"{name} {packages[name]}" for name in SHOWN_PACKAGES if name in packages]
    states = [record.environment.get("kernels", {}).get("state", {}) for record in report.records]
    clocks = [state["sm_clock_mhz"] for state in states if "sm_clock_mhz" in state]
    limits = sorted({state["power_limit_w"] for state in states if "power_limit_w" in state})
    parts = [
        f"{len(report.records)} case{'s' if len(report.records) > 1 else ''}",
        f"code version {report.version}",
        f"driver {last.get('driver') or '-'}",
    ]
    parts += versions
    parts += [f"power limit {' / '.join(f'{limit:g}' for limit in limits)} W"] if limits else []
    parts += [f"SM clock {min(clocks):g} to {max(clocks):g} MHz"] if clocks else []
    return f"Conditions: {', '.join(parts)}."


def _verdict_lines(verdicts: Iterable[Verdict]) -> tuple[Sequence[str], list[Sequence[str]]]:
    header = ("target", "wanted", "measured, worst place", "places", "verdict")
    return header, [_verdict_line(verdict) for verdict in verdicts]


def _verdict_line(verdict: Verdict) -> Sequence[str]:
    target = verdict.target
    unit = " %" if target.measure == BANDWIDTH else "x"
    value = "no valid time" if verdict.worst is None else f"{verdict.worst:.3g}{unit}"
    measured = "-" if verdict.state == NOT_MEASURED else f"{value} ({verdict.where})"
    state = verdict.state
    if state == MET and verdict.places < verdict.wanted:
        state += " where measured"
    if state == MISSED:
        more = len(verdict.missed) - MAX_MISSED
        state += f" at {'; '.join(verdict.missed[:MAX_MISSED])}" + (f" and {more} more" if more > 0 else "")
    places = f"{verdict.places} of {verdict.wanted}" if verdict.places else "-"
    return target.title, target.limit_text, measured, places, state


def _case_table(report: Report, case: str, entries: Sequence[Entry]) -> str:
    """A table per layer, width or operation: a row per M, a column per contender."""
    own = [entry for entry in entries if entry.case == case]
    names = [name for name in CONTENDERS if any(entry.contender == name and entry.time_ms for entry in own)]
    by_rows: dict[int, dict[str, Entry]] = {}
    for entry in own:
        by_rows.setdefault(entry.rows, {})[entry.contender] = entry
    header = (f"{case}: M", *(CONTENDERS[name].title for name in names))
    lines = [
        (str(rows), *(_entry_text(report, found.get(name), name == names[0]) for name in names))
        for rows, found in sorted(by_rows.items())
    ]
    return _markdown(header, lines)


def _entry_text(report: Report, entry: Entry | None, is_baseline: bool) -> str:
    if entry is None or entry.time_ms is None:
        return "-" if entry is None or entry.note.startswith(UNAVAILABLE) else entry.note.split(":")[0]
    percent = report.percent_of_peak(entry)
    parts = [_time_text(entry.time_ms), "" if is_baseline else f"{entry.ratio:.2f}x"]
    parts.append("" if percent is None else f"{percent:.0f} % of peak")
    return ", ".join(part for part in parts if part)


def _time_text(time_ms: float) -> str:
    return f"{time_ms:.3g} ms" if time_ms >= 1 else f"{time_ms * 1e3:.3g} us"


def _notes(report: Report) -> Iterable[str]:
    """Each reason once, with how often it occurred."""
    counts: dict[tuple[str, str], int] = {}
    for entry in report.entries:
        if entry.note:
            counts[entry.contender, entry.note] = counts.get((entry.contender, entry.note), 0) + 1
    for (name, note), count in counts.items():
        yield f"{CONTENDERS[name].title}: {note} ({count} case{'s' if count > 1 else ''})"


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    escaped: Callable[[str], str] = lambda text: text.replace("|", "\\|")  # noqa: E731
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(escaped(cell) for cell in row)} |" for row in rows)
