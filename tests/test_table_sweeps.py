"""Tables 9 to 14 and 17 from records of sweeps: formulas, devices apart, out of memory, clamping, golden files.

After an intended change of the form: ``MQBENCH_UPDATE_GOLDEN=1 pytest tests/test_table_sweeps.py``, then read the diff.
"""

from __future__ import annotations

import csv
import io
import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.plan_records import plan_records
from fakes.records import make_record
from fakes.sweeps import LARGE, SMALL, SPEEDS, no_memory, of_systems, point, sweep_records
from mqbench.harness.bench.catalog import CONTENDERS
from mqbench.harness.errors import TableError
from mqbench.harness.figure import compose, load_figure
from mqbench.harness.paper_figures import find_line, paper_lines
from mqbench.harness.record import Record
from mqbench.harness.runtime.systems import SYSTEMS
from mqbench.harness.select import parse_filters
from mqbench.harness.store import RecordStore
from mqbench.harness.sweep import outcome
from mqbench.harness.sweep.figures import TIMED, TOTAL
from mqbench.harness.sweep.model import find_sweep_model
from mqbench.harness.sweep.spec import PAPER, QUANTIZE, SWEEPS, TASK_PREFIX, points_of
from mqbench.harness.sweep_records import (
    HEADLINES,
    OUT_OF_MEMORY,
    SWEEP_PREFIX,
    SWEEPS_NAME,
    load_records,
    measured_points,
    ran_out_of_memory,
    to_compare,
)
from mqbench.harness.table import build, render
from mqbench.harness.table_commands import run_table
from mqbench.harness.table_formulas import COMPARISONS
from mqbench.harness.table_spec import SPECS, TableSpec, load_spec

GOLDEN = Path(__file__).parent / "golden"
TABLES = (9, 10, 11, 12, 13, 14, 17)
IMAGE = {"image_px": 840, "images": 1}
CONTRACT = {
    "prefill_ms", "limit_ms", "decode_ms", "decode_total_ms", "total_ms", "peak_bytes",
}  # fmt: skip
"""Figures of a system that sweeps write and tables read."""


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return sweep_records()


def rows_of(records: list[Record], number: int, filters: Any = None) -> list[dict[str, str]]:
    text = render(records, load_spec(number), "csv", filters)
    return list(csv.DictReader(io.StringIO(text)))


