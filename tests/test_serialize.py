"""A saved and loaded quantized model gives identical logits, whatever the method put into it."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness.errors import LayoutError, MissingWeightsError, MQBenchError, OutputError
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.scheme import QuantArgs, Recipe
from mqbench.harness.quant.serialize import (
    STRUCTURE_FILE,
    TENSORS_FILE,
    load_quantized,
    pack_levels,
    read_saved,
    save_quantized,
    unpack_levels,
)
from mqbench.harness.quant.session import Batch, QuantReport
from mqbench.harness.quant.transforms import OnlineHadamard, RMSNorm


def method_named(name: str) -> StepMethod:
    (entry,) = entry_points(group="mqbench.methods", name=name)
    return entry.load()


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = False) -> LoadedModel:
    model = tiny_model(dtype, seed)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    return LoadedModel("tiny", model, None, tiny_layout(model))


def quantized(recipe: Recipe, **how: Any) -> tuple[LoadedModel, QuantReport, list[Batch]]:
    loaded = tiny(**how)
    batches = [tiny_batch(loaded.model, num_images=2, batch_size=3, seed=seed) for seed in range(2)]
    return loaded, method_named(recipe.method).quantize(loaded.model, loaded.layout, recipe, batches), batches


@torch.no_grad()
def logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    return loaded.model(**batch).logits


def assert_round_trip(directory: Path, recipe: Recipe, **how: Any) -> LoadedModel:
    """Saves, loads onto a float model of other weights, and compares logits and everything that was written down."""
    before, report, batches = quantized(recipe, **how)
    save_quantized(before.model, report, recipe, directory, "tiny")
    after = tiny(seed=99, tied=how.get("tied", False), dtype=how.get("dtype", torch.float32))
    saved = load_quantized(directory, after, method_named(recipe.method).restore)
    for batch in batches:
        assert torch.equal(logits(after, batch), logits(before, batch))
    assert (saved.base_model, saved.recipe, saved.report) == ("tiny", recipe, report)
    mine, theirs = after.model.state_dict(), before.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    return after


@pytest.mark.parametrize("bits", [("w8a8", "w4a8"), ("w4a8", "float"), ("float", "w4a16")], ids="/".join)
@pytest.mark.parametrize("name", ["rtn", "smoothquant", "quarot", "mquant"])
def test_logits_are_identical(tmp_path: Path, name: str, bits: tuple[str, str]) -> None:
    assert_round_trip(tmp_path / "out", Recipe(name, *bits, seed=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["none", "mquant"])
def test_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    bits = "float" if name == "none" else "w4a8"
    assert_round_trip(tmp_path, Recipe(name, bits, bits), dtype=dtype)


@pytest.mark.parametrize("bits", ["w4a4-g20", "w3a16int", "w16a16int", "w4a16-g64", "w7a5"])
@pytest.mark.parametrize("zero_point", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("name", ["rtn", "mquant"])
def test_every_kind_of_grid(tmp_path: Path, name: str, zero_point: bool, bits: str) -> None:
    assert_round_trip(tmp_path, Recipe(name, bits, bits, options={"zero_point": zero_point}))


@pytest.mark.parametrize("strategy", ["tensor", "modality", "token"])
@pytest.mark.parametrize("tokens", ["visual", "text"])
def test_tokens_that_stay_in_floating_point(tmp_path: Path, tokens: str, strategy: str) -> None:
    options = {"quantize_tokens": tokens, "activations": strategy, "observer": "percentile", "percentile": 0.99}
    after = assert_round_trip(tmp_path, Recipe("mquant", "w8a8", "w4a8", options=options))
    linears = [module for module in after.model.modules() if isinstance(module, QuantLinear)]
    assert {linear.input_quantizer.tokens for linear in linears} == {"all", tokens}


@pytest.mark.parametrize(
    "options",
    [{"activations": "token"}, {"activations": "modality", "observer": "mse"}],
    ids=lambda options: options["activations"],
)
def test_activation_strategies(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_round_trip(tmp_path, Recipe("quarot", "w8a8", "w4a8", options=options | {"online_out_hadamard": True}))


@pytest.mark.parametrize(("name", "still_tied"), [("rtn", True), ("mquant", False)])
def test_tied_embeddings_stay_tied_only_where_the_method_left_them_so(
    tmp_path: Path, name: str, still_tied: bool
) -> None:
    after = assert_round_trip(tmp_path, Recipe(name, "w8a8", "w4a8"), tied=True)
    assert (after.model.lm_head.weight is after.model.get_input_embeddings().weight) is still_tied


def test_structures_that_no_method_combines_come_back(tmp_path: Path) -> None:
    """A wider layer behind a padded transform, a new bias, a split channel, a replaced norm, a weight off its grid."""
    recipe = Recipe("rtn", "w4a8", "w4a8")
    before, report, batches = quantized(recipe)
    block = before.layout.text.blocks[0]
    down, query = before.model.get_submodule(block.mlp_out), before.model.get_submodule(block.attention_norm.readers[0])
    down.input_transform = OnlineHadamard(down.in_features)
    down.bias = nn.Parameter(torch.randn(down.out_features), requires_grad=False)
    query.x0_weight, query.x0_bypass = query.weight[:, 0].clone(), True
    query.weight.data[:, 1] += 1e-3
    before.model.get_submodule(block.name).input_layernorm = RMSNorm(1e-5)
    save_quantized(before.model, report, recipe, tmp_path, "tiny")
    after = tiny(seed=7)
    load_quantized(tmp_path, after)
    assert torch.equal(logits(after, batches[0]), logits(before, batches[0]))


def test_weights_are_packed(tmp_path: Path) -> None:
    sizes = {}
    for bits in ("float", "w8a8", "w4a8"):
        recipe = Recipe("none" if bits == "float" else "rtn", bits, bits)
        loaded, report, _ = quantized(recipe)
        save_quantized(loaded.model, report, recipe, tmp_path / bits, "tiny")
        sizes[bits] = (tmp_path / bits / TENSORS_FILE).stat().st_size
    elements = sum(module.weight.numel() for module in loaded.model.modules() if isinstance(module, QuantLinear))
    assert sizes["w8a8"] - sizes["w4a8"] == pytest.approx(elements / 2, rel=0.05)
    assert sizes["float"] - sizes["w4a8"] > 3 * elements


@given(st.integers(2, 16), st.booleans(), st.integers(1, 7), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_packing_loses_nothing(num_bits: int, symmetric: bool, rows: int, columns: int) -> None:
    args = QuantArgs(num_bits, symmetric=symmetric)
    generator = torch.Generator().manual_seed(rows * columns)
    levels = torch.randint(args.quant_min, args.quant_max + 1, (rows, columns), generator=generator, dtype=torch.int32)
    levels.view(-1)[0] = args.quant_min
    levels.view(-1)[-1] = args.quant_max
    packed = pack_levels(levels, args)
    assert torch.equal(unpack_levels(packed, args, (rows, columns)), levels)
    if num_bits <= 4:
        assert packed.nbytes == (rows * columns + 1) // 2


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    recipe = Recipe("rtn", "w8a8", "w8a8")
    loaded, report, _ = quantized(recipe)
    save_quantized(loaded.model, report, recipe, tmp_path, "huge")
    assert read_saved(tmp_path).base_model == "huge"
    with pytest.raises(LayoutError, match="made from 'huge', not from 'tiny'"):
        load_quantized(tmp_path, tiny())


def test_unreadable_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="mqbench quantize"):
        read_saved(tmp_path)
    recipe = Recipe("rtn", "w8a8", "w8a8")
    loaded, report, _ = quantized(recipe)
    save_quantized(loaded.model, report, recipe, tmp_path, "tiny")
    tensors = (tmp_path / TENSORS_FILE).read_bytes()
    (tmp_path / TENSORS_FILE).write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(MissingWeightsError, match="cannot be read"):
        load_quantized(tmp_path, tiny())
    structure = json.loads((tmp_path / STRUCTURE_FILE).read_text())
    (tmp_path / STRUCTURE_FILE).write_text(json.dumps(structure | {"format_version": 0}))
    with pytest.raises(MissingWeightsError, match="another format version"):
        read_saved(tmp_path)


def test_interrupted_save_leaves_no_folder_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("rtn", "w8a8", "w8a8")
    loaded, report, _ = quantized(recipe)
    save_quantized(loaded.model, report, recipe, tmp_path, "tiny")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("mqbench.harness.quant.serialize.save_file", fail)
    with pytest.raises(OutputError, match="disk full"):
        save_quantized(loaded.model, report, recipe, tmp_path, "tiny")
    with pytest.raises(MissingWeightsError):
        read_saved(tmp_path)


def test_folder_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = Recipe("rtn", "w8a8", "w8a8")
    loaded, report, _ = quantized(recipe)
    with pytest.raises(OutputError, match="choose another folder"):
        save_quantized(loaded.model, report, recipe, tmp_path / "file", "tiny")


def test_unknown_transform_cannot_be_saved(tmp_path: Path) -> None:
    recipe = Recipe("rtn", "w8a8", "w8a8")
    loaded, report, _ = quantized(recipe)
    loaded.model.get_submodule(loaded.layout.projector[0]).input_transform = nn.Identity()
    with pytest.raises(MQBenchError, match=r"merger\.mlp\.0' cannot be saved"):
        save_quantized(loaded.model, report, recipe, tmp_path, "tiny")
