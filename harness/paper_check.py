"""``mqbench paper check``: which printed numbers of the paper do not follow from the numbers beside them.

Every derived number is computed again from its inputs. A printed number stands for all values that round to it, so a
number is listed only when no values behind the printed inputs can give it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mqbench.harness import table_formats
from mqbench.harness.errors import TableError
from mqbench.harness.paper_figures import PAPER, Line
from mqbench.harness.paper_formulas import (
    FORMULAS,
    Interval,
    decimals_of,
    evaluate,
    formula_text,
    printed_interval,
    truncated_interval,
)
from mqbench.harness.paper_rules import SAME, Rule, load_rules, parse_row
from mqbench.harness.table import Frame, Row
from mqbench.harness.table_spec import TableSpec

HEADERS = ("table", "section", "what", "printed", "recomputed", "possible", "formula", "would be given by", "follows")
SHORT_HEADERS = ("table", "what", "printed", "recomputed", "would be given by")
"""What fits on a terminal."""
AGGREGATES = {"max": max, "min": min}


@dataclass(frozen=True)
class Finding:
    """One printed number and what its inputs say.

    Attributes:
        rule: The rule or claim.
        what: The row and column, or the claim.
        printed: As printed.
        computed: From the printed inputs, with what their rounding allows.
        follows: Some values behind the inputs give the printed number.
        alternatives: Other computations that would give it.
    """

    rule: Rule
    what: str
    printed: str
    computed: Interval
    follows: bool
    alternatives: tuple[str, ...] = ()


def check(folder: Path = PAPER) -> list[Finding]:
    """Every derived number, in the order of the tables.

    Raises:
        TableError: a rule names a row or a column that is not there.
    """
    rules = sorted(load_rules(folder), key=lambda rule: (bool(rule.claim), rule.table))
    return [finding for rule in rules for finding in check_rule(rule)]


def check_rule(rule: Rule) -> list[Finding]:
    """The findings of one rule: one per row, or one for a claim.

    Raises:
        TableError: a row or column is not there, or a claim does not say how to make one number of several rows.
    """
    lines = [line for line in rule.lines if all(line[name] == value for name, value in rule.where.items())]
    if not rule.claim:
        rows = [line for line in lines if line[rule.printed]]
        return [_finding(rule, [line], line[rule.printed], f"{rule.place(line)}: {_name(rule)}") for line in rows]
    if not lines or (len(lines) > 1 and rule.aggregate not in AGGREGATES):
        raise TableError(f"claim '{rule.claim}' fits {len(lines)} rows; correct 'rows' or 'aggregate' in claims.csv")
    return [_finding(rule, lines, rule.value, rule.claim)]


def render(findings: Sequence[Finding], style: str = "terminal", *, everything: bool = False, width: int = 120) -> str:
    """The findings as text.

    Args:
        findings: From ``check``.
        style: ``terminal``, ``md``, ``tex`` or ``csv``.
        everything: Also the numbers that follow.
        width: Columns of the terminal.

    Raises:
        TableError: unknown style.
    """
    if style not in table_formats.FORMATS:
        raise TableError(f"unknown format '{style}'; known: {', '.join(table_formats.FORMATS)}")
    wrong = sum(not finding.follows for finding in findings)
    headers = HEADERS if everything else SHORT_HEADERS if style == "terminal" else HEADERS[:-1]
    shown = [_cells(finding) for finding in findings if everything or not finding.follows]
    rows = tuple(Row(tuple(cells[name] for name in headers), ()) for cells in shown)
    caption = (
        f"{wrong} of {len(findings)} derived numbers of the paper do not follow from those they are computed from. "
        "Possible: what the inputs allow, each standing for every value that rounds to it. Would be given by: other "
        "computations that give the printed number; that they were used is a guess."
    )
    spec = TableSpec(number=0, title="", rows=headers, columns=(), group_labels=0)
    return table_formats.FORMATS[style](Frame(spec, rows, caption), width)


def _finding(rule: Rule, lines: Sequence[Line], printed: str, what: str) -> Finding:
    computed = _computed(rule, lines)
    follows = _holds(rule, computed, printed)
    alternatives = () if follows else tuple(dict.fromkeys(_alternatives(rule, lines, printed)))
    return Finding(rule, what, printed, computed, follows, alternatives)


def _computed(rule: Rule, lines: Sequence[Line]) -> Interval:
    """The formula over the rows that count."""
    formula = FORMULAS[rule.formula]
    found = [evaluate(formula, [_input(rule, text, line) for text in rule.inputs], rule.weights) for line in lines]
    if len(found) == 1:
        return found[0]
    pick = AGGREGATES[rule.aggregate]
    return Interval(*(pick(getattr(item, name) for item in found) for name in ("low", "nominal", "high")))


def _input(rule: Rule, text: str, line: Line) -> Interval:
    """One input as an interval."""
    column, _, selector = text.partition("@")
    if selector:
        wanted = {name: line[name] if value == SAME else value for name, value in parse_row(selector).items()}
        rows = [row for row in _all_lines(rule) if all(row[name] == value for name, value in wanted.items())]
        if len(rows) != 1:
            raise TableError(f"table {rule.table}: {len(rows)} rows fit '{text}'; one is needed")
        line = rows[0]
    if not line.get(column):
        raise TableError(f"table {rule.table}: no figure '{column}' in row {rule.place(line)}")
    return printed_interval(line[column], exact=column in rule.exact)


def _all_lines(rule: Rule) -> list[Line]:
    """Rows that an input may point at: of the table's main file, also those without partner in the others."""
    return replace(rule, files=rule.files[:1]).lines