def row_of(records: list[Record], number: int, device: str, label: str) -> dict[str, str]:
    head = load_spec(number).rows[2]
    (row,) = [row for row in rows_of(records, number) if device in row.values() and row[head] == label]
    return row


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["md", "csv", "tex"])
@pytest.mark.parametrize("number", TABLES)
def test_golden(records: list[Record], number: int, style: str) -> None:
    known = records + [record for record in plan_records() if number == 10 and record.cell.task == "mme"]
    text = render(known, load_spec(number), style)
    path = GOLDEN / f"sweep_table{number:02d}.{style}"
    if os.environ.get("MQBENCH_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_a_terminal_blanks_model_and_device_that_repeat(records: list[Record]) -> None:
    lines = render(records, load_spec(14), width=200).splitlines()
    table = lines[: lines.index(next(line for line in lines if line.startswith("Table 14.")))]
    assert [sum(device in line for line in table) for device in (LARGE, SMALL)] == [1, 1]


@pytest.mark.parametrize("number", TABLES)
def test_nothing_measured_is_the_paper_beside_dashes(number: int) -> None:
    spec = load_spec(number)
    frame = build([], spec)
    entries = [entry for row in frame.rows for entry in row.entries]
    assert {entry.measured for entry in entries} == {None} and not any(entry.text for entry in entries)
    assert sum(entry.paper is not None for entry in entries) >= len(paper_lines(spec.paper))
    assert "Nothing was measured" in frame.caption
    for sweep in spec.sweeps:
        assert f"'mqbench sweep {sweep.removeprefix('sweep_')}'" in frame.caption


@pytest.mark.parametrize("number", TABLES)
def test_every_row_of_the_paper_has_its_place(records: list[Record], number: int) -> None:
    """In the body of the GPU that everything was measured on, and once in it."""
    spec = load_spec(number)
    rows = [row for row in build(records, spec).rows if row.labels[1] == LARGE]
    for line in paper_lines(spec.paper):
        wanted = {
            column.header: float(line[column.paper]) for column in spec.columns if column.paper and line[column.paper]
        }
        headers = [column.header for column in spec.columns]
        found = [
            row
            for row in rows
            if {h: e.paper for h, e in zip(headers, row.entries, strict=True) if e.paper is not None} == wanted
        ]
        assert len(found) == 1, line


def test_table_11_is_a_part_of_table_17() -> None:
    for line in paper_lines("table11.csv"):
        other = find_line("table17.csv", {"image_side_px": line["image_side_px"]})
        assert other is not None
        assert {name: line[name] for name in other} == dict(other)


# --- formulas --------------------------------------------------------------------------------------------------------


def test_speedups_are_old_over_new_minus_one_in_one_record(records: list[Record]) -> None:
    row = row_of(records, 17, LARGE, "840")
    assert float(row["MQuant speedup % (old/new-1)"]) == 100.0  # half of the time
    assert float(row["AWQ speedup % (old/new-1)"]) == -20.0
    assert float(row["over graphed BF16 % (old/new-1)"]) == 60.0
    assert float(row["MQuant / roofline"]) == 2.0
    assert (row["MQuant (s)"], row["MQuant (s) paper"]) == ("0.210", "0.210")


def test_memory_is_compared_in_the_same_way(records: list[Record]) -> None:
    row = row_of(records, 17, LARGE, "840")
    used = 840 / 1024 * 1.25
    assert float(row["BF16 (GiB)"]) == pytest.approx(15 + used, abs=0.005)
    assert float(row["MQuant improve % (old/new-1)"]) == pytest.approx(100 * ((15 + used) / (5 + used) - 1), abs=0.005)


def test_the_papers_memory_is_in_gib() -> None:
    """AWQ saves 12 of 16 bits per weight of the LLM's linear layers, less scale and zero point per 128 weights."""
    attention = 3584 * 3584 * 2 + 3584 * 512 * 2
    weights = 28 * (attention + 3 * 3584 * 18944)
    saved = weights * 12 / 8 - weights / 128 * 2.5
    line = find_line("table17.csv", {"image_side_px": "840"})
    assert line is not None
    assert float(line["bf16_memory_gb"]) - float(line["awq_memory_gb"]) == pytest.approx(saved / 2**30, abs=0.01)
    assert saved / 1e9 > 9.5


def test_rows_of_systems_are_compared_with_the_first(records: list[Record]) -> None:
    rows = [row for row in rows_of(records, 10) if row["latency on"] == LARGE]
    gains = {row["activations"]: row["Speedup % (old/new-1)"] for row in rows}
    assert gains["MSQ+AIFS"] == "100.0" and gains["MSQ"] == "75.0" and gains["float"] in ("0.0", "-20.0")
    latencies = {row["activations"]: row["Latency (s)"] for row in rows}
    assert latencies["MSQ+AIFS"] == "0.850"


def test_accuracy_and_latency_of_one_system_stand_in_one_row() -> None:
    accuracy = [
        replace(record, cell=replace(record.cell, model="qwen2-vl-7b"))
        for record in plan_records()
        if record.cell.model == "standin-qwen2-vl"
    ]
    frame = build(accuracy + sweep_records(), load_spec(10))
    (row, other) = [row for row in frame.rows if row.labels[2] == "MSQ+AIFS"]
    assert [row.labels[1], other.labels[1]] == [LARGE, SMALL]
    assert row.entries[:4] == other.entries[:4] and None not in [entry.measured for entry in row.entries]
    assert row.entries[5].measured == 0.85 and other.entries[5].measured == pytest.approx(2.55)
    assert "simulated" in frame.caption and f"Timed on {LARGE}" in frame.caption


def test_stages_of_table_12(records: list[Record]) -> None:
    prefill, whole, decode = [row for row in rows_of(records, 12) if row["device"] == LARGE]
    assert (prefill["MQuant"], prefill["MQuant, GEMV"]) == ("850.00", "-")
    assert (decode["MQuant"], decode["MQuant, GEMV"], decode["MQuant, GEMV paper"]) == ("-", "10.00", "8.20")
    assert whole["BF16 eager"] == "3000.00" and whole["BF16 eager paper"] == "-"
    gain = "Speedup over per token % (old/new-1)"
    assert {row[gain] for row in (prefill, whole, decode)} == {"33.3"}
    assert (prefill[f"{gain} paper"], decode[f"{gain} paper"]) == ("23.0", "100.0")


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_gains_of_two_ways_multiply(new: float, old: float) -> None:
    gain = COMPARISONS["gain_percent"]
    assert (1 + gain(new, old) / 100) * (1 + gain(old, new) / 100) == pytest.approx(1)
    assert gain(new, new) == 0 and gain(1, 2) == 100 and COMPARISONS["times"](3, 2) == 1.5


def test_systems_of_different_groups_are_compared_through_the_baseline() -> None:
    metrics = of_systems(prefill_ms=100.0, decode_ms=5.0, peak_bytes=8.0) | {"interleaved": 0.0}
    metrics |= {"mquant-w4a8.group": 1.0, "mquant-w4a8.ratio": 1.8, "bf16-eager.ratio": 1.0, "bf16-graph.ratio": 1.2}
    record = point("latency", IMAGE, metrics)

    def gain(name: str, figure: str) -> float | None:
        pair = to_compare(record, f"mquant-w4a8.{figure}", f"{name}.{figure}")
        return None if pair is None else COMPARISONS["gain_percent"](*pair)

    assert gain("bf16-eager", "prefill_ms") == pytest.approx(80)
    assert gain("bf16-graph", "prefill_ms") == pytest.approx(50)
    assert gain("bf16-eager", "decode_ms") is None
    assert gain("awq-w4a16-g128", "prefill_ms") is None
    assert gain("bf16-eager", "peak_bytes") == pytest.approx(100)
    assert gain("awq-w4a16-g128", "decode_ms") is None
    assert "ran in groups" in build([record], load_spec(17)).caption


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_no_memory_and_not_measured_are_told_apart(records: list[Record]) -> None:
    small = row_of(records, 17, SMALL, "5600 (clamped)")
    assert (small["BF16 eager (s)"], small["BF16 (GiB)"], small["BF16 eager (s) paper"]) == ("OOM", "OOM", "8.380")
    assert small["MQuant speedup % (old/new-1)"] == "-"
    assert small["MQuant (s)"] == "2.688" and small["over graphed BF16 % (old/new-1)"] == "60.00"
    missing = row_of(records, 17, SMALL, "560")
    assert (missing["MQuant (s)"], missing["visual tokens"], missing["MQuant (s) paper"]) == ("-", "-", "0.211")
    assert row_of(records, 13, SMALL, "4")["all MQuant (s)"] == "OOM"
    assert row_of(records, 13, SMALL, "4")["all improve % (old/new-1)"] == "-"
    assert "OOM: out of memory" in build(records, load_spec(17)).caption


def test_a_point_without_memory_may_know_its_size() -> None:
    lost = no_memory("latency", IMAGE | {"image_px": 5600}, metrics={"visual_tokens": 16384.0, "clamped": 1.0})
    row = row_of([lost], 17, LARGE, "5600 (clamped)")
    assert (row["visual tokens"], row["MQuant (s)"]) == ("16384", "OOM")


def test_only_systems_that_ran_can_run_out_of_memory() -> None:
    record = point("latency", IMAGE, {"bf16-eager.prefill_ms": 1.0}, failures={"fp8-token": "unavailable: no kernel"})
    assert not ran_out_of_memory(record, "fp8-token.prefill_ms")
    assert not ran_out_of_memory(record, "mquant-w4a8.prefill_ms")
    assert not ran_out_of_memory(no_memory("latency", IMAGE), "visual_tokens")
    assert ran_out_of_memory(no_memory("latency", IMAGE), "mquant-w4a8.prefill_ms")


def test_another_failure_is_not_shown_and_no_failure_replaces_a_result() -> None:
    good = point("latency", IMAGE, of_systems(prefill_ms=100.0))
    broken = replace(no_memory("latency", IMAGE), reason="RuntimeError: broken")
    assert measured_points([broken], {"sweep_latency"}, {}) == []
    assert measured_points([good, no_memory("latency", IMAGE)], {"sweep_latency"}, {}) == [good]
    newer = point("latency", IMAGE, of_systems(prefill_ms=50.0))
    assert measured_points([no_memory("latency", IMAGE), good, newer], {"sweep_latency"}, {}) == [newer]


def test_code_of_today_counts_and_that_of_yesterday_can_be_asked_for() -> None:
    old = point("latency", IMAGE, of_systems(prefill_ms=100.0), method_version="1-old")
    new = point("latency", IMAGE, of_systems(prefill_ms=50.0), method_version="1-new")
    assert measured_points([old, new], {"sweep_latency"}, {}) == [new]
    assert measured_points([old, new], {"sweep_latency"}, {"method_version": "1-old"}) == [old]
    lost = replace(no_memory("latency", IMAGE), cell=new.cell)
    assert measured_points([old, lost], {"sweep_latency"}, {}) == [lost]
    other = point("latency", IMAGE | {"image_px": 560}, of_systems(prefill_ms=50.0), method_version="1-old")
    assert len(build([new, other], load_spec(17)).rows) > 2


def test_sizes_that_the_paper_lacks_are_rows_too_but_not_in_table_11(records: list[Record]) -> None:
    extra = [*records, point("latency", IMAGE | {"image_px": 896}, of_systems(prefill_ms=100.0))]
    sizes = [row["image side (px)"] for row in rows_of(extra, 17) if row["device"] == LARGE]
    assert sizes[2:5] == ["840", "896", "1120"] and "2800" in sizes and "2880" not in sizes
    assert row_of(extra, 17, LARGE, "896")["MQuant (s) paper"] == "-"
    assert row_of(extra, 17, LARGE, "2800")["MQuant (s) paper"] == "3.297"
    sizes = [row["image side (px)"] for row in rows_of(extra, 11) if row["device"] == LARGE]
    assert sizes == ["840", "1960", "3080", "5600 (clamped)"]


# --- what counts -----------------------------------------------------------------------------------------------------


def test_devices_never_share_a_row(records: list[Record]) -> None:
    rows = rows_of(records, 9)
    assert [row["device"] for row in rows] == [LARGE] * 5 + [SMALL] * 5
    assert [row["tokens"] for row in rows] == ["100", "900", "2500", "4900", "8100"] * 2


def test_the_cpu_counts_only_where_a_filter_asks() -> None:
    own = sweep_records(["cpu"])
    assert "Nothing was measured" in build(own, load_spec(17)).caption
    frame = build(own, load_spec(17), parse_filters(["device=cpu"]))
    assert {row.labels[1] for row in frame.rows} == {"cpu"} and "unctional check on a CPU" in frame.caption
    assert "CPU" not in build([*own, *sweep_records()], load_spec(17)).caption


def test_simulated_records_never_count() -> None:
    record = point("latency", IMAGE, of_systems(prefill_ms=100.0), "cpu", backend="simulated")
    for filters in ({}, {"device": "cpu"}, {"backend": "simulated"}):
        assert measured_points([record], {"sweep_latency"}, filters) == []


def test_filters_reach_sweeps(records: list[Record]) -> None:
    rows = rows_of(records, 17, parse_filters([f"device={SMALL}"]))
    assert {row["device"] for row in rows} == {SMALL}
    with pytest.raises(TableError, match=r"no record has a setting 'options\.image'"):
        build(records, load_spec(17), {"options.image": 1})


def test_two_records_for_one_point_name_what_differs(records: list[Record]) -> None:
    other = point("latency", IMAGE | {"text_tokens": 100}, of_systems(prefill_ms=1.0))
    with pytest.raises(TableError, match=r"differ in options\.text_tokens .*--where options\.text_tokens="):
        build([*records, other], load_spec(17))
    assert build([*records, other], load_spec(17), {"options.text_tokens": 15}).rows


def test_other_weights_are_refused_in_one_body(records: list[Record]) -> None:
    other = point("latency", IMAGE | {"image_px": 896}, of_systems(prefill_ms=1.0), weights_sha256="random:1")
    with pytest.raises(TableError, match="weights_sha256"):
        build([*records, other], load_spec(17))


def test_accuracy_of_the_preferred_calibration_is_not_lost_to_sweeps() -> None:
    """Records of sweeps have no calibration; they must not make those with another number of samples disappear."""
    few = [
        make_record(replace(record.cell, model="qwen2-vl-7b", calibration=replace(info, num_samples=8)))
        for record in plan_records()
        if (info := record.cell.calibration) and record.cell.task == "mme" and record.cell.recipe.label == "mquant"
        and record.cell.recipe.bits == "w4a8/w4a8" and info.num_samples == 256
    ]  # fmt: skip
    frame = build(few + sweep_records([LARGE]), load_spec(10))
    assert [row.entries[3].measured for row in frame.rows if row.labels[2] == "MSQ+AIFS"] == [82.5]


def test_the_caption_says_what_was_timed(records: list[Record]) -> None:
    text = build(records, load_spec(17)).caption
    for needed in (
        f"Timed on {LARGE} (driver 550.1, mqbench 0.1.0, torch 2.13.0, transformers 5.17.0, commit 0123456789ab)",
        "qwen2-vl-7b, bfloat16, random weights, medians of 20 repeats",
        f"Timed on {SMALL}",
        "Clamped: the model makes the image smaller",
        "[paper: Qwen2-VL-7B]",
    ):
        assert needed in text
    assert "Nothing was measured" not in text and "Clamped" not in build(records, load_spec(14)).caption
    dirty = replace(records[0], environment={"git": {"commit": "f" * 40, "dirty": True}})
    assert "(commit ffffffffffff with changes)" in build([dirty], load_spec(17)).caption
    assert "(versions unknown)" in build([replace(records[0], environment={})], load_spec(17)).caption


def test_what_is_missing_of_a_table_is_named(records: list[Record]) -> None:
    latency = [record for record in records if record.cell.task == "sweep_latency"]
    text = build(latency, load_spec(17)).caption
    assert "Nothing was measured (memory)" in text and "'mqbench sweep memory'" in text
    assert "sweep latency" not in text


# --- what mqbench sweep writes ----------------------------------------------------------------------------------------


def planned_records() -> list[Record]:
    """Every point of the paper's protocol, with every figure of every system."""
    times = dict.fromkeys(CONTRACT, 1.0)
    model = find_sweep_model("qwen2-vl-7b", None, {}, None)
    records = []
    for sweep in SWEEPS:
        for one in points_of(sweep, PAPER) if sweep != QUANTIZE else ():
            cell = one.cell(model, version="1", device=LARGE, dtype="bfloat16", seed=0)
            metrics = {f"{name}.{figure}": value for name in one.systems for figure, value in times.items()}
            records.append(make_record(cell, 1.0, metrics={**metrics, "visual_tokens": 4.0}, samples=()))
    return records


@pytest.mark.parametrize("number", TABLES)
def test_the_protocol_fills_every_place(number: int) -> None:
    spec = load_spec(number)
    rows = build(planned_records(), spec).rows
    empty = [
        (row.labels, column.header)
        for row in rows
        for column, entry in zip(spec.columns, row.entries, strict=True)
        if entry.measured is None and column.is_sweep
    ]
    without_gemv = [(name, "MQuant, GEMV") for name in ("prefill, linear layers (ms)", "prefill, whole model (ms)")]
    wanted = [*without_gemv, ("decode (ms per token)", "MQuant")] if number == 12 else []
    assert [(labels[-1], header) for labels, header in empty] == wanted
    assert all(any(entry.paper is not None for entry in row.entries) for row in rows) or number in (10, 12)


def test_figure_7_has_every_size_of_the_protocol() -> None:
    prefill, linears = compose(planned_records(), load_figure("7")).panels
    assert prefill.series[0].x[-1] == 5600 and linears.series[0].x[-1] == 3640
    assert [series.label for series in linears.series] == [series.label for series in prefill.series]
    assert len(prefill.series) == 3 and len(prefill.series[0].x) == 15


def test_sweeps_and_tables_mean_the_same() -> None:
    assert {sweep: TIMED.get(sweep.removeprefix("sweep_"), TOTAL) for sweep in HEADLINES} == HEADLINES
    assert (TASK_PREFIX, outcome.OUT_OF_MEMORY) == (SWEEP_PREFIX, OUT_OF_MEMORY)


# --- specifications and files ----------------------------------------------------------------------------------------


def names_of(spec: TableSpec, row: Any) -> list[str]:
    return [name for column in spec.columns if column.is_sweep for name in (column.metric, column.against) if name]


@pytest.mark.parametrize("number", TABLES)
def test_specifications_name_systems_and_figures_that_there_are(number: int) -> None:
    spec = load_spec(number)
    for row in spec.row or (None,):
        for name in names_of(spec, row):
            system, dot, figure = name.format_map(row.fill if row else {}).partition(".")
            known = CONTENDERS if number == 9 else SYSTEMS
            assert not dot or (figure in CONTRACT and (system in known or system == "-")), name


def test_figures_name_systems_that_there_are() -> None:
    for path in SPECS.glob("figure*.toml"):
        for part in tomllib.loads(path.read_text(encoding="utf-8"))["parts"]:
            options = part.get("options", {})
            named = [*options.get("systems", ()), *options.get("old", ()), *filter(None, [options.get("new")])]
            assert set(named) <= SYSTEMS.keys()
    assert SPEEDS.keys() <= SYSTEMS.keys()


def test_a_row_needs_labels_behind_model_and_device(tmp_path: Path) -> None:
    (tmp_path / "table01.toml").write_text(
        'number = 1\ntitle = "t"\nrows = ["model", "device"]\n'
        'columns = [{ header = "x", task = "sweep_latency", metric = "a.b" }]\n[[row]]\nlabels = ["x"]\n'
    )
    with pytest.raises(TableError, match=r"needs 0 label"):
        load_spec(1, tmp_path)


def test_both_files_of_a_folder_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = [record for record in plan_records() if record.cell.task == "mme"]
    for name, known in (("records.jsonl", accuracy), (SWEEPS_NAME, sweep_records())):
        store = RecordStore(tmp_path, name)
        for record in known[:40]:
            store.append(record)
    assert len(load_records(tmp_path)) == len(accuracy[:40]) + 40
    run_table("9", "csv", tmp_path, [], None, 100)
    assert LARGE in capsys.readouterr().out
    assert load_records(tmp_path / "none") == []
