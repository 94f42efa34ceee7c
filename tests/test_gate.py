"""The gate's verdicts, what it pairs, and what it refuses to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from fakes.gate import record, right, samples, windows
from fakes.records import CALIBRATION, failed_record, make_cell
from mqbench.harness.errors import GateError, RequestError, UnknownNameError
from mqbench.harness.gate import compare
from mqbench.harness.gate_pairs import ALLOWABLE, CELL_SETTINGS, ENVIRONMENT_SETTINGS, NEVER_ALLOWED, compared_settings
from mqbench.harness.gate_verdict import Check, Correction, GateOptions, Kind, Outcome, Verdict
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import Backend, CalibrationInfo, Cell, Record, Sample


def only(baseline: Record, candidate: Record, **options: Any) -> Check:
    report = compare([baseline], [candidate], GateOptions(**options))
    (check,) = report.checks
    assert report.ok is not check.fails
    return check


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_right", "verdict", "fails"),
    [
        (320, Verdict.PASS, False),
        (300, Verdict.FAIL, True),
        (317, Verdict.UNDECIDED, False),
        (340, Verdict.PASS, False),
    ],
)
def test_verdicts(num_right: int, verdict: Verdict, fails: bool) -> None:
    check = only(record(), record(num_right=num_right))
    assert (check.verdict, check.fails) == (verdict, fails)
    assert check.value == pytest.approx((320 - num_right) / 4)
    assert (check.num_samples, check.num_changed) == (400, abs(320 - num_right))
    assert (check.baseline, check.candidate) == (80.0, pytest.approx(num_right / 4))
    assert check.lower is not None and check.upper is not None and check.lower <= check.value <= check.upper


def test_undecided_says_how_many_rows_would_tell_and_can_fail() -> None:
    check = only(record(), record(num_right=317), undecided=Outcome.FAIL)
    assert check.fails
    assert check.num_samples_needed is not None and check.num_samples_needed > 400
    assert check.reason == f"about {check.num_samples_needed} rows would tell"


def test_at_the_limit_no_number_of_rows_would_tell() -> None:
    check = only(record(), record(num_right=316))
    assert (check.verdict, check.num_samples_needed) == (Verdict.UNDECIDED, None)
    assert "no number of rows" in check.reason


def test_other_texts_with_the_same_scores_need_enough_rows() -> None:
    changed = [replace(sample, prediction=f"{sample.prediction}!") for sample in right(30, 40)]
    check = only(record(samples=right(30, 40)), record(samples=tuple(changed)))
    assert (check.verdict, check.num_changed, check.value) == (Verdict.UNDECIDED, 40, 0)
    assert check.upper is not None and check.upper > 5


def test_the_same_answers_pass_at_any_number_of_rows() -> None:
    check = only(record(samples=right(1, 2)), record(samples=right(1, 2)))
    assert (check.verdict, check.reason, check.lower, check.upper) == (Verdict.PASS, "every answer is the same", 0, 0)


def test_rows_are_paired_by_index_not_by_position() -> None:
    backwards = tuple(reversed(right(320)))
    assert only(record(), record(samples=backwards)).num_changed == 0


def test_rows_of_one_image_count_once() -> None:
    alone = only(record(), record(num_right=300))
    clusters = {"cluster": [float(row // 4) for row in range(400)]}
    grouped = only(record(arrays=clusters), record(num_right=300, arrays=clusters))
    assert (alone.num_units, grouped.num_units) == (400, 100)
    assert grouped.lower is not None and alone.lower is not None and grouped.lower < alone.lower


def test_pairs_of_mme_count_as_units_known_or_not() -> None:
    clusters = {"cluster": [float(row // 2) for row in range(400)]}
    known = only(record("mme", arrays=clusters), record("mme", 300, arrays=clusters))
    unknown = only(record("mme"), record("mme", 300))
    assert known.num_units == unknown.num_units == 200
    # Rows 300 to 319 are lost, as whole pairs: what is assumed of unknown pairs.
    assert unknown.lower == pytest.approx(known.lower, abs=0.2)
    records = [record("mme", 390, "none"), record("mme", 380)]
    options = GateOptions(min_recovery=90)
    unknown = compare(records, records, options).checks[-1]
    records = [replace(item, arrays=clusters) for item in records]
    known = compare(records, records, options).checks[-1]
    assert (unknown.lower, unknown.upper) == (pytest.approx(known.lower, abs=0.2), pytest.approx(known.upper, abs=0.2))


def test_a_failed_candidate_fails_and_a_failed_baseline_makes_it_new() -> None:
    other = record("mme")
    report = compare([record(), other], [failed_record(), other])
    assert [check.verdict for check in report.checks] == [Verdict.FAIL, Verdict.PASS]
    assert report.checks[0].reason == "the candidate's cell failed: ValueError: broken"
    report = compare([failed_record(), other], [record(), other])
    assert [check.verdict for check in report.checks] == [Verdict.NEW, Verdict.PASS]
    report = compare([failed_record(), other], [failed_record(), other])
    assert not report.ok


def test_missing_and_new_cells() -> None:
    baseline, candidate = [record("textvqa"), record("mme")], [record("mme"), record("docvqa")]
    found = {check.task: check.verdict for check in compare(baseline, candidate).checks}
    assert found == {"textvqa": Verdict.MISSING, "mme": Verdict.PASS, "docvqa": Verdict.NEW}
    assert not compare(baseline, candidate).ok
    assert compare(baseline, candidate, GateOptions(missing=Outcome.PASS)).ok


def test_perplexity_is_compared_by_its_relative_increase() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 0.5, 100)
    worse = base + rng.normal(0.05, 0.02, 100)
    check = only(windows(list(base)), windows(list(worse)))
    assert (check.kind, check.verdict, check.unit) == (Kind.PERPLEXITY, Verdict.FAIL, "%")
    assert check.value == pytest.approx(100 * (np.exp(np.mean(worse)) / np.exp(np.mean(base)) - 1))
    assert only(windows(list(base)), windows(list(base - 0.02))).verdict is Verdict.PASS
    assert only(windows(list(base)), windows(list(base))).reason == "every answer is the same"


def test_bonferroni_asks_for_more_of_each_check() -> None:
    baseline = [record(task) for task in ("textvqa", "ocrbench", "docvqa")]
    candidate = [record(task, 309) for task in ("textvqa", "ocrbench", "docvqa")]
    alone = compare(baseline, candidate)
    together = compare(baseline, candidate, GateOptions(correction=Correction.BONFERRONI))
    assert together.confidence_per_check == pytest.approx(1 - 0.05 / 3)
    assert {check.verdict for check in alone.checks} == {Verdict.FAIL}
    assert {check.verdict for check in together.checks} == {Verdict.UNDECIDED}


def test_the_same_seed_gives_the_same_interval_whatever_else_is_compared() -> None:
    pair = record(), record(num_right=312)
    alone = only(*pair)
    among = compare([record("mme"), pair[0]], [record("mme", 300), pair[1]]).checks
    assert alone in among
    assert only(*pair, seed=1).lower != alone.lower


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_drop": -1.0}, "--max-drop"),
        ({"max_drop": float("nan")}, "--max-drop"),
        ({"confidence": 1.0}, "--confidence"),
        ({"num_resamples": 10}, "--resamples"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GateOptions(**wrong)


# --- recovery, latency, memory ----------------------------------------------------------------------------------------


def with_float(num_right: int) -> list[Record]:
    return [
        item
        for task in ("textvqa", "mme")
        for item in (record(task, 360, "none"), record(task, num_right), record(task, 10, "rtn"))
    ]


@pytest.mark.parametrize(
    ("num_right", "verdict"), [(360, Verdict.PASS), (330, Verdict.FAIL), (350, Verdict.UNDECIDED), (356, Verdict.PASS)]
)
def test_recovery(num_right: int, verdict: Verdict) -> None:
    records = with_float(num_right)
    checks = compare(records, records, GateOptions(min_recovery=97)).checks
    found = {check.recipe: check for check in checks if check.kind is Kind.RECOVERY}
    assert found.keys() == {"mquant", "rtn"}
    assert found["mquant"].verdict is verdict
    assert found["mquant"].value == pytest.approx(100 * num_right / 360)
    assert found["mquant"].candidate == pytest.approx(100 * num_right / 360)
    assert found["rtn"].fails
    assert not any(check.kind is Kind.RECOVERY for check in compare(records, records).checks)


def test_recovery_without_float_records_says_so() -> None:
    records = [record("textvqa"), record("mme")]
    *_, check = compare(records, records, GateOptions(min_recovery=97)).checks
    assert (check.verdict, check.fails) == (Verdict.MISSING, True)
    assert check.reason == "no ok float record for textvqa, mme in the candidate; evaluate method 'none' with it"


def test_recovery_of_a_zero_float_score_is_not_defined() -> None:
    records = [record("mme", 0, "none"), record("mme", 3)]
    *_, check = compare(records, records, GateOptions(min_recovery=97)).checks
    assert (check.verdict, check.reason) == (Verdict.MISSING, "the float score is zero on mme: recovery is not defined")


def test_recovery_uses_the_float_record_of_the_same_rows() -> None:
    records = [record("mme", 360, "none"), record("mme", 360, "none", limit=8), record("mme", 300)]
    *_, check = compare(records, records, GateOptions(min_recovery=97)).checks
    assert check.value == pytest.approx(100 * 300 / 360)


def timed(latency_ms: float, raw: bool = True, backend: Backend = Backend.REAL) -> Record:
    noise = np.random.default_rng(round(latency_ms)).normal(0, 0.3, 40)
    arrays = {"latency_ms": list(latency_ms + noise)} if raw else {}
    metrics = {"latency_ms": latency_ms, "peak_memory_bytes": latency_ms * 2**20}
    return record(metrics=metrics, arrays=arrays, backend=backend)


@pytest.mark.parametrize("raw", [True, False])
def test_latency_and_memory(raw: bool) -> None:
    found = {check.kind: check for check in compare([timed(100, raw)], [timed(110, raw)]).checks}
    assert found[Kind.LATENCY].verdict is Verdict.FAIL
    assert found[Kind.MEMORY].verdict is Verdict.FAIL
    assert found[Kind.LATENCY].value == pytest.approx(1.1, abs=0.003)
    assert (found[Kind.LATENCY].lower is not None) is raw
    assert found[Kind.MEMORY].lower is None and "without confidence" in found[Kind.MEMORY].reason
    assert compare([timed(100, raw)], [timed(102, raw)]).ok
    assert compare([timed(100)], [timed(110)], GateOptions(max_latency_ratio=None, max_memory_ratio=1.2)).ok


def test_simulated_records_never_take_part_in_latency_gates() -> None:
    slow, fast = timed(200, backend=Backend.SIMULATED), timed(100, backend=Backend.SIMULATED)
    report = compare([fast], [slow])
    assert {check.kind for check in report.checks} == {Kind.ACCURACY}
    assert any("latency and memory of 1 simulated cell(s) are not gated" in note for note in report.notes)


def test_a_latency_of_zero_is_refused() -> None:
    with pytest.raises(GateError, match="latency_ms of the baseline is 0"):
        compare([timed(0, raw=False)], [timed(1, raw=False)])


# --- what is compared, and what is refused ---------------------------------------------------------------------------

OTHER: dict[str, Callable[[Cell], Cell]] = {
    "data_sha256": lambda cell: replace(cell, data_sha256="e" * 64),
    "limit": lambda cell: replace(cell, limit=400),
    "calibration.dataset": lambda cell: replace(cell, calibration=calibration(dataset="own")),
    "calibration.split": lambda cell: replace(cell, calibration=calibration(split="mixed")),
    "calibration.num_samples": lambda cell: replace(cell, calibration=calibration(num_samples=128)),
    "calibration.seed": lambda cell: replace(cell, calibration=calibration(seed=1)),
    "calibration.sha256": lambda cell: replace(cell, calibration=calibration(sha256="f" * 64)),
    "recipe.seed": lambda cell: replace(cell, recipe=replace(cell.recipe, seed=1)),
    "dtype": lambda cell: replace(cell, dtype="bfloat16"),
    "device": lambda cell: replace(cell, device="NVIDIA H100"),
    "batch_size": lambda cell: replace(cell, batch_size=1),
    "weights_sha256": lambda cell: replace(cell, weights_sha256="b" * 64),
    "method_version": lambda cell: replace(cell, method_version="2"),
}


def calibration(**changes: Any) -> CalibrationInfo:
    return replace(CALIBRATION, **changes)


def changed(setting: str) -> Record:
    if setting == "backend":
        return record(backend=Backend.REAL)
    return replace(record(), cell=OTHER[setting](make_cell()))


def test_every_field_of_a_cell_names_the_place_or_must_be_equal() -> None:
    compared = {name.partition(".")[0] for name in CELL_SETTINGS}
    assert {item.name for item in fields(Cell)} - compared == {"model", "task"}
    assert {item.name for item in fields(Recipe)} == {"method", "vision", "text", "options", "seed"}
    assert {f"calibration.{item.name}" for item in fields(CalibrationInfo)} < set(CELL_SETTINGS)
    assert set(OTHER) | {"backend"} == set(CELL_SETTINGS)


@pytest.mark.parametrize("setting", [name for name in CELL_SETTINGS if name != "method_version"])
def test_records_with_other_settings_are_refused(setting: str) -> None:
    with pytest.raises(GateError) as caught:
        compare([record()], [changed(setting)])
    message = str(caught.value)
    assert message.startswith(f"standin-qwen2-vl mquant w8a8/w4a8 textvqa: records differ in {setting} (baseline ")
    assert "\n" not in message
    assert (f"--allow {setting}" in message) is (setting not in NEVER_ALLOWED)


@pytest.mark.parametrize("setting", [name for name in CELL_SETTINGS if name not in NEVER_ALLOWED])
def test_allowed_differences_are_compared_and_said(setting: str) -> None:
    allow = () if setting == "method_version" else (setting,)
    check = only(record(), changed(setting), allow=allow)
    assert check.verdict is Verdict.PASS
    assert len(check.differences) == 1
    assert check.differences[0].startswith(f"{setting} ") and " -> " in check.differences[0]


def test_the_first_difference_in_order_is_named() -> None:
    other = replace(record(), cell=make_cell(limit=5, device="cuda", data_sha256="e" * 64))
    with pytest.raises(GateError, match="differ in data_sha256"):
        compare([record()], [other])


def saying(**said: str) -> Record:
    packages = {"ms-vlmeval": said.pop("vlmeval_version")} if "vlmeval_version" in said else {}
    prompts = said.pop("prompts_sha256", "")
    return record(prompts_sha256=prompts, environment={"packages": packages, **said})


@pytest.mark.parametrize("setting", ENVIRONMENT_SETTINGS)
def test_prompts_scorer_and_attention_must_be_equal_where_they_are_known(setting: str) -> None:
    one, two = (saying(**{setting: value}) for value in ("first", "second"))
    with pytest.raises(GateError, match=f"differ in {setting} \\(baseline first, candidate second\\)"):
        compare([one], [two])
    assert only(record(), two).verdict is Verdict.PASS
    if setting not in NEVER_ALLOWED:
        assert only(one, two, allow=(setting,)).differences == (f"{setting} first -> second",)


def test_the_same_answer_with_another_score_is_another_scorer() -> None:
    one, two = record(samples=samples([1.0, 0.5], ["a", "b"])), record(samples=samples([1.0, 1.0], ["a", "b"]))
    with pytest.raises(GateError, match=r"differ in scoring \(baseline 0.5 for row 1, candidate 1\)"):
        compare([one], [two])
    assert only(one, two, allow=("scoring",)).value == -25.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (right(30, 399), "row 399 is in one of the two records only"),
        ((*right(320), Sample("0", "x", 1.0)), "a row index stands twice"),
        ((*right(320)[:-1], Sample("399", "x", None)), "row 399 has no score of its own"),
    ],
)
def test_rows_that_cannot_be_paired(rows: tuple[Sample, ...], message: str) -> None:
    with pytest.raises(GateError, match=message):
        compare([record()], [record(samples=rows)])


def test_nothing_in_common() -> None:
    with pytest.raises(GateError, match="no cell is in both folders"):
        compare([record("mme")], [record("textvqa")])


def test_what_may_be_allowed() -> None:
    assert set(ALLOWABLE).isdisjoint(NEVER_ALLOWED)
    with pytest.raises(GateError, match="--allow limit makes no sense"):
        only(record(), record(), allow=("limit",))
    with pytest.raises(UnknownNameError, match="did you mean 'weights_sha256'"):
        only(record(), record(), allow=("weights_sha",))


def test_the_newest_record_of_a_setting_counts() -> None:
    newer = replace(record(num_right=250), cell=make_cell(method_version="2"))
    assert only(record(), record()).verdict is Verdict.PASS
    assert compare([record()], [record(), newer]).checks[0].verdict is Verdict.FAIL
    # A later failure of the very same cell does not replace its ok record; one of newer code does.
    assert compare([record()], [record(), failed_record()]).ok
    assert not compare([record()], [record(), failed_record(make_cell(method_version="2"))]).ok


def test_one_place_under_several_settings() -> None:
    sizes = [replace(record(), cell=OTHER["calibration.num_samples"](make_cell())), record()]
    report = compare(sizes, sizes)
    assert [check.variant for check in report.checks] == ["calibration.num_samples=128", "calibration.num_samples=256"]
    assert [check.verdict for check in compare(sizes, [record()]).checks] == [Verdict.PASS, Verdict.MISSING]
    with pytest.raises(GateError, match=r"calibration.num_samples \(baseline 256, candidate 64\)"):
        compare([record()], [replace(record(), cell=make_cell(calibration=calibration(num_samples=64)))])


def test_recipes_with_other_options_are_other_cells() -> None:
    cell = make_cell(recipe=Recipe("mquant", "w8a8", "w4a8", options={"rms": False}))
    report = compare([record()], [record(), replace(record(), cell=cell)])
    assert [(check.recipe, check.verdict) for check in report.checks] == [
        ("mquant", Verdict.PASS),
        ("mquant[rms=false]", Verdict.NEW),
    ]


def test_probes_are_left_out_and_said() -> None:
    probe = record("eq9", samples=())
    report = compare([record(), probe], [record()])
    assert report.ok and len(report.checks) == 1
    assert any("without rows (probes, figures) are not gated" in note for note in report.notes)


def test_notes() -> None:
    packages = ({"packages": {"torch": version}} for version in ("2.13.0", "2.14.0"))
    one, two = (record("mme", environment=said) for said in packages)
    notes = " | ".join(compare([one], [two]).notes)
    assert "rows of one image are taken as independent" in " | ".join(compare([record()], [record()]).notes)
    for expected in (
        "mme: the loss counts single answers",
        "mme: two rows share each image",
        "prompts are not",
        "torch 2.13.0 -> 2.14.0",
    ):
        assert expected in notes
    known = record(prompts_sha256="p", arrays={"cluster": [float(row) for row in range(400)]})
    assert compare([known], [known]).notes == ()


def test_settings_of_a_float_record_leave_out_what_it_does_not_have() -> None:
    assert "calibration.seed" not in compared_settings(record(method="none"))
    assert "backend" not in compared_settings(record(method="none"))
