"""Figures: the data behind them (golden files), what is drawn on the axes, valid and repeatable files, refusals.

After an intended change: ``MQBENCH_UPDATE_GOLDEN=1 pytest tests/test_figure.py``, then read the diff.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from fakes.records import CALIBRATION, failed_record, make_cell, make_record
from mqbench.harness.errors import FigureError, TableError
from mqbench.harness.figure import Picture, compose, known_figures, load_figure, to_csv, write
from mqbench.harness.figure_commands import run_figure
from mqbench.harness.figure_draw import COLORS, draw
from mqbench.harness.record import Record
from mqbench.harness.store import RecordStore

GOLDEN = Path(__file__).parent / "golden"
TOKENS = {
    "internvl2-8b": (512, 3328),
    "minicpm-v-2.6": (64, 640),
    "qwen-vl-chat": (256, 256),
    "llava-1.5-13b": (576, 576),
    "qwen2-vl-7b": (100, 1600),
    "qwen2-vl-72b": (100, 1600),
}
CONDITIONS = {"original": (0.5, 0.25, 0.4), "fht": (1.5, 0.3, 0.2), "rms": (0.1, 0.3, 0.2)}


def record(task: str, arrays: dict[str, Any], model: str = "standin-qwen2-vl", **changes: Any) -> Record:
    cell = make_cell(task, changes.pop("method", "none"), model=model, **changes)
    return make_record(cell, 1.0, metrics={}, samples=(), arrays=arrays)


def token_records() -> list[Record]:
    return [
        record("visual_tokens", {
            "side_px": (280, 1120), "tokens": tokens, "wide_width_px": (448, 896, 1344), "wide_tokens": (*tokens, 5000),
        }, model, device="meta", dtype="bfloat16", weights_sha256="blueprint:" + "b" * 64)
        for model, tokens in TOKENS.items()
    ]  # fmt: skip


def range_record(num_blocks: int = 2, scale: float = 1.0, **changes: Any) -> Record:
    edges = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
    arrays: dict[str, Any] = {"edges": edges}
    for place in ("block_in", "mlp_out"):
        for modality, factor in (("text", 1.0), ("visual", 8.0 * scale)):
            arrays[f"{place}.{modality}.min"] = [-factor * (block + 1) for block in range(num_blocks)]
            arrays[f"{place}.{modality}.max"] = [factor * (block + 2) for block in range(num_blocks)]
        arrays[f"{place}.block0.text.share"] = (0, 0, 0.25, 0.5, 0.25, 0, 0)
        arrays[f"{place}.block0.visual.share"] = (0, 0.25, 0.25, 0, 0.25, 0.25, 0)
    return record("activation_ranges", arrays, calibration=changes.pop("calibration", CALIBRATION), **changes)


def weight_record(model: str = "standin-qwen2-vl", towers: tuple[str, ...] = ("vision", "text")) -> Record:
    arrays: dict[str, Any] = {}
    for tower in towers:
        arrays |= {f"{tower}.shown_blocks": (0, 2, 3), f"{tower}.channels_per_group": (4,)}
        for block in (0, 2, 3):
            arrays[f"{tower}.block{block}.edges"] = (-1.5, 0.0, 1.5)
            for name, peaks in CONDITIONS.items():
                arrays[f"{tower}.block{block}.{name}.channel_peak"] = tuple(peak + block for peak in peaks)
                arrays[f"{tower}.block{block}.{name}.share"] = (0.25, 0.75)
    return record("weight_distribution", arrays, model)


def records() -> list[Record]:
    return [*token_records(), range_record(), weight_record(), weight_record("standin-llama", ("text",))]


def picture(number: int, known: list[Record] | None = None) -> Picture:
    return compose(records() if known is None else known, load_figure(number))


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 6, 9, 12])
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_golden(number: int, suffix: str) -> None:
    made = picture(number)
    text = to_csv(made) if suffix == "csv" else made.caption
    path = GOLDEN / f"figure{number:02d}.{suffix}"
    if os.environ.get("MQBENCH_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_specification_is_known() -> None:
    assert known_figures() == ["1", "6", "7", "9", "12", "latency", "memory"]
    for name in known_figures():
        spec = load_figure(name)
        assert (spec.name or str(spec.number)) == name


def test_equal_curves_are_one() -> None:
    labels = [series.label for series in picture(9).panels[0].series]
    assert labels == ["internvl2-8b", "llava-1.5-13b", "minicpm-v-2.6", "qwen-vl-chat", "qwen2-vl-72b, qwen2-vl-7b"]


def test_histograms_keep_one_empty_bin_on_each_side_and_lie_between_edges() -> None:
    text, visual = picture(1).panels[1].series
    assert text.x == visual.x == pytest.approx((-2 * 2**0.5, -(2**0.5), -(0.5**0.5), 0, 0.5**0.5, 2**0.5, 2 * 2**0.5))
    assert visual.y == (0, 25, 25, 0, 25, 25, 0)


def test_what_each_row_of_weights_shows() -> None:
    titles = [panel.name for panel in picture(12).panels]
    assert titles[::3] == [
        "standin-llama, LLM block 2 original",
        "standin-qwen2-vl, vision block 2 original",
        "standin-qwen2-vl, LLM block 2 original",
    ]
    assert titles[1:3] == ["standin-llama, LLM block 2 after FHT", "standin-llama, LLM block 2 after FHT, with RMS"]


def test_quantized_and_failed_records_are_not_drawn() -> None:
    quantized = range_record(scale=1000.0, method="mquant")
    failed = failed_record(make_cell("weight_distribution", "none", model="broken"))
    assert to_csv(picture(1, [*records(), quantized, failed])) == to_csv(picture(1))


def test_the_largest_calibration_set_counts() -> None:
    fewer = range_record(scale=1000.0, calibration=replace(CALIBRATION, num_samples=8))
    for known in ([*records(), fewer], [fewer, *records()]):
        assert to_csv(picture(1, known)) == to_csv(picture(1))


def test_models_may_come_from_different_devices_and_the_caption_says_so() -> None:
    other = weight_record("qwen2-vl-7b")
    other = replace(other, cell=replace(other.cell, device="NVIDIA H100", dtype="bfloat16"))
    assert "Measured on: NVIDIA H100, bfloat16; cpu, float32." in picture(12, [weight_record(), other]).caption


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "lines"), [(1, [4, 2, 1, 1]), (6, [1] * 6), (9, [5, 5]), (12, [1] * 9)]
)  # a panel of bars has one line, at zero
def test_axes_and_lines(number: int, lines: list[int]) -> None:
    axes = draw(picture(number)).axes
    assert [len(one.lines) for one in axes] == lines
    assert [one.get_title(loc="left") for one in axes] == [panel.title for panel in picture(number).panels]
    assert all(one.get_xlabel() for one in axes)


def test_lines_carry_the_data_in_colours_of_the_palette() -> None:
    made = picture(9)
    for panel, axes in zip(made.panels, draw(made).axes, strict=True):
        for series, line, color in zip(panel.series, axes.lines, COLORS, strict=False):
            assert (tuple(line.get_xdata()), tuple(line.get_ydata())) == (series.x, series.y)
            assert line.get_color() == color
            assert line.get_marker() not in ("", "None")


def test_bars_reach_from_the_smallest_to_the_largest_value_inside_the_axes() -> None:
    made = picture(1)
    panel, axes = made.panels[2], draw(made).axes[2]
    bars = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
    assert bars == [(low, high) for series in panel.series for low, high in zip(series.low, series.y, strict=True)]
    bottom, top = axes.get_ylim()
    assert bottom < min(low for low, _ in bars) and top > max(high for _, high in bars)


def test_weights_of_one_layer_share_an_axis_from_zero() -> None:
    axes = draw(picture(12)).axes
    assert {one.get_ylim() for one in axes[:3]} == {axes[0].get_ylim()}
    assert axes[0].get_ylim()[0] == 0 and axes[0].get_ylim()[1] > 3.5
    assert [one.get_ylabel() for one in axes[:4]] == ["largest |weight|", "", "", "largest |weight|"]


def test_one_legend_for_each_set_of_labels() -> None:
    figure = draw(picture(1))
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, True, False, False]
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert texts == ["text", "visual"]


def test_files_are_valid_and_repeatable(tmp_path: Path) -> None:
    formats = ("png", "svg", "pdf")
    first, second = (write(picture(6), tmp_path / name, formats) for name in "ab")
    assert [path.name for path in first] == [f"figure06.{suffix}" for suffix in (*formats, "csv", "txt")]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with Image.open(first[0]) as image:
        image.verify()
        assert image.size == (1400, 760)
    texts = [element.text for element in ElementTree.parse(first[1]).iter("{http://www.w3.org/2000/svg}text")]
    assert "largest |weight|" in texts
    assert first[2].read_bytes().startswith(b"%PDF")
    assert first[3].read_text() == to_csv(picture(6))


def test_matplotlib_is_only_loaded_to_draw() -> None:
    code = "import sys, mqbench.harness.figure_commands; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- refusals and the command ----------------------------------------------------------------------------------------


def test_no_record_says_which_command_makes_it() -> None:
    with pytest.raises(FigureError, match="task 'visual_tokens'; run 'mqbench run --plan"):
        picture(9, [range_record()])
    with pytest.raises(FigureError, match="figure 6 needs an ok record of task 'weight_distribution'"):
        picture(6, [weight_record("standin-llama", ("text",))])
    with pytest.raises(FigureError, match=r"has no series 'edges'; run that cell again"):
        picture(1, [*token_records(), record("activation_ranges", {})])


def test_different_weights_of_one_model_are_refused() -> None:
    other = weight_record()
    with pytest.raises(TableError, match="--where weights_sha256="):
        picture(6, [weight_record(), replace(other, cell=replace(other.cell, weights_sha256="f" * 64))])


def test_wrong_specifications(tmp_path: Path) -> None:
    with pytest.raises(FigureError, match="figure 8 has no specification; known: 1, 6, 7, 9, 12, latency, memory"):
        load_figure(8)
    for body, message in (
        ('parts = [{ kind = "pie" }]', "unknown kind 'pie'"),
        ("parts = []\ncolour = 3", "colour"),
        ("columns = 2", "parts"),
    ):
        (tmp_path / "figure20.toml").write_text(f'number = 20\ntitle = "x"\n{body}\n')
        with pytest.raises(FigureError, match=message):
            load_figure(20, tmp_path)


def stored(folder: Path, known: list[Record]) -> Path:
    store = RecordStore(folder)
    store.prepare()
    for one in known:
        store.append(one)
    return folder


def test_the_command_draws_what_has_records_and_names_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stored(tmp_path / "runs", [weight_record()])
    with pytest.raises(FigureError, match=r"figure 1 needs .*; also without records: 9$"):
        run_figure("all", None, out, [], None)
    made = sorted(path.name for path in (tmp_path / "rendered").iterdir())
    drawn = [f"figure{number}.{suffix}" for number in ("06", "12") for suffix in ("csv", "png", "svg", "txt")]
    captions = [f"figure{name}.txt" for name in ("07", "_latency", "_memory")]
    assert made == sorted(drawn + captions)
    assert capsys.readouterr().out == f"11 files: {tmp_path / 'rendered'}\n"


def test_the_command_prints_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_figure("6", "csv", stored(tmp_path / "runs", records()), ["model=standin-qwen2-vl"], tmp_path / "none")
    assert capsys.readouterr().out == to_csv(picture(6))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "style", "message"),
    [("six", None, "'six' is no figure; give a number"), ("6", "gif", "unknown format 'gif'; known: png, svg")],
)
def test_the_command_refuses(tmp_path: Path, name: str, style: str | None, message: str) -> None:
    with pytest.raises(FigureError, match=message):
        run_figure(name, style, stored(tmp_path / "runs", records()), [], None)
