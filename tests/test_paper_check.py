"""The check of the paper's own numbers: no false alarms, known errors found, rules and claims fit the files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mqbench.harness.errors import TableError
from mqbench.harness.paper_check import HEADERS, Finding, check, check_rule, render
from mqbench.harness.paper_figures import PAPER, paper_lines
from mqbench.harness.paper_formulas import (
    FORMULAS,
    decimals_of,
    evaluate,
    formula_text,
    printed_interval,
    truncated_interval,
)
from mqbench.harness.paper_rules import Rule, load_rules

POSITIVE = st.floats(0.01, 1e4)


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return check()


def of(findings: list[Finding], table: int, text: str, *, claims: bool = False) -> list[Finding]:
    mine = [finding for finding in findings if finding.rule.table == table and bool(finding.rule.claim) == claims]
    return [finding for finding in mine if text in finding.what]


@given(st.tuples(POSITIVE, POSITIVE), st.integers(0, 4), st.integers(0, 4), st.sampled_from(sorted(FORMULAS)))
def test_a_number_that_was_rounded_from_the_truth_always_follows(
    true: tuple[float, float], decimals: int, out: int, name: str
) -> None:
    """``slack`` covers binary rounding of values of up to 10^8."""
    formula = FORMULAS[name]
    values = true[: formula.arity or 2]
    texts = [f"{value:.{decimals}f}" for value in values]
    inputs = [printed_interval(text) for text in texts]
    assume(all(item.low > 0 for item in inputs))
    result = formula.compute(values, [1.0] * len(values))
    assert evaluate(formula, inputs).meets(printed_interval(f"{result:.{out}f}"), slack=1e-6)


@given(POSITIVE, POSITIVE)
def test_a_number_that_is_off_by_more_than_rounding_never_follows(one: float, two: float) -> None:
    inputs = [printed_interval(f"{value:.3f}", exact=True) for value in (one, two)]
    assume(all(item.low > 0 for item in inputs))
    computed = evaluate(FORMULAS["difference"], inputs)
    assert not computed.meets(printed_interval(f"{computed.nominal + 0.02:.2f}"))


@pytest.mark.parametrize(("text", "decimals"), [("12", 0), ("+1.50", 2), ("-0.367", 3), ("100", 0)])
def test_decimals(text: str, decimals: int) -> None:
    assert decimals_of(text) == decimals


def test_intervals_of_printed_numbers() -> None:
    assert (printed_interval("2.50").low, printed_interval("2.50").high) == pytest.approx((2.495, 2.505))
    assert printed_interval("4", exact=True).low == printed_interval("4", exact=True).high == 4
    assert (truncated_interval("3.5").low, truncated_interval("3.5").high) == pytest.approx((3.5, 3.6))
    assert (truncated_interval("-3.5").low, truncated_interval("-3.5").high) == pytest.approx((-3.6, -3.5))


def test_formulas() -> None:
    values = {name: formula.compute([2.0, 8.0], [3.0, 1.0]) for name, formula in FORMULAS.items()}
    expected = {"difference": -6, "gain_percent": -75, "reduction_percent": -300, "ratio_percent": 25, "sum": 10}
    expected |= {"mean": 5, "weighted_mean": 3.5, "largest": 8, "smallest": 2, "value": 2}
    assert values == expected
    assert formula_text(FORMULAS["gain_percent"], ["a", "b"]) == "100 (a / b - 1)"
    assert formula_text(FORMULAS["sum"], ["a", "b"]) == "sum(a, b)"


def test_every_printed_percentage_and_delta_has_a_rule() -> None:
    ruled = {(name, rule.printed) for rule in load_rules() for name in rule.files or (f"table{rule.table:02d}.csv",)}
    printed = {
        (path.name, column)
        for path in PAPER.glob("table*.csv")
        for column in paper_lines(path.name)[0]
        if column.endswith("_printed")
    }
    assert printed <= ruled


def test_table_17(findings: list[Finding]) -> None:
    """The latencies give 29.40 % at 1400 pixels, the paper prints 20.24 %; at 280 pixels 16.82 % is right."""
    (wrong,) = of(findings, 17, "1400: mquant_speedup")
    assert not wrong.follows
    assert wrong.computed.nominal == pytest.approx(100 * (0.559 / 0.432 - 1))
    (right,) = of(findings, 17, "280: mquant_speedup")
    assert right.follows
    assert sum(not finding.follows for finding in of(findings, 17, "")) == 28


def test_a_lost_digit_is_recognized(findings: list[Finding]) -> None:
    (found,) = of(findings, 13, "4: decode")
    assert not found.follows and found.alternatives == ("a lost or added digit",)
    assert found.computed.nominal == pytest.approx(18.37, abs=0.01)


def test_cut_off_digits_are_recognized(findings: list[Finding]) -> None:
    (found,) = of(findings, 2, "qwen2-vl-7b, part llm")
    assert not found.follows and found.alternatives == ("digits cut off instead of rounded",)


def test_another_reference_row_is_recognized(findings: list[Finding]) -> None:
    """Table 10's per-tensor deltas are to the per-token row, not to BF16 as all others."""
    wrong = [finding for finding in of(findings, 10, "_delta") if not finding.follows]
    assert len(wrong) == 4
    assert all("per-token dynamic" in finding.alternatives[0] for finding in wrong)


