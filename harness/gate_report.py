"""The answer of ``mqbench gate`` for people (a table), for programs (JSON) and for CI (JUnit XML)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mqbench.harness.gate_verdict import Check, Kind, Report, Verdict

JSON_VERSION = 1
"""Version of the JSON form; raised when a field is renamed or changes its meaning."""

STYLES: Mapping[Verdict, str] = MappingProxyType(
    {
        Verdict.PASS: "green",
        Verdict.FAIL: "bold red",
        Verdict.UNDECIDED: "yellow",
        Verdict.MISSING: "magenta",
        Verdict.NEW: "cyan",
    }
)
HEADERS = (
    "verdict",
    "model",
    "recipe",
    "bits",
    "of",
    "n",
    "changed",
    "baseline",
    "candidate",
    "value",
    "bounds",
    "limit",
)
NUMERIC = frozenset(HEADERS[5:])
UNIT_SIGNS: Mapping[str, str] = MappingProxyType({"points": " pt", "%": " %", "ratio": ""})
BYTES_PER_MIB = 2**20
NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold; model answers and error messages may."""


def render(report: Report, width: int, *, color: bool = False) -> str:
    """Table, what fails, notes, and a last line with the verdict on the whole."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color, no_color=not color, highlight=False, emoji=False)
    console.print(_table(report))
    for check in report.checks:
        if check.fails or check.verdict is not Verdict.PASS:
            line = Text(f"{check.verdict}: ", style=STYLES[check.verdict])
            console.print(line + Text(_clean(f"{name(check)}: {sentence(check, report)}"), style=""), soft_wrap=True)
    differing = {text: None for check in report.checks for text in check.differences}
    allowed = [f"allowed differences: {', '.join(differing)}"] if differing else []
    for note in (*allowed, *report.notes):
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)
    console.print(Text(summary(report), style="bold green" if report.ok else "bold red"), soft_wrap=True)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def summary(report: Report) -> str:
    """``gate: pass (3 pass, 1 undecided; confidence 0.95 per check)``."""
    counts = ", ".join(f"{report.count(verdict)} {verdict}" for verdict in Verdict if report.count(verdict))
    word = "pass" if report.ok else "FAIL"
    return f"gate: {word} ({counts}; confidence {report.confidence_per_check:.6g} of each bound)"


def name(check: Check) -> str:
    """The cell in words; checks of one report have different names."""
    parts = (check.model, _recipe(check), check.bits, _subject(check))
    return " ".join(part for part in parts if part)


def sentence(check: Check, report: Report) -> str:
    """What was found, for people."""
    if check.value is None:
        return check.reason
    bounds = "" if check.lower is None else f" {_bounds(check)} with confidence {report.confidence_per_check:.6g}"
    rest = f"; {check.reason}" if check.reason else ""
    return f"{_measure(check)} {_value(check)}{bounds}, {_limit(check)}, n = {check.num_samples}{rest}"


def to_json(report: Report) -> str:
    """The whole report as JSON.

    An object with ``version``, ``ok`` (false: exit code 1), ``counts`` (verdict -> number of checks), ``options`` (as
    given), ``confidence_per_check`` (after the correction), ``checks`` (the fields of ``gate_verdict.Check``) and
    ``notes``.
    """
    data: dict[str, Any] = {
        "version": JSON_VERSION,
        "ok": report.ok,
        "counts": {str(verdict): report.count(verdict) for verdict in Verdict},
        "options": asdict(report.options),
        "confidence_per_check": report.confidence_per_check,
        "checks": [asdict(check) for check in report.checks],
        "notes": list(report.notes),
    }
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_junit(report: Report) -> str:
    """JUnit XML: a suite per model, a case per check; undecided, missing and new ones are skipped unless they fail."""
    root = ElementTree.Element("testsuites", {"name": "mqbench gate", **_totals(report.checks)})
    for model in dict.fromkeys(check.model for check in report.checks):
        checks = [check for check in report.checks if check.model == model]
        suite = ElementTree.SubElement(root, "testsuite", {"name": _clean(model), **_totals(checks)})
        for check in checks:
            _add_case(suite, check, report)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_case(suite: ElementTree.Element, check: Check, report: Report) -> None:
    classname = _clean(f"{check.model}.{_recipe(check)} {check.bits}")
    case = ElementTree.SubElement(suite, "testcase", {"classname": classname, "name": _subject(check), "time": "0"})
    text = _clean(f"{check.verdict}: {sentence(check, report)}")
    if check.fails:
        failure = ElementTree.SubElement(case, "failure", {"message": text, "type": str(check.verdict)})
        failure.text = _clean(f"{name(check)}: {sentence(check, report)}")
    elif check.verdict is not Verdict.PASS:
        ElementTree.SubElement(case, "skipped", {"message": text})
    else:
        ElementTree.SubElement(case, "system-out").text = text


def _totals(checks: Sequence[Check]) -> dict[str, str]:
    skipped = sum(not check.fails and check.verdict is not Verdict.PASS for check in checks)
    failures = sum(check.fails for check in checks)
    numbers = {"tests": len(checks), "failures": failures, "errors": 0, "skipped": skipped, "time": 0}
    return {key: str(value) for key, value in numbers.items()}


def _table(report: Report) -> Table:
    table = Table()
    for header in HEADERS:
        table.add_column(header, justify="right" if header in NUMERIC else "left", overflow="fold")
    for check in report.checks:
        verdict = Text(str(check.verdict), style=STYLES[check.verdict])
        table.add_row(verdict, *(Text(part) for part in _cells(check)))
    return table


def _cells(check: Check) -> tuple[str, ...]:
    """Everything but the verdict, in the order of ``HEADERS``."""
    return (
        check.model,
        _recipe(check),
        check.bits,
        _subject(check),
        str(check.num_samples or "-"),
        "-" if check.num_changed is None else str(check.num_changed),
        _headline(check, check.baseline),
        _headline(check, check.candidate),
        "-" if check.value is None else _value(check),
        "-" if check.lower is None else _bounds(check),
        f"{check.limit:g}{UNIT_SIGNS[check.unit]}",
    )


def _recipe(check: Check) -> str:
    return f"{check.recipe} ({check.variant})" if check.variant else check.recipe


def _subject(check: Check) -> str:
    """The benchmark; for other checks also what was looked at."""
    kind = "" if check.kind in (Kind.ACCURACY, Kind.PERPLEXITY) else str(check.kind)
    return " ".join(part for part in (check.task, kind) if part)


def _measure(check: Check) -> str:
    match check.kind:
        case Kind.ACCURACY:
            return "loss"
        case Kind.PERPLEXITY:
            return "perplexity"
        case Kind.RECOVERY:
            return "recovery"
        case Kind.LATENCY | Kind.MEMORY:
            return f"{check.kind} ratio"


def _number(check: Check, value: float) -> str:
    """Losses carry a sign: plus is worse."""
    if check.kind in (Kind.ACCURACY, Kind.PERPLEXITY):
        return f"{value + 0.0:+.2f}"
    return f"{value:.3f}" if check.unit == "ratio" else f"{value:.2f}"


def _value(check: Check) -> str:
    return f"{_number(check, check.value or 0.0)}{UNIT_SIGNS[check.unit]}"


def _bounds(check: Check) -> str:
    return f"[{_number(check, check.lower or 0.0)}, {_number(check, check.upper or 0.0)}]"


def _limit(check: Check) -> str:
    word = "at least" if check.kind is Kind.RECOVERY else "at most"
    return f"allowed {word} {check.limit:g}{UNIT_SIGNS[check.unit]}"


def _headline(check: Check, value: float | None) -> str:
    if value is None:
        return "-"
    if check.kind is Kind.MEMORY:
        return f"{value / BYTES_PER_MIB:.1f} MiB"
    return f"{value:.2f}{' ms' if check.kind is Kind.LATENCY else ''}"


def _clean(text: str) -> str:
    return NOT_IN_XML.sub("\ufffd", text)
