"""The paper's tables: every place is filled by the plan, every number of the paper stands beside, and the forms.

After an intended change of the form: ``MQBENCH_UPDATE_GOLDEN=1 pytest tests/test_table_specs.py``, then read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fakes.plan_records import plan_records
from fakes.records import make_cell, make_record
from mqbench.harness.discover import find_method
from mqbench.harness.errors import TableError
from mqbench.harness.paper_figures import paper_lines
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import Record
from mqbench.harness.request import options_of
from mqbench.harness.select import select
from mqbench.harness.table import build, render
from mqbench.harness.table_formats import FORMATS
from mqbench.harness.table_places import find_places
from mqbench.harness.table_spec import RowSpec, TableSpec, load_spec, spec_numbers

GOLDEN = Path(__file__).parent / "golden"
TABLES = [*range(1, 20)]
OURS = [20]
SWEEPS = [9, 11, 12, 13, 14, 17]
"""Tables of times and memory alone."""

MEASURED = [number for number in TABLES if number not in {4, *SWEEPS}]
PAPER_ONLY_ROWS = {
    5: {"q-vlm", "qslaw"},
    6: {"mbq"},
    10: {"float, CUDA graph", "per token, unfused", "per row, not reordered"},
}
"""Rows without accuracy of ours: only in the paper, or only timed."""


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return plan_records()


def test_every_table_has_a_specification() -> None:
    assert spec_numbers() == [*TABLES, *OURS]


@pytest.mark.parametrize("number", MEASURED)
def test_the_plan_fills_every_place(records: list[Record], number: int) -> None:
    spec = load_spec(number)
    chosen = select(records, spec.filters, prefer=spec.prefer, tasks=spec.tasks)
    places = find_places(chosen, spec)
    wanted = [index for index, column in enumerate(spec.columns) if column.task and not column.is_sweep]
    empty = [
        place.labels
        for place in places
        if place.model != "-" and not PAPER_ONLY_ROWS.get(number, set()) & set(place.labels)
        if not all(place.records[index] for index in wanted)
    ]
    assert places and empty == []


@pytest.mark.parametrize("number", TABLES)
def test_every_number_of_the_paper_stands_somewhere(number: int) -> None:
    spec = load_spec(number)
    frame = build([], spec, may_be_empty=True)
    printed = {entry.text or entry.paper for row in frame.rows for entry in row.entries}
    keys = set(spec.paper_key) | {name for row in spec.row for name in row.paper}
    keys |= {spec.points.paper} if spec.points else set()
    columns = {column.paper: column for column in spec.columns if column.paper}
    for line in paper_lines(spec.paper):
        for name in columns.keys() - keys:
            value = line[name] if columns[name].text or not line[name] else float(line[name])
            assert not value or value in printed, (number, line, name)


@pytest.mark.parametrize("number", TABLES)
def test_options_are_written_as_records_store_them(number: int) -> None:
    """Records leave out options at their default; a specification that names one would never match."""
    spec = load_spec(number)
    for row in spec.row:
        for column in spec.columns:
            options = {**row.where.get("options", {}), **column.where.get("options", {})}
            if options:
                assert options_of(find_method(row.where["method"]), options) == options


@pytest.mark.parametrize(
    ("number", "style"), [(1, "md"), (2, "md"), (4, "tex"), (7, "md"), (7, "csv"), (16, "md"), (18, "md"), (19, "csv")]
)
def test_golden(records: list[Record], number: int, style: str) -> None:
    text = render(records, load_spec(number), style, may_be_empty=True)
    path = GOLDEN / f"table{number:02d}.{style}"
    if os.environ.get("MQBENCH_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_table_3_takes_its_rows_out_of_everything(records: list[Record]) -> None:
    rows = [row.labels[1:] for row in build(records, load_spec(3)).rows]
    methods = ("rtn", "smoothquant", "quarot", "mquant")
    four = [(bits, method) for bits in ("w8a8/w4a8", "w4a8/w4a8") for method in methods]
    assert rows == [("float/float", "none"), *four, ("w4a16/w4a16", "mquant")]


def test_the_deltas_of_table_8_are_to_the_same_float(records: list[Record]) -> None:
    base, *others = build(records, load_spec(8)).rows
    assert len({row.entries[0].measured for row in others}) == 3
    for row in others:
        entry, reference = row.entries[0], base.entries[0]
        assert entry.measured is not None and reference.measured is not None
        assert entry.delta == entry.measured - reference.measured


def test_table_18_takes_its_columns_from_two_recipes(records: list[Record]) -> None:
    for row in build(records, load_spec(18)).rows:
        with_, without = (entry.measured for entry in row.entries[:2])
        assert None not in (with_, without) and with_ != without


def test_each_model_is_a_body_of_its_own() -> None:
    cells = [make_cell("mme", method, "w4a8/w4a8", model) for model in "ab" for method in ("none", "mquant")]
    records = [make_record(cell) for cell in cells]
    rows = build(records, load_spec(7)).rows
    assert [row.labels[0] for row in rows] == ["a"] * 4 + ["b"] * 4
    assert "standin" not in build(records, load_spec(7)).caption


def test_a_model_with_rows_of_another_table_alone_gives_way_to_one_with_more() -> None:
    """The whole MQuant also stands in Table 3; that without RMS is Table 7's own."""
    own = options_of(find_method("mquant"), {"rms": False})
    ablation = make_cell("mme", model="b", recipe=Recipe("mquant", "w4a8", "w4a8", 0, own))
    shared = [make_cell("mme", "mquant", "w4a8/w4a8", model) for model in "ab"]
    both = [make_record(cell) for cell in (*shared, ablation)]
    assert [row.labels[0] for row in build(both, load_spec(7)).rows] == ["b"] * 4
    assert "a" in {row.labels[0] for row in build(both[:2], load_spec(7)).rows}


