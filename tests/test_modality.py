"""The modality context during prefill, decoding, failure and text-only runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fakes.tiny_qwen2_vl import IMAGE_ID, tiny_batch, tiny_layout, tiny_model
from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.modality import ModalityContext, track_modality, valid_mask

Seen = list[tuple[Tensor | None, Tensor | None]]


def record_context(model: nn.Module, context: ModalityContext) -> Seen:
    """What the decoder finds in the context, one entry per forward pass."""
    seen: Seen = []
    decoder = model.get_submodule(tiny_layout(model).text_root)
    decoder.register_forward_pre_hook(lambda *_: seen.append((context.visual, context.valid)))
    return seen


@pytest.fixture
def tracked() -> tuple[nn.Module, ModalityContext, Seen]:
    model = tiny_model(torch.float32)
    context = ModalityContext()
    track_modality(model, tiny_layout(model), context)
    return model, context, record_context(model, context)


@torch.no_grad()
def test_prefill_marks_placeholders_and_padding(tracked):
    model, context, seen = tracked
    batch = tiny_batch(model, num_images=2, batch_size=3, text_rows=1)
    model(**batch)
    ((visual, valid),) = seen
    assert torch.equal(visual, batch["input_ids"] == IMAGE_ID)
    assert visual.any(1).tolist() == [False, True, True]
    assert torch.equal(valid, batch["attention_mask"].bool())
    assert (context.visual, context.valid) == (None, None)


@torch.no_grad()
def test_positional_arguments_are_understood(tracked):
    model, _, seen = tracked
    batch = tiny_batch(model, num_images=0, batch_size=3, seed=1)
    model(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(seen[0][1], batch["attention_mask"].bool())


@torch.no_grad()
def test_generated_tokens_are_text_without_padding(tracked):
    model, context, seen = tracked
    model.generate(**tiny_batch(model, num_images=1, batch_size=2), max_new_tokens=4, min_new_tokens=4)
    assert len(seen) == 4
    assert seen[0][0] is not None
    assert seen[1:] == [(None, None)] * 3
    assert (context.visual, context.valid) == (None, None)


@torch.no_grad()
def test_unpadded_batch_has_no_valid_mask(tracked):
    model, _, seen = tracked
    model(**tiny_batch(model, num_images=1, batch_size=1))
    assert seen[0][1] is None


@torch.no_grad()
def test_cleared_when_the_pass_raises(tracked):
    model, context, seen = tracked
    batch = tiny_batch(model)
    batch["pixel_values"] = batch["pixel_values"][:, :-1]
    with pytest.raises(RuntimeError):
        model(**batch)
    assert not seen
    assert (context.visual, context.valid) == (None, None)


@torch.no_grad()
def test_removed_hooks_leave_the_context_alone():
    model = tiny_model(torch.float32)
    context = ModalityContext()
    seen = record_context(model, context)
    hooks = track_modality(model, tiny_layout(model), context)
    hooks.remove()
    hooks.remove()
    model(**tiny_batch(model))
    assert seen == [(None, None)]


@torch.no_grad()
def test_text_only_family_has_no_visual_tokens():
    model = tiny_model(torch.float32)
    context = ModalityContext()
    seen = record_context(model, context)
    track_modality(model, dataclasses.replace(tiny_layout(model), image_token_id=None), context)
    batch = tiny_batch(model, num_images=1, batch_size=2)
    model(inputs_embeds=torch.zeros(1, 3, 48))
    model(**batch)
    assert seen[0] == (None, None)
    assert seen[1][0] is None
    assert torch.equal(seen[1][1], batch["attention_mask"].bool())


def test_embeddings_alone_are_refused(tracked):
    model, _, _ = tracked
    with pytest.raises(LayoutError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 48))


def test_valid_mask_takes_the_columns_of_the_chunk():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    assert valid_mask(mask, 1) is None
    assert valid_mask(mask, 2).tolist() == [[True, True], [False, True]]
    assert valid_mask(None, 2) is None
    assert valid_mask(mask[:, None, None], 2) is None
