"""Sizes of inputs against numbers worked out by hand and against transformers' own preprocessing and positions."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fakes.tiny_qwen2_vl import tiny_config
from mqbench.harness.errors import RequestError
from mqbench.harness.sweep.inputs import decode_ids, make_turns, text_ids
from mqbench.harness.sweep.model import find_sweep_model
from mqbench.harness.sweep.protocol import (
    ImageRules,
    Shape,
    cache_length,
    figures,
    image_size,
    pad_tokens,
    past_length,
    prefill_length,
    row_tokens,
    text_segments,
)

QWEN = ImageRules(14, 2, 56 * 56, 16384 * 28 * 28)
TINY = ImageRules(4, 2, 64, 64 * 64)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("side", "tokens", "resized", "clamped"),
    [
        (280, 100, 280, False),
        (840, 900, 840, False),
        (1000, 36 * 36, 1008, False),
        (2240, 6400, 2240, False),
        (2800, 10000, 2800, False),
        (3360, 14400, 3360, False),
        (3584, 16384, 3584, False),
        (3640, 16384, 3584, True),
        (4480, 16384, 3584, True),
        (5600, 16384, 3584, True),
        (28, 4, 56, False),
    ],
)
def test_visual_tokens_of_qwen2_vl(side: int, tokens: int, resized: int, clamped: bool) -> None:
    size = image_size(side, QWEN)
    assert (size.visual_tokens, size.resized_px, size.clamped) == (tokens, resized, clamped)
    assert size.grid == (1, resized // 14, resized // 14)
    assert size.patches == 4 * tokens


@pytest.mark.parametrize("side", [56, 90, 280, 300, 700, 840])
def test_image_size_is_that_of_transformers(side: int) -> None:
    """The image processor itself resizes an image of this size."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    limits = {"shortest_edge": 56 * 56, "longest_edge": 400 * 28 * 28}
    processor = Qwen2VLImageProcessor(size=limits)
    found = processor(Image.new("RGB", (side, side)), return_tensors="pt")
    rules = ImageRules(14, 2, limits["shortest_edge"], limits["longest_edge"])
    size = image_size(side, rules)
    assert found["image_grid_thw"].tolist() == [list(size.grid)]
    assert tuple(found["pixel_values"].shape) == (size.patches, rules.patch_elements)
    assert size.clamped == (side > 560)


def test_clamped_images_are_one_input() -> None:
    assert len({image_size(side, QWEN).grid for side in (3640, 4480, 5600)}) == 1


@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        (Shape(840), (7, 8)),
        (Shape(2240, text_tokens=60, text_before=10, text_step=50, batch=4), (10, 50)),
        (Shape(2240, images=3, text_tokens=50, text_before=12), (12, 13, 13, 12)),
        (Shape(28, images=2, text_tokens=4, text_before=1), (1, 2, 1)),
    ],
)
def test_text_around_images(shape: Shape, segments: tuple[int, ...]) -> None:
    assert text_segments(shape) == segments


def test_later_rows_have_longer_texts() -> None:
    """Paper, Table 13: 10 tokens, an image, and 50, 100, 150 and 200 tokens."""
    shape = Shape(2240, text_tokens=60, text_before=10, text_step=50, batch=4, decode_tokens=512)
    assert [text_segments(shape, row) for row in range(4)] == [(10, 50), (10, 100), (10, 150), (10, 200)]
    assert [row_tokens(shape, QWEN, row) for row in range(4)] == [6460, 6510, 6560, 6610]
    assert prefill_length(shape, QWEN) == 6610
    assert [pad_tokens(shape, QWEN, row) for row in range(4)] == [150, 100, 50, 0]
    assert cache_length(shape, QWEN) == 6610 + 512


def test_turns_grow_the_cache() -> None:
    """Paper, Table 14."""
    shape = Shape(2240, text_tokens=60, text_before=10, turns=3, decode_tokens=512)
    assert [past_length(shape, QWEN, turn) for turn in range(3)] == [0, 6972, 13944]
    assert cache_length(shape, QWEN) == 3 * 6972


@given(
    images=st.integers(1, 5),
    before=st.integers(1, 9),
    more=st.integers(0, 40),
    step=st.integers(0, 9),
    row=st.integers(0, 3),
)
def test_segments_add_up(images: int, before: int, more: int, step: int, row: int) -> None:
    tokens = before + 2 * (images - 1) + 1 + more
    shape = Shape(28, images, tokens, before, step, batch=4)
    segments = text_segments(shape, row)
    assert len(segments) == images + 1 and sum(segments) == tokens + row * step
    assert segments[0] == before and all(length >= 2 for length in segments[1:-1]) and segments[-1] >= 1