def _holds(rule: Rule, computed: Interval, printed: str) -> bool:
    claimed = printed_interval(printed)
    if rule.relation == "=":
        return computed.meets(claimed)
    # A bound in the text is exact ("< 1 %"); a printed figure between others is rounded.
    left, right = (computed, printed_interval(printed, exact=True)) if rule.claim else (claimed, computed)
    return {
        "<": left.low < right.high,
        ">": left.high > right.low,
        "<=": left.low <= right.high,
        ">=": left.high >= right.low,
    }[rule.relation]


def _alternatives(rule: Rule, lines: Sequence[Line], printed: str) -> Iterator[str]:
    """Other computations whose result rounds to the printed number."""
    if rule.relation != "=":
        return
    claimed = printed_interval(printed)
    computed = _computed(rule, lines)
    if computed.meets(truncated_interval(printed)):
        yield "digits cut off instead of rounded"
    if _one_digit_apart(printed, f"{computed.nominal:.{decimals_of(printed)}f}"):
        yield "a lost or added digit"
    for other in _variants(rule):
        if _computed(other, lines).meets(claimed):
            yield _text(other)


def _variants(rule: Rule) -> Iterator[Rule]:
    """The rule with another formula or order of inputs, another reference row, or another choice among rows."""
    for name, formula in FORMULAS.items():
        fits = formula.arity in (None, len(rule.inputs)) and (rule.weights or name != "weighted_mean")
        for inputs in itertools.permutations(rule.inputs) if formula.arity == 2 else [rule.inputs]:
            if fits and formula.plausible and (name, inputs) != (rule.formula, rule.inputs):
                yield replace(rule, formula=name, inputs=inputs)
    for index, text in enumerate(rule.inputs):
        for other in _other_references(rule, text):
            yield replace(rule, inputs=(*rule.inputs[:index], other, *rule.inputs[index + 1 :]))
    for aggregate in AGGREGATES if rule.aggregate else ():
        yield replace(rule, aggregate=aggregate)


def _other_references(rule: Rule, text: str) -> Iterator[str]:
    """The input in other rows, each value once; nothing where the input is of the row at hand or has no fixed row."""
    column, _, selector = text.partition("@")
    if not selector or SAME in parse_row(selector).values():
        return
    seen = {""}
    for line in _all_lines(rule) if rule.key else ():
        if line.get(column, "") not in seen:
            seen.add(line[column])
            yield f"{column}@{'&'.join(f'{name}={line[name]}' for name in rule.key)}"


def _one_digit_apart(one: str, two: str) -> bool:
    """One of two numbers has exactly one digit more, for example 8.4 and 18.4."""
    short, long = sorted((one.lstrip("+-"), two.lstrip("+-")), key=len)
    digits = [index for index, character in enumerate(long) if character.isdigit()]
    return len(long) == len(short) + 1 and any(long[:index] + long[index + 1 :] == short for index in digits)


def _name(rule: Rule) -> str:
    return rule.printed.removesuffix("_printed")


def _text(rule: Rule) -> str:
    text = formula_text(FORMULAS[rule.formula], [_input_text(name) for name in rule.inputs])
    return f"{rule.aggregate} over rows of {text}" if rule.aggregate else text


def _input_text(text: str) -> str:
    """``avg@method=q-vlm`` as ``avg [method q-vlm]``."""
    column, _, selector = text.partition("@")
    named = [f"{name} {value}" for name, value in parse_row(selector).items() if value != SAME]
    return f"{column} [{', '.join(named)}]" if named else column


def _cells(finding: Finding) -> Mapping[str, str]:
    """What is printed of a finding, by ``HEADERS``."""
    rule, computed = finding.rule, finding.computed
    decimals = decimals_of(finding.printed)
    relation = "" if rule.relation == "=" else f"{rule.relation} "
    nominal = f"{computed.nominal:.{decimals + bool(relation)}f}"
    return {
        "table": str(rule.table),
        "section": rule.section or f"Table {rule.table}",
        "what": finding.what,
        "printed": f"{relation}{finding.printed}" if rule.claim else finding.printed,
        "recomputed": nominal if rule.claim else f"{relation}{nominal}",
        "possible": f"{computed.low:.{decimals + 1}f} to {computed.high:.{decimals + 1}f}",
        "formula": _text(rule) + (f" ({rule.note})" if rule.note else ""),
        "would be given by": "; ".join(finding.alternatives) or "-",
        "follows": "yes" if finding.follows else "no",
    }
