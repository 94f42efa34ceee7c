"""Figure 7 and the figures of latency and memory: data (golden files), captions, and what is drawn.

After an intended change: ``MQBENCH_UPDATE_GOLDEN=1 pytest tests/test_figure_sweeps.py``, then read the diff.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from fakes.sweeps import LARGE, SMALL, no_memory, of_systems, point, sweep_records
from mqbench.harness.errors import FigureError, TableError
from mqbench.harness.figure import Picture, compose, load_figure, to_csv, write
from mqbench.harness.figure_commands import run_figure
from mqbench.harness.figure_draw import draw
from mqbench.harness.figure_sweeps import MEMORY_PARTS, TIME_PARTS
from mqbench.harness.record import Record
from mqbench.harness.runtime.interface import PARTS
from mqbench.harness.store import RecordStore
from mqbench.harness.sweep_records import SWEEPS_NAME

GOLDEN = Path(__file__).parent / "golden"
FIGURES = ("7", "latency", "memory")


def picture(name: str, records: list[Record] | None = None) -> Picture:
    return compose(sweep_records() if records is None else records, load_figure(name))


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_golden(name: str, suffix: str) -> None:
    made = picture(name)
    text = to_csv(made) if suffix == "csv" else made.caption
    path = GOLDEN / f"sweep_{made.spec.stem}.{suffix}"
    if os.environ.get("MQBENCH_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_figure_7_is_a_gain_over_each_old_system_on_each_gpu() -> None:
    panels = picture("7").panels
    assert [panel.title for panel in panels] == [
        f"{part} qwen2-vl-7b, {gpu}" for part in ("(a) prefill:", "(b) linear layers:") for gpu in (LARGE, SMALL)
    ]
    for panel in panels:
        gains = {series.label: set(series.y) for series in panel.series}
        for name, gain in (("w4a8-token", 100 / 3), ("w4a8-token-unfused", 200 / 3), ("w4a8-msq", 100 / 7)):
            assert all(value == pytest.approx(gain) for value in gains[f"over {name}"])
    assert panels[0].series[0].x == (280, 560, 840, 1960, 2800, 3080, 5600)
    assert panels[1].series[0].x == (280, 840, 1960, 2800, 3080, 5600)


def test_a_loss_is_seen() -> None:
    records = [
        point("latency", {"image_px": px, "images": 1}, {"mquant-w4a8.prefill_ms": 2.0, "w4a8-token.prefill_ms": 1.0})
        for px in (280, 560)
    ]
    made = compose(records, load_figure("7"), may_be_empty=True)
    assert made.panels[0].series[0].y == (-50, -50)
    (axes,) = draw(made).axes
    assert axes.get_ylim()[0] < -50


def test_stacks_start_where_the_part_below_ends_and_add_up() -> None:
    made = picture("latency")
    panel = next(panel for panel in made.panels if panel.title == f"qwen2-vl-7b, {LARGE}\nmquant-w4a8")
    assert [series.label for series in panel.series] == [
        label for key, label in TIME_PARTS.items() if key != "part:other_ms"
    ]
    for below, above in pairwise(panel.series):
        assert above.low == below.y
    assert panel.series[0].low == (0,) * 7
    assert panel.series[-1].y[2] == pytest.approx(420 * (0.9 / 2 + 0.05 + 0.01 / 2))


def test_a_part_or_point_that_was_not_measured_has_no_bar() -> None:
    panels = {panel.title: panel for panel in picture("memory").panels}
    small = panels[f"qwen2-vl-7b, {SMALL}\nbf16-eager"]
    assert small.series[0].x == (280, 840, 1960, 2800, 3080)
    assert panels[f"qwen2-vl-7b, {SMALL}\nmquant-w4a8"].series[0].x[-1] == 5600
    assert "workspace" not in [series.label for series in small.series]
    eager = {panel.title: panel for panel in picture("latency").panels}[f"qwen2-vl-7b, {LARGE}\nbf16-eager"]
    assert "quantize and norm" not in [series.label for series in eager.series]


def test_every_part_of_a_pass_is_drawn() -> None:
    assert set(TIME_PARTS) == {f"part:{part}_ms" for part in PARTS} | {"launch_gap_ms"}
    assert set(MEMORY_PARTS) == {"weights_bytes", "activations_bytes", "kv_cache_bytes", "workspace_bytes"}


def test_bars_do_not_overlap_and_clamped_sizes_are_marked() -> None:
    made = picture("memory")
    for panel, axes in zip(made.panels, draw(made).axes, strict=True):
        assert axes.get_ylim()[0] == 0 and axes.get_title(loc="left") == panel.title
        first = [bar for bar in axes.patches if bar.get_y() == 0]
        edges = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in first]
        assert all(right < left for (_, right), (left, _) in pairwise(edges))
        dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert dotted == [panel.start_of_clamped] == [5600] or SMALL in panel.title
    assert "Clamped" in made.caption


def test_panels_of_one_gpu_share_an_axis() -> None:
    made = picture("memory")
    limits = {}
    for panel, axes in zip(made.panels, draw(made).axes, strict=True):
        limits.setdefault(panel.group, set()).add(axes.get_ylim())
    assert [len(found) for found in limits.values()] == [1, 1]


def test_points_without_memory_are_left_out() -> None:
    lost = no_memory("latency", {"image_px": 4480, "images": 1}, metrics={"clamped": 1.0})
    panel = picture("latency", [*sweep_records([LARGE]), lost]).panels[0]
    assert 4480 not in panel.series[0].x and panel.start_of_clamped == 4480


def test_the_cpu_and_other_inputs_are_not_drawn() -> None:
    other = point("latency", {"image_px": 896, "images": 3}, of_systems(prefill_ms=1.0))
    assert to_csv(picture("7", [*sweep_records(), *sweep_records(["cpu"]), other])) == to_csv(picture("7"))
    own = compose(sweep_records(["cpu"]), load_figure("7"), {"device": "cpu"})
    assert "Functional check on a CPU" in own.caption


def test_two_records_for_one_point_are_refused() -> None:
    other = point("latency", {"image_px": 840, "images": 1, "text_tokens": 60}, of_systems(prefill_ms=1.0))
    with pytest.raises(TableError, match=r"--where options\.text_tokens="):
        picture("7", [*sweep_records(), other])


def test_without_records_one_figure_is_an_error_and_all_are_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FigureError, match="figure latency needs an ok record of task 'sweep_latency'; run 'mqbench sw"):
        run_figure("latency", None, tmp_path / "runs", [], None)
    empty = compose([], load_figure("7"), may_be_empty=True)
    assert [path.name for path in write(empty, tmp_path, ["png"])] == ["figure07.txt"]
    text = (tmp_path / "figure07.txt").read_text()
    assert "Nothing was measured (latency and linears)" in text and "The paper prints this figure without" in text


def test_the_command_reads_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RecordStore(tmp_path / "runs", SWEEPS_NAME)
    store.prepare()
    for record in sweep_records():
        store.append(record)
    run_figure("memory", "svg", tmp_path / "runs", [f"device={LARGE}"], None)
    made = sorted(path.name for path in (tmp_path / "rendered").iterdir())
    assert made == ["figure_memory.csv", "figure_memory.svg", "figure_memory.txt"]
    with pytest.raises(FigureError, match=r"'memories' is no figure; give a number or 'all'; known: 1, .*, memory$"):
        run_figure("memories", None, tmp_path / "runs", [], None)
