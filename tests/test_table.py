"""Tables: derived columns, missing values, mixed settings, and the four printed forms (golden files).

After an intended change of the form: ``MQBENCH_UPDATE_GOLDEN=1 pytest tests/test_table.py``, then read the diff.
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.records import CALIBRATION, failed_record, make_cell, make_record
from mqbench.harness.errors import TableError
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import Record
from mqbench.harness.select import parse_filters, select
from mqbench.harness.table import build, load_spec, render
from mqbench.harness.table_formulas import recovery
from mqbench.harness.table_spec import Column, TableSpec, without_choice

GOLDEN = Path(__file__).parent / "golden"
TASKS = {"textvqa": 80.0, "docvqa": 90.0, "ocrbench": 700.0, "mme": 2000.0, "scienceqa": 80.0}


def rows_of(model: str = "standin-qwen2-vl") -> list[Record]:
    """Float, QuaRot and MQuant with known ratios to float: 0.5 and 0.99; RTN has one score and one failure."""
    records = [make_record(make_cell(task, "none", model=model), score) for task, score in TASKS.items()]
    for method, factor in (("quarot", 0.5), ("mquant", 0.99)):
        records += [make_record(make_cell(task, method, model=model), score * factor) for task, score in TASKS.items()]
    records.append(make_record(make_cell("mme", "rtn", model=model), 0.0))
    records.append(failed_record(make_cell("ocrbench", "rtn", model=model)))
    return records


@pytest.mark.parametrize("style", ["terminal", "md", "tex", "csv"])
def test_golden(style: str) -> None:
    text = render(rows_of() + rows_of("qwen2-vl-7b"), load_spec(3), style, width=200)
    path = GOLDEN / f"table03.{'txt' if style == 'terminal' else style}"
    if os.environ.get("MQBENCH_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_a_narrow_terminal_stacks_each_place() -> None:
    wide, narrow = (render(rows_of(), load_spec(3), width=width) for width in (200, 100))
    assert "40.00 (-40.00)" in wide
    assert "40.00 (-40.00)" not in narrow
    assert "(-40.00)" in narrow
    assert max(map(len, narrow.splitlines())) <= 100


def as_dicts(records: list[Record]) -> dict[str, dict[str, str]]:
    return {row["method"]: row for row in csv.DictReader(io.StringIO(render(records, load_spec(3), "csv")))}


def test_derived_columns() -> None:
    rows = as_dicts(rows_of())
    assert rows["quarot"]["T.VQA delta"] == "-40.00"
    assert rows["quarot"]["SciQA"] == "40.00"
    assert rows["quarot"]["Recovery %"] == "50.0"
    assert rows["mquant"]["Recovery %"] == "99.0"


def test_missing_and_failed_are_dashes_and_zero_is_zero() -> None:
    rtn = as_dicts(rows_of())["rtn"]
    assert rtn["MME"] == "0"
    assert {rtn[name] for name in ("T.VQA", "T.VQA delta", "OCRBench", "Recovery %")} == {"-"}


def test_the_papers_figures_stand_beside_measured_ones() -> None:
    rows = as_dicts(rows_of("qwen2-vl-7b"))
    assert rows["mquant"]["T.VQA paper"] == "84.43"
    assert rows["none"]["MME paper"] == "2319"
    assert rows["mquant"]["SciQA paper"] == "-"


def test_no_delta_without_a_float_baseline() -> None:
    rows = as_dicts([make_record(make_cell("mme", "mquant"), 1000.0)])
    assert rows["mquant"]["MME delta"] == "-"
    assert rows["mquant"]["Recovery %"] == "-"


def test_recovery_needs_every_benchmark_of_the_baseline() -> None:
    assert recovery({"a": 1.0}, {"a": 2.0, "b": 2.0}) is None
    assert recovery({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 2.0}) == 75.0
    assert recovery({"a": 1.0}, {"a": 0.0}) is None
    assert recovery({"a": 1.0}, {}) is None


def test_the_newest_record_of_a_cell_counts_but_a_failure_never_replaces_a_result() -> None:
    cell = make_cell("mme")
    rows = as_dicts([make_record(cell, 1.0), make_record(cell, 2.0), failed_record(cell)])
    assert rows["mquant"]["MME"] == "2"


@pytest.mark.parametrize(
    ("one", "two", "named"),
    [
        ({"limit": 8}, {"limit": None}, "limit .8 | none."),
        ({"task": "mme", "limit": 8}, {"limit": None}, "limit"),
        ({"recipe": Recipe("mquant", "w8a8", "w4a8", seed=1)}, {}, "recipe.seed"),
        ({"data_sha256": "0"}, {"method": "quarot"}, "data_sha256"),
        ({"weights_sha256": "0"}, {"task": "mme"}, "weights_sha256"),
        ({"method_version": "2"}, {"task": "mme"}, "method_version"),
        ({"device": "NVIDIA H100"}, {"method": "none"}, "device"),
    ],
)
def test_different_settings_never_share_a_table(one: dict, two: dict, named: str) -> None:
    records = [make_record(make_cell(**one)), make_record(make_cell(**two))]
    with pytest.raises(TableError, match=f"differ in {named}.*--where"):
        build(records, load_spec(3))


def test_a_filter_chooses() -> None:
    records = [
        make_record(make_cell(limit=8), 1.0),
        make_record(make_cell(), 2.0),
        make_record(make_cell(method="none")),
    ]
    frame = build(records, load_spec(3), parse_filters(["limit=none"]))
    assert [row.entries[0].measured for row in frame.rows] == [82.5, 2.0]


def test_any_lifts_a_filter_of_the_specification() -> None:
    records = [make_record(make_cell("mme", "none")), make_record(make_cell("mme"), 1.0)]
    spec = TableSpec(1, "t", ("method",), (Column("O", task="mme"),), filters={"method": "none"})
    assert [row.labels for row in build(records, spec).rows] == [("none",)]
    assert [row.labels for row in build(records, spec, parse_filters(["method=any"])).rows] == [("mquant",), ("none",)]


def with_options(options: dict, **changes: Any) -> Record:
    return make_record(make_cell("mme", recipe=Recipe("mquant", "w8a8", "w4a8", options=options), **changes), 1.0)


def test_the_default_recipe_is_preferred_and_others_stand_by_their_label() -> None:
    records = [make_record(make_cell("mme", "none")), with_options({}), with_options({"rms": False})]
    assert [row.labels[2] for row in build(records, load_spec(3)).rows] == ["none", "mquant"]
    frame = build(records, without_choice(load_spec(3)))
    assert [row.labels[2] for row in frame.rows] == ["none", "mquant", "mquant[rms=false]"]
    assert [row.labels[2] for row in build(records[::2], load_spec(3)).rows] == ["none", "mquant[rms=false]"]


def test_the_papers_figures_belong_to_the_default_recipe() -> None:
    records = [with_options({}, model="qwen2-vl-7b"), with_options({"rms": False}, model="qwen2-vl-7b")]
    rows = build(records, without_choice(load_spec(3))).rows
    assert [row.entries[3].paper for row in rows] == [2269.0, None]


def test_preferences_count_per_model() -> None:
    few = replace(CALIBRATION, num_samples=8)
    records = [with_options({}), with_options({}, calibration=few), with_options({}, model="b", calibration=few)]
    rows = build(records, load_spec(3)).rows
    assert [row.labels[0] for row in rows] == ["b", "standin-qwen2-vl"]
    assert "8 samples" in build(records, load_spec(3)).caption


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["options={}"], ["none", "mquant"]),
        (["options.rms=false"], ["none", "mquant[rms=false]"]),
        (['options={"rms":false}'], ["none", "mquant[rms=false]"]),
        (["recipe.label=mquant[rms=false]"], ["mquant[rms=false]"]),
    ],
)
def test_options_can_be_filtered(words: list[str], labels: list[str]) -> None:
    records = [make_record(make_cell("mme", "none")), with_options({}), with_options({"rms": False})]
    assert [row.labels[2] for row in build(records, without_choice(load_spec(3)), parse_filters(words)).rows] == labels


def test_an_option_that_no_record_has_is_refused() -> None:
    with pytest.raises(TableError, match=r"no record has a setting 'options\.rmss'"):
        select([with_options({"rms": False})], {"options.rmss": False})


def test_rows_may_be_any_setting() -> None:
    records = [with_options({"rms": value}) for value in (False, "auto")] + [make_record(make_cell("mme", "none"))]
    spec = TableSpec(1, "t", ("options.rms", "seed"), (Column("O", task="mme"),))
    assert [row.labels for row in build(records, spec).rows] == [("-", "-"), ("auto", "0"), ("false", "0")]


def test_two_records_for_one_place_are_refused() -> None:
    other = make_cell("mme", recipe=Recipe("mquant", "w4a8", "w4a8"))
    spec = TableSpec(1, "t", ("method",), (Column("O", task="mme"),))
    with pytest.raises(TableError, match="differ in bits"):
        build([make_record(make_cell("mme")), make_record(other)], spec)


def test_rows_of_seeds_may_differ_in_the_seed() -> None:
    records = [make_record(make_cell("mme", recipe=Recipe("mquant", "w8a8", "w4a8", seed=seed))) for seed in (0, 1)]
    spec = TableSpec(1, "t", ("method", "seed"), (Column("O", task="mme"),))
    assert [row.labels for row in build(records, spec).rows] == [("mquant", "0"), ("mquant", "1")]


@given(st.lists(st.sampled_from([(m, o, n) for m in "ab" for o in (0, 1) for n in (8, 256)]), min_size=1, unique=True))
def test_preferring_never_loses_a_model_and_never_mixes(chosen: list[tuple[str, int, int]]) -> None:
    records = [
        with_options({"rms": False} if option else {}, model=model, calibration=replace(CALIBRATION, num_samples=num))
        for model, option, num in chosen
    ]
    prefer = {"options": {}, "calibration.num_samples": 256}
    left = [(record.cell.model, record.cell.recipe.label) for record in select(records, {}, prefer=prefer)]
    assert {model for model, _ in left} == {model for model, _, _ in chosen}
    for model in "ab":
        labels = {label for name, label in left if name == model}
        assert not ("mquant" in labels and len(labels) > 1)


def test_calibration_filters_keep_the_float_baseline() -> None:
    records = [make_record(make_cell(method="none")), make_record()]
    assert len(select(records, {"calibration.num_samples": CALIBRATION.num_samples})) == 2
    assert len(select(records, {"calibration.num_samples": 1})) == 1


@pytest.mark.parametrize(
    ("filters", "message"), [(["limit"], "NAME=VALUE"), (["limits=8"], "no record has a setting 'limits'")]
)
def test_bad_filters(filters: list[str], message: str) -> None:
    with pytest.raises(TableError, match=message):
        select([make_record()], parse_filters(filters))


def test_nothing_to_show_says_what_to_do() -> None:
    with pytest.raises(TableError, match="mqbench eval"):
        render([failed_record()], load_spec(3))


def test_unknown_table_format_and_formula(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"table 99 has no specification; known: .*3"):
        load_spec(99)
    with pytest.raises(TableError, match="unknown format 'html'"):
        render([make_record()], load_spec(3), "html")
    (tmp_path / "table01.toml").write_text(
        'number = 1\ntitle = "t"\nrows = ["model"]\n[[columns]]\nheader = "x"\nformula = "magic"\n'
    )
    with pytest.raises(TableError, match="unknown formula 'magic'"):
        load_spec(1, tmp_path)


def test_a_metric_can_be_shown_instead_of_the_score() -> None:
    spec = TableSpec(1, "t", ("method",), (Column("O", task="mme"),), value="Overall")
    assert build([make_record(make_cell("mme"), 7.0)], spec).rows[0].entries[0].measured == 7.0
    with pytest.raises(TableError, match="no metric 'x'; it has: Overall"):
        build([make_record(make_cell("mme"))], TableSpec(1, "t", ("method",), (Column("O", task="mme"),), value="x"))


def test_caption_says_what_a_reader_must_know() -> None:
    text = build(rows_of(), load_spec(3)).caption
    for needed in (
        "synthetic stand-in",
        "Device: cpu, float32",
        "quantize-dequantize",
        "256 samples",
        "seed 0",
        "c" * 12,
    ):
        assert needed in text
