"""AIFS against the unreordered model, against brute force and against Eq. 5 of the paper."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.activation import InputQuantizer
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.linear import wrap_linears
from mqbench.harness.quant.modality import Hooks, ModalityContext, track_modality
from mqbench.harness.quant.scheme import QuantArgs, Strategy
from mqbench.mquant import aifs
from mqbench.mquant.aifs import aifs_mask, enable_aifs, reorder_permutation

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def reordered(model: nn.Module) -> tuple[ModalityContext, Hooks]:
    context = ModalityContext()
    track_modality(model, tiny_layout(model), context)
    return context, enable_aifs(model, tiny_layout(model), context)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[expected.dtype])


# --- the permutation and the mask ------------------------------------------------------------------------------------


@st.composite
def token_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    visual, valid = (torch.tensor([draw(flags) for _ in range(rows)]) for _ in range(2))
    return visual, valid


@given(token_rows())
@settings(max_examples=60, deadline=None)
def test_permutation_puts_visual_before_text_and_keeps_padding(tokens):
    visual, valid = tokens
    for row, order in enumerate(reorder_permutation(visual, valid).tolist()):
        assert sorted(order) == list(range(len(order)))
        slots = [slot for slot, index in enumerate(order) if valid[row, index]]
        assert all(order[slot] == slot for slot in range(len(order)) if not valid[row, slot])
        expected = [i for i in slots if visual[row, i]] + [i for i in slots if not visual[row, i]]
        assert [order[slot] for slot in slots] == expected


@given(token_rows(), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_mask_follows_the_rule_pair_by_pair(tokens, past, random):
    visual, valid = tokens
    past_valid = torch.tensor([[random.random() < 0.7 for _ in range(past)] for _ in visual], dtype=torch.bool)
    past_valid = past_valid.reshape(len(visual), past)
    order = reorder_permutation(visual, valid)
    mask = aifs_mask(order, valid, past_valid)
    assert mask.shape == (*visual.shape[:1], 1, visual.shape[1], past + visual.shape[1])
    for row, query, key in itertools.product(*map(range, (mask.shape[0], *mask.shape[2:]))):
        if key < past:
            expected = past_valid[row, key]
        else:
            original = order[row, key - past]
            expected = original <= order[row, query] and valid[row, original]
        assert mask[row, 0, query, key] == expected


def equation_5(m: int, n: int, length: int, image_tokens: int) -> Tensor:
    """The paper's mask for one image at the 1-based indices m..n; ``image_tokens`` stands for its ``n - m``."""

    def sees(i: int, j: int) -> bool:
        if i <= image_tokens:
            return j <= i or image_tokens < j <= n
        if i <= n:
            return image_tokens < j <= i
        return j <= i

    indices = range(1, length + 1)
    return torch.tensor([[sees(i, j) for j in indices] for i in indices])


ONE_IMAGE = [(m, n, length) for length in range(1, 8) for n in range(1, length + 1) for m in range(1, n + 1)]


def test_equation_5_is_the_special_case_of_one_image_once_its_index_is_corrected():
    printed_is_right = 0
    for m, n, length in ONE_IMAGE:
        index = torch.arange(1, length + 1)
        mask = aifs_mask(reorder_permutation(((m <= index) & (index <= n))[None]))[0, 0]
        assert torch.equal(mask, equation_5(m, n, length, image_tokens=n - m + 1))
        printed_is_right += torch.equal(mask, equation_5(m, n, length, image_tokens=n - m))
    assert printed_is_right < len(ONE_IMAGE) / 2


# --- the whole model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.float64, "sdpa"), (torch.float32, "sdpa"), (torch.float32, "eager")],  # eager: softmax always in float32
    ids=str,
)
@torch.no_grad()
def test_logits_of_padded_multi_image_batches(dtype, attention):
    model = tiny_model(dtype, attn_implementation=attention)
    cases = list(itertools.product((1, 2, 3), (1, 3), (0, 1)))
    batches = [tiny_batch(model, images, rows, seed, text) for seed, (images, rows, text) in enumerate(cases)]
    expected = [model(**batch).logits for batch in batches]
    reordered(model)
    for batch, logits in zip(batches, expected, strict=True):
        keep = batch["attention_mask"].bool()
        assert_same(model(**batch).logits[keep], logits[keep])