def test_averages_of_table_5(findings: list[Finding]) -> None:
    """By subject counts two of the five averages are right; one exceeds every subject, whatever the counts are."""
    by_weights = [finding for finding in of(findings, 5, ": avg") if finding.rule.formula == "weighted_mean"]
    assert [finding.follows for finding in by_weights] == [True, True, False, False, False]
    bounded = [finding for finding in of(findings, 5, ": avg") if finding.rule.relation == "<="]
    assert [finding.printed for finding in bounded if not finding.follows] == ["87.18"]


@pytest.mark.parametrize("number", [1, 12])
def test_tables_without_errors(findings: list[Finding], number: int) -> None:
    assert of(findings, number, "") and all(finding.follows for finding in of(findings, number, ""))


@pytest.mark.parametrize(
    ("table", "text", "follows"),
    [
        (9, "less than 0.3 %", False),
        (9, "1.6 ms", True),
        (9, "0.96 %", True),
        (5, "6.4 %", True),
        (5, "5.46 %", True),
        (10, "1.1017 s", False),
        (12, "23 %", True),
        (18, "5.58", True),
        (3, "OCRBench", False),
    ],
)
def test_claims(findings: list[Finding], table: int, text: str, follows: bool) -> None:
    (found,) = of(findings, table, text, claims=True)
    assert found.follows is follows


def test_bounds_hold_at_the_edge() -> None:
    claim = Rule(9, "value", ("tokens",), value="100", relation="<", aggregate="min", exact=("tokens",), claim="c")
    assert not check_rule(claim)[0].follows
    assert check_rule(Rule(**{**vars(claim), "value": "100.1"}))[0].follows


@pytest.mark.parametrize("style", ["terminal", "md", "tex", "csv"])
def test_forms(findings: list[Finding], style: str) -> None:
    text = render(findings, style)
    assert "20.24" in text
    assert "16.82" not in text
    assert "16.82" in render(findings, style, everything=True)


def test_csv_has_one_row_per_number(findings: list[Finding]) -> None:
    rows = list(csv.DictReader(io.StringIO(render(findings, "csv", everything=True))))
    assert len(rows) == len(findings)
    assert tuple(rows[0]) == HEADERS
    assert {row["follows"] for row in rows} == {"yes", "no"}


def test_wrong_rules_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "claims.csv").write_text("section,claim,table,formula,inputs,rows,aggregate,relation,printed\n")
    (tmp_path / "rules.toml").write_text('[[rule]]\ntable = 1\nprinted = "x"\nformula = "magic"\ninputs = ["y"]\n')
    with pytest.raises(TableError, match="unknown formula 'magic'"):
        load_rules(tmp_path)
    (tmp_path / "rules.toml").write_text('[[rule]]\ntable = 1\nprinted = "x"\nformula = "sum"\ninputs = ["y"]\na = 1\n')
    with pytest.raises(TableError, match="'a'"):
        load_rules(tmp_path)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(9, "value", ("token",), value="1", aggregate="max", claim="c"), "no figure 'token'"),
        (Rule(9, "value", ("tokens",), value="1", claim="c"), "fits 5 rows"),
        (Rule(9, "value", ("tokens",), value="1", where={"tokens": "7"}, claim="c"), "fits 0 rows"),
        (Rule(9, "value", ("tokens@tokens=7",), value="1", aggregate="max", claim="c"), "0 rows fit"),
    ],
)
def test_rules_that_fit_no_row_are_refused(rule: Rule, message: str) -> None:
    with pytest.raises(TableError, match=message):
        check_rule(rule)
