"""Starting a stand-in from another family's: what is copied computes the same, and features are learnt in place."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mqbench.harness import discover
from mqbench.harness.models.standin import qwen2_vl, tasks
from mqbench.harness.models.standin.adapters import SHIPPED_WEIGHTS
from mqbench.harness.models.standin.align import Alignment
from mqbench.harness.models.standin.architecture import Size
from mqbench.harness.models.standin.family import MODULES, find_standin
from mqbench.harness.models.standin.grid import VisualGrid
from mqbench.harness.models.standin.inherit import Donor, inherit, level, load_donor
from mqbench.harness.models.standin.render import HEIGHT_PX, WIDTH_PX
from mqbench.harness.models.standin.tasks import Example
from mqbench.harness.models.standin.train import Trainer, recipe
from mqbench.harness.quant.layout import NormPlace

DONOR = "standin-qwen2-vl"
HEIRS = [name for name in MODULES if f"standin-{name}" != DONOR]
GRIDS = {"glm-4v": (6, 6), "internvl": (6, 6), "llava": (6, 6), "minicpm-v": (4, 6), "qwen-vl": (6, 6)}


@pytest.fixture(scope="module")
def donor() -> Donor:
    return load_donor(DONOR)


def heir(family: str, donor: Donor) -> tuple[Any, Any]:
    """A model that inherited, and its tokenizer."""
    standin = find_standin(family)
    tokenizer = standin.build_tokenizer()
    model = standin.build_model(standin.build_config(tokenizer), seed=0).requires_grad_(False)
    inherit(model, standin.layout(model), tokenizer, donor)
    return model, tokenizer


def pictured(count: int) -> list[Example]:
    rng = Random(11)
    return [tasks.textvqa(rng, 0.4) for _ in range(count)]


@torch.no_grad()
def text_logits(model: Any, tokenizer: Any, pieces: list[str]) -> Tensor:
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(pieces)])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return logits[0][:, tokenizer.convert_tokens_to_ids(sorted(SHARED))]


SHARED = {"a", "b", "7", "circle", "Yes", "No", "Question: "}
PIECES = ["Question: ", "circle", "a", "7", "Yes", "b", "No"]


def test_levelling_changes_no_output_and_takes_the_hardness_out() -> None:
    loaded = discover.find_model(DONOR).load(SHIPPED_WEIGHTS / DONOR, "cpu", torch.float32)
    model, layout, feed = loaded.model, loaded.layout, qwen2_vl.Qwen2VLFeed(loaded.processor.tokenizer)
    batch = feed.collate(pictured(4))
    assert layout.vision is not None

    def spread() -> float:
        gains: list[Tensor] = [model.get_submodule(norm.name).weight.abs() for t in layout.towers for norm in t.norms]
        return max(float(gain.max() / gain.median()) for gain in gains)

    with torch.no_grad():
        before, inner_before = feed.logits_and_activations(model, batch)
        assert spread() > 30
        level(model, layout)
        after, inner_after = feed.logits_and_activations(model, batch)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-3 * float(before.abs().max()))
    assert spread() == 1
    for block, raised, plain in zip(layout.text.blocks, inner_before, inner_after, strict=True):
        assert not torch.allclose(raised, plain), block.name
        up, down = (model.get_submodule(name).weight for name in (block.mlp_up or "", block.mlp_out))
        ratios = up.norm(dim=1) / down.norm(dim=0)
        torch.testing.assert_close(ratios, ratios.median().expand_as(ratios), rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", ["internvl", "minicpm-v", "qwen-vl"])
def test_llms_with_all_of_qwen2s_parameters_answer_text_as_the_donor_does(family: str, donor: Donor) -> None:
    """Separate or fused projections, and a head for each of several that shared one."""
    model, tokenizer = heir(family, donor)
    expected = text_logits(donor.model, donor.tokenizer, PIECES)
    torch.testing.assert_close(text_logits(model, tokenizer, PIECES), expected, rtol=1e-4, atol=1e-3)


def test_llama_takes_the_weights_and_has_no_place_for_biases(donor: Donor) -> None:
    model, _ = heir("llava", donor)
    mine = model.model.language_model.layers[2].self_attn.k_proj
    theirs: Any = donor.model.get_submodule("model.language_model.layers.2.self_attn.k_proj")
    assert torch.equal(mine.weight, theirs.weight)
    assert mine.bias is None and theirs.bias is not None


def test_chatglm_takes_fused_rows_in_its_order(donor: Donor) -> None:
    model, _ = heir("glm-4v", donor)
    block: Any = model.get_submodule("transformer.encoder.layers.1")
    layer = "model.language_model.layers.1"
    theirs: dict[str, Any] = {
        name: donor.model.get_submodule(f"{layer}.{place}.{name}_proj").weight
        for place, names in (("self_attn", "qkv"), ("mlp", ("gate", "up", "down")))
        for name in names
    }
    assert torch.equal(block.self_attention.query_key_value.weight, torch.cat([theirs[name] for name in "qkv"]))
    assert torch.equal(block.mlp.dense_h_to_4h.weight, torch.cat([theirs["gate"], theirs["up"]]))
    assert torch.equal(block.mlp.dense_4h_to_h.weight, theirs["down"])


def test_interleaved_value_rows_find_their_heads(donor: Donor) -> None:
    model, _ = heir("qwen-vl", donor)
    layout = find_standin("qwen-vl").layout(model)
    assert layout.vision is not None and donor.layout.vision is not None
    mine, theirs = layout.vision.blocks[0].attention, donor.layout.vision.blocks[0].attention
    assert mine.value_period and not theirs.value_period
    rows = model.get_submodule(mine.value).weight[mine.value_index]
    given: Any = donor.model.get_submodule(theirs.value)
    assert torch.equal(rows, given.weight[theirs.value_index])


@pytest.mark.parametrize("family", HEIRS)
def test_towers_that_normalize_alike_take_blocks_and_patches(family: str, donor: Donor) -> None:
    model, _ = heir(family, donor)
    layout = find_standin(family).layout(model)
    assert layout.vision is not None and donor.layout.vision is not None
    mine: Any = model.get_submodule(layout.vision.blocks[3].mlp_out)
    theirs: Any = donor.model.get_submodule(donor.layout.vision.blocks[3].mlp_out)
    assert torch.equal(mine.weight, theirs.weight) == (layout.vision.norm_place is NormPlace.PRE)
    patches: Any = model.get_submodule(layout.patch_embed or "")
    kernel: Any = donor.model.get_submodule(donor.layout.patch_embed or "")
    if patches.weight.shape[-1] == 14:
        cosine = torch.cosine_similarity(patches.weight.flatten(), kernel.weight.sum(2).flatten(), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", HEIRS)
def test_positions_are_distinct_and_their_distances_repeat(family: str, donor: Donor) -> None:
    """Sines: a step to the right looks the same in the middle of every row."""
    model, _ = heir(family, donor)
    root = f"{find_standin(family).layout(model).vision_root}."
    (table,) = [
        value
        for name, value in model.named_parameters()
        if name.startswith(root) and "position" in name and value.dim() > 1
    ]
    side = int(table.shape[-2] ** 0.5)
    grid = table.reshape(-1, table.shape[-1])[-(side**2) :].view(side, side, -1)
    steps = (grid[:, 1:] * grid[:, :-1]).sum(-1)
    torch.testing.assert_close(steps, steps[:1, :1].expand_as(steps), rtol=1e-4, atol=0)
    assert float(torch.pdist(grid.flatten(0, 1)).min()) > 0.1 * float(grid.norm(dim=-1).mean())


def test_other_widths_are_refused(donor: Donor) -> None:
    standin = find_standin("llava")
    tokenizer = standin.build_tokenizer()
    narrow = standin.build_model(standin.build_config(tokenizer, Size(text_width=96, text_heads=6)), seed=0)
    with pytest.raises(ValueError, match="96 wide, the donor's 192"):
        inherit(narrow, standin.layout(narrow), tokenizer, donor)


# --- alignment


@pytest.mark.parametrize("family", HEIRS)
def test_grids_have_a_place_for_every_visual_token(family: str, tmp_path: Path) -> None:
    trainer = Trainer(recipe(family), tmp_path)
    assert trainer.alignment is not None
    grid = trainer.alignment.grid
    assert (grid.rows, grid.columns) == GRIDS[family]
    tokens = trainer.alignment.visual_tokens(pictured(2), "cpu")
    assert tokens.shape == (2, grid.rows * grid.columns, 192)


def test_the_donors_own_grid_gives_the_donors_features(donor: Donor) -> None:
    alignment = Alignment(donor.model, donor.layout, None, VisualGrid(4, 6), donor.model)
    made = pictured(3)
    pixels = torch.stack([torch.from_numpy(np.array(example.image)) for example in made])
    expected = qwen2_vl.visual_features(donor.model, qwen2_vl.patchify(pixels))  # type: ignore[arg-type]
    torch.testing.assert_close(alignment.targets(made, "cpu"), expected, rtol=1e-4, atol=1e-4)


def test_places_of_a_padded_square() -> None:
    """Rows of the padding lie outside the picture, which begins and ends between rows."""
    places = VisualGrid(6, 6, margin_px=(WIDTH_PX - HEIGHT_PX) // 2).places()
    assert places.shape == (6, 6, 2)
    torch.testing.assert_close(places[:, 0, 1], torch.tensor([-1.25, -0.75, -0.25, 0.25, 0.75, 1.25]))
    torch.testing.assert_close(places[0, :, 0], (torch.arange(6) * 2 + 1) / 6 - 1)


def test_a_grid_of_another_size_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(recipe("internvl"), tmp_path)
    assert trainer.alignment is not None
    trainer.alignment.grid = VisualGrid(4, 6)
    with pytest.raises(ValueError, match="36 visual tokens, its grid 24"):
        trainer.align_step()


@pytest.mark.parametrize("family", ["glm-4v", "minicpm-v"])
def test_alignment_teaches_the_tower_alone(family: str, tmp_path: Path) -> None:
    trainer = Trainer(recipe(family), tmp_path)
    layout = find_standin(family).layout(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    losses = [trainer.align_step() for _ in range(12)]
    assert losses[-1] < 0.95 * losses[0]
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    text = (layout.text_root, *(f"{name}." for name in layout.text.entry if name not in layout.projector))
    assert changed and not any(name.startswith(text) for name in changed)


def test_lessons_have_rates_of_their_own() -> None:
    settings = recipe("llava")
    rates = [settings.learning_rate_at(step) for step in range(settings.steps)]
    assert max(rates[: settings.align_steps]) == settings.align_rate
    assert max(rates[settings.align_steps :]) == settings.learning_rate
    assert rates[settings.align_steps - 1] < 0.01 * settings.align_rate
    assert rates[settings.align_steps] < 0.02 * settings.learning_rate


def test_only_the_first_family_starts_from_nothing() -> None:
    assert recipe("qwen2-vl").donor is None
    assert recipe("llava", from_nothing=True).donor is None
    assert {recipe(family).donor for family in HEIRS} == {DONOR}