@torch.no_grad()
def test_decoder_really_runs_reordered():
    model = tiny_model()
    seen: list[Tensor] = []
    decoder = model.model.language_model
    decoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = tiny_batch(model, num_images=2, batch_size=3)
    model(**batch)
    context, hooks = reordered(model)
    modality: list[Tensor | None] = []
    decoder.layers[0].register_forward_pre_hook(lambda *_: modality.append(context.visual))
    model(**batch)
    order = reorder_permutation(batch["input_ids"] == model.config.image_token_id, batch["attention_mask"].bool())
    assert not torch.equal(order, torch.arange(order.shape[1]).expand_as(order))
    assert torch.equal(seen[1], seen[0].gather(1, order[..., None].expand_as(seen[0])))
    assert torch.equal(modality[0], (batch["input_ids"] == model.config.image_token_id).gather(1, order))
    hooks.remove()
    model(**batch)
    assert torch.equal(seen[2], seen[0])


@torch.no_grad()
def test_causal_mask_on_reordered_tokens_would_be_wrong(monkeypatch):
    model = tiny_model()
    batch = tiny_batch(model, num_images=2, batch_size=1)
    expected = model(**batch).logits

    def causal(order: Tensor, *_: Tensor | None) -> Tensor:
        return torch.ones(1, 1, order.shape[1], order.shape[1], dtype=torch.bool).tril()

    monkeypatch.setattr(aifs, "aifs_mask", causal)
    reordered(model)
    assert (model(**batch).logits[:, -1] - expected[:, -1]).abs().max() > 1e-2


@torch.no_grad()
def test_hidden_states_and_tuples_come_back_in_the_original_order():
    model = tiny_model()
    batch = tiny_batch(model, num_images=2, batch_size=1)
    expected = model(**batch, output_hidden_states=True)
    reordered(model)
    actual = model(**batch, output_hidden_states=True)
    for states, wanted in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_same(states, wanted)
    assert_same(model(**batch, return_dict=False)[0], expected.logits)


# --- with a cache ----------------------------------------------------------------------------------------------------