def test_a_quantized_folder_stands_with_the_float_of_its_model() -> None:
    cells = [make_cell("mme", "none", model="a"), make_cell("mme", "mquant", "w4a8/w4a8", "a@mine")]
    records = [make_record(cell, score) for cell, score in zip(cells, (100.0, 90.0), strict=True)]
    rows = build(records, load_spec(8)).rows
    mine = {row.labels[1]: row.entries[3] for row in rows if row.labels[0] == "a@mine"}
    assert (mine["float"].measured, mine["256"].measured, mine["256"].delta) == (100.0, 90.0, -10.0)
    assert len(rows) == 8


def test_what_only_one_row_may_vary_is_checked_in_the_others() -> None:
    """Table 8 varies the number of samples, nothing else; Table 7 does not."""
    info = make_cell().calibration
    assert info is not None
    records = [
        make_record(make_cell("mme", bits="w4a8/w4a8", calibration=type(info)("d", "calib", num, seed, "c" * 64)))
        for num, seed in ((128, 0), (256, 0))
    ]
    assert len(build(records, load_spec(8)).rows) == 4
    records[0] = make_record(make_cell("mme", bits="w4a8/w4a8", calibration=type(info)("d", "calib", 128, 1, "c" * 64)))
    with pytest.raises(TableError, match=r"differ in calibration\.seed"):
        build(records, load_spec(8))


def test_nothing_measured_shows_the_paper_and_says_how_to_measure() -> None:
    frame = build([], load_spec(7))
    assert [row.entries[0].measured for row in frame.rows] == [None] * 4
    assert [row.entries[0].paper for row in frame.rows] == [84.43, 71.44, 78.95, 84.32]
    assert "Nothing was measured" in frame.caption and "results/plans/paper.toml" in frame.caption
    assert "Qwen2-VL-7B" in frame.caption


def test_a_label_says_what_ran() -> None:
    cell = make_cell("mme", recipe=Recipe("awq", "float", "w4a16-g128"))
    labels = {row.labels[1:] for row in build([make_record(cell)], load_spec(15)).rows}
    assert ("awq", "float/w4a16-g128") in labels
    assert ("mquant", "float/w4a16-g64") in labels


def spec_of(**changes: object) -> TableSpec:
    spec = load_spec(7)
    return TableSpec(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, **changes})  # type: ignore[arg-type]


def test_a_paper_row_that_is_not_there_is_an_error() -> None:
    row = RowSpec(("{bits}", "-", "-", "-"), {"method": "none"}, {"static": "perhaps"})
    with pytest.raises(TableError, match="has no row"):
        build([], spec_of(row=(row,)))
    with pytest.raises(TableError, match="no column 'dynamic'"):
        build([], spec_of(row=(RowSpec(row.labels, row.where, {"dynamic": "yes"}),)))
    with pytest.raises(TableError, match="name more columns"):
        build([], spec_of(row=(RowSpec(row.labels, row.where, {"static": "yes"}),)))


def test_a_label_with_an_unknown_setting_is_an_error() -> None:
    row = RowSpec(("{bit}", "-", "-", "-"), {"method": "none"}, {"static": ""})
    with pytest.raises(TableError, match=r"'\{bit\}' names no setting"):
        build([], spec_of(row=(row,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number = [", "not valid TOML"),
        ('columns = ["magic"]', "magic"),
        ('columns = ["recovery"]\nrows = ["bits"]\n[[row]]\nlabels = []', "must start with 'model'"),
        ('columns = ["recovery"]\nrows = ["model", "x"]\n[[row]]\nlabels = []', r"needs 1 label"),
        ('columns = [{header = "x", formula = "recovery", of = "y"}]\nrows = ["model"]', "reads column 'y'"),
        ('columns = ["recovery"]\nrows = ["model"]\ncolour = 1', "colour"),
    ],
)
def test_wrong_specifications_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    head = "" if text.startswith("number") else 'number = 1\ntitle = "t"\n'
    (tmp_path / "table01.toml").write_text(head + text)
    with pytest.raises(TableError, match=message):
        load_spec(1, tmp_path)


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("number", TABLES)
def test_every_table_has_every_form(records: list[Record], number: int, style: str) -> None:
    text = render(records, load_spec(number), style, may_be_empty=True)
    assert text.endswith("\n") and "nan" not in text and "None" not in text
