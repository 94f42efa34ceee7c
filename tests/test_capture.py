"""Block-by-block execution against one plain forward pass of the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.errors import CalibrationError, NonFiniteError
from mqbench.harness.quant.capture import Replay, block_groups, capture_calls, collect_rows, visit_groups
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.method import open_session
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Batch, Session

W4A8 = Recipe("test", "w4a8", "w4a8")


def session_of(recipe: Recipe = W4A8, batches: Sequence[Batch] | None = None) -> Session:
    model = tiny_model(torch.float64)
    if batches is None:
        batches = [tiny_batch(model, num_images=2, seed=0), tiny_batch(model, batch_size=3, seed=1, text_rows=1)]
    return open_session(model, tiny_layout(model), recipe, batches)


def rows_of_whole_model(session: Session) -> dict[str, Tensor]:
    """Every linear's input rows of plain forward passes, padding removed by the batch's own mask."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for batch in session.batches:
        valid = batch["attention_mask"].bool().flatten()

        def keep(module: nn.Module, args: tuple[Tensor], valid: Tensor = valid) -> None:
            rows = args[0].flatten(1) if module.flatten else args[0].flatten(0, -2)
            seen[module.name].append(rows[valid] if session.part(module.name) is Part.TEXT else rows)

        handles = [linear.register_forward_pre_hook(keep) for linear in session.linears.values()]
        with torch.no_grad():
            session.model(**batch)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def visited_rows(session: Session, change: bool) -> dict[str, Tensor]:
    """Rows at each visit; with ``change``, each visited weight is then altered as rounding would."""
    seen: dict[str, Tensor] = {}

    def visit(names: tuple[str, ...], replay: Replay) -> None:
        rows: list[Tensor] = []
        replay(rows.append)
        for name in names:
            seen[name] = torch.cat(rows)
            if change:
                session.linears[name].weight.data = session.linears[name].weight.mul(3).round() / 3

    visit_groups(session, visit)
    return seen


@pytest.mark.parametrize("change", [False, True], ids=["float", "each layer altered when visited"])
def test_rows_are_those_of_the_model_with_everything_before_altered(change: bool) -> None:
    """A linear's input depends on the linears before it alone, so at the end one pass gives what each visit saw."""
    session = session_of()
    seen = visited_rows(session, change)
    assert list(seen) == list(session.linears)
    expected = rows_of_whole_model(session)
    for name, rows in expected.items():
        torch.testing.assert_close(seen[name], rows, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_visiting_twice_gives_the_same_rows() -> None:
    session = session_of()
    first, second = visited_rows(session, change=False), visited_rows(session, change=False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert session.context.visual is None and session.context.valid is None


def test_groups_share_one_input_in_gptq_order() -> None:
    session = session_of()
    groups: list[tuple[str, ...]] = []
    visit_groups(session, lambda names, replay: groups.append(names))
    short = [tuple(name.rpartition(".")[2] for name in group) for group in groups]
    vision = [("qkv",), ("proj",), ("fc1",), ("fc2",)]
    text = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert short == [("proj",), *vision * 2, ("0",), ("2",), *text * 2]


def test_own_transform_or_split_stands_alone() -> None:
    session = session_of()
    block = session.layout.text.blocks[0]
    query = session.linears[block.attention_norm.readers[0]]
    query.x0_weight = query.weight[:, 0].clone()
    assert block_groups(session, block)[:3] == [(name,) for name in block.attention_norm.readers]


def test_split_channel_is_zero_in_the_rows() -> None:
    session = session_of()
    name = session.layout.text.blocks[1].mlp_out
    session.linears[name].x0_weight = session.linears[name].weight[:, 0].clone()
    rows: list[Tensor] = []
    with collect_rows(session, name, rows.append):
        session.run_calibration()
    assert (torch.cat(rows)[:, 0] == 0).all() and (torch.cat(rows)[:, 1:] != 0).any(0).all()


def test_context_of_each_batch_is_restored_during_replay() -> None:
    session = session_of()
    masks: list[tuple[Tensor | None, Tensor | None]] = []
    last = session.layout.text.blocks[-1].mlp_out

    def visit(names: tuple[str, ...], replay: Replay) -> None:
        if names == (last,):
            replay(lambda rows: masks.append((session.context.visual, session.context.valid)))

    visit_groups(session, visit)
    assert len(masks) == 2
    for (visual, valid), batch in zip(masks, session.batches, strict=True):
        assert visual is not None and torch.equal(visual, batch["input_ids"] == session.layout.image_token_id)
        expected = batch["attention_mask"].bool()
        assert torch.equal(expected, torch.ones_like(expected) if valid is None else valid)


def test_float_tower_is_not_visited() -> None:
    names = visited_rows(session_of(Recipe("test", "float", "w4a8")), change=False)
    session = session_of()
    assert set(names) == {name for name in session.linears if session.part(name) is Part.TEXT}


def test_captured_calls_hold_no_cache() -> None:
    session = session_of()
    calls = capture_calls(session, session.layout.text.blocks[0].name)
    assert len(calls) == 2
    assert all(call.kwargs["past_key_values"] is None and not call.kwargs["use_cache"] for call in calls)


def test_batches_without_images_are_left_out_of_the_vision_tower() -> None:
    model = tiny_model(torch.float64)
    batches = [tiny_batch(model, num_images=0, seed=0), tiny_batch(model, num_images=1, seed=1)]
    session = session_of(batches=batches)
    seen = visited_rows(session, change=False)
    for name, rows in rows_of_whole_model(session).items():
        assert len(seen[name]) == len(rows)


def test_no_image_at_all_is_an_error_that_names_the_layer() -> None:
    session = session_of(batches=[tiny_batch(tiny_model(torch.float64), num_images=0)])
    with pytest.raises(CalibrationError, match=r"no calibration sample reaches '.*attn\.qkv'"):
        visit_groups(session, lambda names, replay: replay(lambda rows: None) if "attn.qkv" in names[0] else None)


def test_nan_activation_names_the_layer() -> None:
    session = session_of()
    session.batches[0]["pixel_values"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"input of '.*patch_embed\.proj'"):
        visited_rows(session, change=False)