@dtypes
@torch.no_grad()
def test_generate_is_unchanged(dtype):
    model = tiny_model(dtype)
    batch = tiny_batch(model, num_images=2, batch_size=4, seed=3, text_rows=1)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**batch, **options)
    reordered(model)
    actual = model.generate(**batch, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert_same(torch.stack(actual.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_beam_search_may_shuffle_the_reordered_cache():
    model = tiny_model()
    batch = tiny_batch(model, num_images=1, batch_size=3, seed=4)
    expected = model.generate(**batch, max_new_tokens=6, num_beams=3)
    reordered(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, num_beams=3), expected)


@dtypes
@torch.no_grad()
def test_decoding_step_by_step(dtype):
    model = tiny_model(dtype)
    batch = tiny_batch(model, num_images=2, batch_size=3, seed=5)
    expected = decode(model, batch, num_steps=5)
    reordered(model)
    assert_same(decode(model, batch, num_steps=5), expected)


def decode(model: nn.Module, batch: Mapping[str, Tensor], num_steps: int) -> Tensor:
    """Logits (B, num_steps + 1, V) of fixed follow-up tokens fed one at a time."""
    cache = DynamicCache(config=model.config.get_text_config())
    logits = [model(**batch, past_key_values=cache, use_cache=True).logits[:, -1]]
    mask = batch["attention_mask"]
    for step in range(num_steps):
        token = torch.full_like(mask[:, :1], 7 + step)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        position = mask.sum(1, keepdim=True) - 1 + model.model.rope_deltas
        output = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=position.expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


@dtypes
@torch.no_grad()
def test_second_turn_with_images_behind_a_cached_prefix(dtype):
    model = tiny_model(dtype)
    first = tiny_batch(model, num_images=1, batch_size=3, seed=6)
    second = tiny_batch(model, num_images=2, batch_size=3, seed=7)
    whole = joined(first, second)
    assert not second["attention_mask"].all()  # padding inside the conversation
    expected = model(**whole).logits
    positions, _ = model.model.get_rope_index(
        **{name: tensor for name, tensor in whole.items() if name != "pixel_values"}
    )
    reordered(model)
    cache = DynamicCache(config=model.config.get_text_config())
    length = first["input_ids"].shape[1]
    first["position_ids"] = positions[..., :length]
    logits = [model(**first, past_key_values=cache, use_cache=True).logits]
    second |= {"position_ids": positions[..., length:], "attention_mask": whole["attention_mask"]}
    logits.append(model(**second, past_key_values=cache, use_cache=True).logits)
    keep = whole["attention_mask"].bool()
    assert_same(torch.cat(logits, dim=1)[keep], expected[keep])


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The conversation as one chunk: tokens side by side, images row by row."""
    rows = len(first["input_ids"])
    images: list[tuple[Tensor, Tensor]] = []
    by_turn = [images_by_row(turn, rows) for turn in (first, second)]
    for turns in zip(*by_turn, strict=True):
        images += itertools.chain(*turns)
    whole = {
        name: torch.cat([first[name], second[name]], dim=1)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
    }
    whole["image_grid_thw"] = torch.stack([grid for grid, _ in images])
    whole["pixel_values"] = torch.cat([pixels for _, pixels in images])
    return whole


def images_by_row(batch: Mapping[str, Tensor], rows: int) -> list[list[tuple[Tensor, Tensor]]]:
    grids = batch["image_grid_thw"]
    images = list(zip(grids, batch["pixel_values"].split(grids.prod(1).tolist()), strict=True))
    per_row = len(images) // rows
    return [images[row * per_row : (row + 1) * per_row] for row in range(rows)]


# --- with per-modality scales ----------------------------------------------------------------------------------------


def quantize_inputs(model: nn.Module, context: ModalityContext, text_scale: float, visual_scale: float) -> None:
    layout = tiny_layout(model)
    names = [name for name, part in layout.quantized_linears().items() if part is Part.TEXT]
    for name, linear in wrap_linears(model, names).items():
        linear.input_quantizer = InputQuantizer(name, QuantArgs(8, strategy=Strategy.MODALITY), context)
        linear.input_quantizer.scale = torch.tensor([text_scale, visual_scale], dtype=torch.float64)


@torch.no_grad()
def test_per_modality_scales_follow_their_tokens():
    model = tiny_model()
    context = ModalityContext()
    track_modality(model, tiny_layout(model), context)
    quantize_inputs(model, context, text_scale=0.05, visual_scale=0.11)
    batch = tiny_batch(model, num_images=2, batch_size=3, seed=8)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    expected, generated = model(**batch).logits, model.generate(**batch, **options).logits
    enable_aifs(model, tiny_layout(model), context)
    keep = batch["attention_mask"].bool()
    assert_same(model(**batch).logits[keep], expected[keep])
    assert_same(torch.stack(model.generate(**batch, **options).logits), torch.stack(generated))

    visual = batch["input_ids"] == model.config.image_token_id
    model.model.language_model.register_forward_pre_hook(lambda *_: setattr(context, "visual", visual))
    assert (model(**batch).logits[keep] - expected[keep]).abs().max() > 1e-3  # the original order would be wrong here


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_flash_attention_is_refused():
    model = tiny_model(torch.float32)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(LayoutError, match="sdpa or eager"):
        reordered(model)


def test_sliding_window_is_refused():
    model = tiny_model(torch.float32)
    model.model.language_model.config.sliding_window = 16
    with pytest.raises(LayoutError, match="sliding-window"):
        reordered(model)


@torch.no_grad()
def test_static_cache_is_refused_and_the_model_recovers():
    model = tiny_model()
    batch = tiny_batch(model)
    expected = model(**batch).logits
    context, _ = reordered(model)
    with pytest.raises(LayoutError, match="dynamic cache"):
        model.generate(**batch, max_new_tokens=2, cache_implementation="static")
    assert context.visual is None
    keep = batch["attention_mask"].bool()
    assert_same(model(**batch).logits[keep], expected[keep])
