"""Visual tokens by image size, against transformers' preprocessors; records of blueprints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqbench.harness.blueprint import FOLDER, load_blueprint, read_blueprint
from mqbench.harness.blueprint_records import (
    MODEL_SIZE,
    SIDES_PX,
    VISUAL_TOKENS,
    blueprint_cell,
    blueprint_records,
    list_sizes,
    run_blueprints,
)
from mqbench.harness.blueprint_tokens import visual_tokens
from mqbench.harness.errors import RequestError
from mqbench.harness.record import Record
from mqbench.harness.store import RecordStore

SIDES = st.integers(1, 6000)


@given(SIDES, SIDES)
def test_smart_resize_is_transformers(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    blueprint = load_blueprint("qwen2-vl-7b")
    bounds = {key: blueprint.image[key] for key in ("min_pixels", "max_pixels")}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, 28, **bounds)
        with pytest.raises(RequestError, match="too long"):
            visual_tokens(blueprint, height, width)
        return
    expected = math.prod(smart_resize(height, width, 28, **bounds)) // 28**2
    assert visual_tokens(blueprint, height, width) == expected


@given(SIDES, SIDES)
def test_tiles_are_transformers(height: int, width: int) -> None:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    tiles = math.prod(get_optimal_tiled_canvas((height, width), (448, 448), 1, 12))
    expected = 256 * (tiles + (tiles > 1))
    assert visual_tokens(load_blueprint("internvl2-8b"), height, width) == expected


@given(SIDES, SIDES)
def test_slices_are_transformers(height: int, width: int) -> None:
    from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor

    grid = MiniCPMV4_6ImageProcessor.get_sliced_grid(None, (height, width), 9, 448)
    expected = 64 * (1 if grid is None else 1 + math.prod(grid))
    assert visual_tokens(load_blueprint("minicpm-v-2.6"), height, width) == expected


@pytest.mark.parametrize(
    ("name", "height", "width", "tokens"),
    [
        ("qwen-vl-chat", 90, 5000, 256),
        ("glm-4v-9b", 280, 280, 1600),
        ("llava-1.5-13b", 1120, 1120, 576),
        ("qwen2-vl-7b", 448, 448, 256),
        ("qwen2-vl-72b", 5600, 5600, 16384),
        ("internvl2-8b", 448, 448, 256),
        ("internvl2-8b", 448, 896, 3 * 256),
        ("internvl2-8b", 1344, 1344, 10 * 256),
        ("minicpm-v-2.6", 448, 448, 64),
        ("minicpm-v-2.6", 1344, 1344, 10 * 64),
    ],
)
def test_known_token_counts(name: str, height: int, width: int, tokens: int) -> None:
    assert visual_tokens(load_blueprint(name), height, width) == tokens


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(RequestError, match="positive"):
        visual_tokens(load_blueprint("qwen2-vl-7b"), 0, 28)


def test_records_are_written_once(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "out")
    new = run_blueprints(store, ["qwen2-vl-2b", "internvl2-8b"])
    assert run_blueprints(store, ["qwen2-vl-2b", "internvl2-8b"]) == []
    assert [Record.from_json(record.to_json()).cell.key for record in new] == [r.cell.key for r in store.load()]
    results = blueprint_records(["qwen2-vl-2b", "internvl2-8b"])
    assert [(record.cell, record.score) for record in new] == [(cell, result.score) for cell, result in results]
    by_task = {record.cell.task: record for record in store.load() if record.cell.model == "internvl2-8b"}
    assert by_task[MODEL_SIZE].score == pytest.approx(8.075365376, abs=1e-9)
    arrays = by_task[VISUAL_TOKENS].arrays
    assert list(arrays["side_px"]) == list(SIDES_PX) and len(arrays["tokens"]) == len(SIDES_PX)
    assert arrays["tokens"][SIDES_PX.index(1120)] == by_task[VISUAL_TOKENS].score == 2560
    assert max(arrays["wide_tokens"]) == 13 * 256


def test_a_changed_blueprint_is_another_cell(tmp_path: Path) -> None:
    path = tmp_path / "glm-4v-9b.toml"
    path.write_text((FOLDER / path.name).read_text() + "# changed\n")
    cell, other = (blueprint_cell(item, MODEL_SIZE) for item in (load_blueprint("glm-4v-9b"), read_blueprint(path)))
    assert cell.weights_sha256.startswith("blueprint:")
    assert replace(cell, weights_sha256=other.weights_sha256) == other and cell.key != other.key


def test_listing_shows_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    list_sizes(["qwen2-vl-7b"])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("0.68", "7.62", "1.31", "3.62", "linear layers only"))