def test_figures_of_a_point() -> None:
    assert figures(Shape(4480), QWEN) == {
        "tokens_per_image": 16384.0,
        "visual_tokens": 16384.0,
        "llm_tokens": 16399.0,
        "resized_px": 3584.0,
        "clamped": 1.0,
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_px": 0}, "image_px must be at least 1"),
        ({"image_px": 28, "batch": 0}, "batch must be at least 1"),
        ({"image_px": 28, "decode_tokens": -1}, "decode_tokens must be at least 0"),
        ({"image_px": 28, "text_before": 0}, "text_before must be at least 1"),
        ({"image_px": 28, "text_tokens": 7}, "text_tokens must be at least 8"),
        ({"image_px": 28, "images": 6}, "text_tokens must be at least 18 with 6 image"),
    ],
)
def test_sizes_that_make_no_sense(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Shape(**sizes)


def inputs_of(shape: Shape, seed: int = 0):  # type: ignore[no-untyped-def]
    return make_turns(shape, TINY, tiny_config(), device=CPU, dtype=torch.float32, seed=seed)


def test_inputs_hold_what_the_shape_says() -> None:
    shape = Shape(24, images=2, text_tokens=12, text_before=3, text_step=2, batch=3, turns=2)
    config = tiny_config()
    turns = inputs_of(shape)
    assert len(turns) == 2
    for turn in turns:
        assert turn.input_ids.shape == (3, 18 + 12 + 4)
        assert turn.attention_mask is not None
        assert turn.attention_mask.sum(1).tolist() == [30, 32, 34]
        assert turn.pixel_values is not None and turn.pixel_values.shape == (3 * 2 * 36, 96)
        assert turn.image_grid_thw is not None and turn.image_grid_thw.tolist() == [[1, 6, 6]] * 6
        assert turn.mm_token_type_ids is not None
        assert torch.equal(turn.mm_token_type_ids == 1, turn.input_ids == config.image_token_id)
        for ids, mask in zip(turn.input_ids, turn.attention_mask, strict=True):
            is_image = (ids[mask.bool()] == config.image_token_id).tolist()
            kinds = [(key, len(list(group))) for key, group in groupby(is_image)]
            assert [length for key, length in kinds if key] == [9, 9]
            assert kinds[0] == (False, 3)
            before_image = ids[:-1][ids[1:] == config.image_token_id]
            assert (before_image == config.vision_start_token_id).sum() == 2
            assert (ids == config.vision_end_token_id).sum() == 2
            assert not torch.isin(ids, torch.tensor([config.video_token_id, 2])).any(), "ends the text, or is a video"


def test_transformers_counts_positions_of_the_inputs() -> None:
    """``get_rope_index`` takes the inputs, and its largest position is that of text and images counted by hand."""
    from fakes.tiny_qwen2_vl import tiny_model

    shape = Shape(24, images=2, text_tokens=12, text_before=3, text_step=2, batch=2)
    turn = inputs_of(shape)[0]
    model = tiny_model(torch.float32)
    positions, deltas = model.model.get_rope_index(
        turn.input_ids, turn.mm_token_type_ids, turn.image_grid_thw, attention_mask=turn.attention_mask
    )
    assert positions.shape == (3, 2, 32)
    # An image of 3 x 3 tokens moves the text behind it by 3 positions.
    assert positions.amax((0, 2)).tolist() == [12 + 2 * 3 - 1, 14 + 2 * 3 - 1]
    assert deltas.flatten().tolist() == [12 + 6 - 30, 14 + 6 - 32], "next position less tokens, without padding"


def test_rows_of_equal_length_need_no_mask() -> None:
    assert inputs_of(Shape(24, batch=2))[0].attention_mask is None


def test_inputs_depend_on_the_seed_alone() -> None:
    one, same, other = (inputs_of(Shape(24), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.input_ids, same.input_ids) and torch.equal(one.pixel_values, same.pixel_values)
    assert not torch.equal(one.input_ids, other.input_ids) and not torch.equal(one.pixel_values, other.pixel_values)


def test_decoded_ids_are_text() -> None:
    config = tiny_config()
    ids = decode_ids(50, config, CPU, seed=0)
    assert ids.shape == (50,) and torch.isin(ids, text_ids(config)).all()
    assert set(text_ids(config).tolist()) == set(range(64)) - {0, 1, 2, 60, 61, 62, 63}


def test_released_models_have_the_papers_geometry() -> None:
    model = find_sweep_model("qwen2-vl-7b", None, {})
    assert model.rules == QWEN
    text, vision = (getattr(model.build_config(), part) for part in ("text_config", "vision_config"))
    assert (text.hidden_size, text.num_hidden_layers) == (3584, 28)
    assert (vision.embed_dim, vision.depth, vision.hidden_size) == (1280, 32, 3584)
