"""MQuant end to end on the tiny model: steps, switches, scales, quality against RTN and QuaRot, determinism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fakes.sessions import add_fc2_means, hard_model, logits, sqnr_db
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines.quarot import METHOD as QUAROT
from mqbench.baselines.rotation import attach_online_hadamard, layernorm_to_rmsnorm, rotate_residual, rotate_values
from mqbench.baselines.rtn import METHOD as RTN
from mqbench.harness.errors import CalibrationError, NonFiniteError, UnknownNameError
from mqbench.harness.models.adapter import LoadedModel
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.method import step_name
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.serialize import load_quantized, save_quantized
from mqbench.harness.quant.session import Batch, QuantReport, Step
from mqbench.mquant.aifs import reorder_tokens
from mqbench.mquant.mquant import METHOD, mquant_steps
from mqbench.mquant.msq import attach_msq
from mqbench.mquant.rms import split_spikes

ORDER = (
    "fuse_norms",
    "layernorm_to_rmsnorm",
    "rotate_residual",
    "rotate_values",
    "attach_online_hadamard",
    "split_spikes",
    "round_weights_gptq",
    "attach_msq",
    "calibrate_activations",
    "reorder_tokens",
)


def test_steps_stand_in_the_papers_order() -> None:
    assert tuple(map(step_name, mquant_steps(Recipe("mquant")))) == ORDER


@pytest.mark.parametrize(
    ("switch", "missing"),
    [
        ("ln2rms", {layernorm_to_rmsnorm}),
        ("rotation", {rotate_residual, rotate_values}),
        ("online_hadamard", {attach_online_hadamard}),
        ("rms", {split_spikes}),
        ("aifs", {reorder_tokens}),
    ],
)
def test_an_ablation_is_a_step_left_out(switch: str, missing: set[Step]) -> None:
    full = mquant_steps(Recipe("mquant"))
    assert list(mquant_steps(Recipe("mquant", options={switch: False}))) == [s for s in full if s not in missing]


def test_without_msq_the_quantizers_are_the_baselines() -> None:
    steps = tuple(map(step_name, mquant_steps(Recipe("mquant", options={"msq": False, "rounding": "rtn"}))))
    assert attach_msq.__name__ not in steps
    assert steps[6:8] == ("round_weights_rtn", "attach_input_quantizers")


@pytest.mark.parametrize("switch", ["ln2rms", "rotation", "online_hadamard", "rms", "msq", "aifs"])
def test_every_ablation_runs(switch: str) -> None:
    model, report, batch = quantized(bits="w8a8/w8a8", **{switch: False})
    assert torch.isfinite(logits(model, batch)).all()
    assert set(report.step_s) == set(map(step_name, mquant_steps(Recipe("mquant", options={switch: False}))))


@pytest.mark.parametrize("bits", ["w8a8/w8a8", "w8a8/w4a8", "w4a8/w4a8", "w4a16/w8a8", "float/w4a8", "w4a8/float"])
def test_every_linear_gets_the_bits_of_its_part(bits: str) -> None:
    model, report, _ = quantized(bits=bits)
    layout = tiny_layout(model)
    recipe = Recipe("mquant", *bits.split("/"))
    assert list(report.layers) == list(layout.quantized_linears())
    for name, layer in report.layers.items():
        linear, scheme = (
            model.get_submodule(name),
            (recipe.text_scheme if layer.part is Part.TEXT else recipe.vision_scheme),
        )
        weights, activations = scheme.weights, scheme.activations
        assert layer.weight_num_bits == linear.weight_num_bits == (weights.num_bits if weights else None)
        assert layer.activation_num_bits == (activations.num_bits if activations else None)
        if weights:
            levels = linear.weight / linear.weight_scale
            assert torch.allclose(levels, levels.round(), atol=1e-3)
            assert levels.round().abs().max() <= 2 ** (weights.num_bits - 1)


def test_scales_per_modality_in_the_llm_only() -> None:
    _, report, _ = quantized()
    for layer in report.layers.values():
        assert set(layer.scales) == ({"text", "visual"} if layer.part is Part.TEXT else {"tensor"})
        assert all(scale > 0 for scale in layer.scales.values())
    assert any(len(set(layer.scales.values())) == 2 for layer in report.layers.values())


def test_margin_is_reported_where_an_online_hadamard_acts() -> None:
    model, report, _ = quantized()
    homes = {block.mlp_out for tower in tiny_layout(model).towers for block in tower.blocks}
    assert {name for name, layer in report.layers.items() if layer.eq9_margin is not None} == homes


def test_split_layers_run_rounded_without_channel_0() -> None:
    model, report, batch = quantized(rms_rule="any", fc2_mean=0.3)
    split = [name for name, layer in report.layers.items() if layer.rms_split]
    assert split
    for name in split:
        linear = model.get_submodule(name)
        assert linear.x0_weight.any() and not linear.weight[:, 0].any()
    assert torch.isfinite(logits(model, batch)).all()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w4a4"])
def test_beats_round_to_nearest_and_is_no_worse_than_quarot(bits: str, seed: int) -> None:
    rtn, quarot, mquant = (sqnr_db(method, bits, seed) for method in (RTN, QUAROT, METHOD))
    assert mquant > rtn + 3
    assert mquant > quarot - 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_rms_pays_where_fc2_rows_have_large_means(seed: int) -> None:
    full, without = (
        sqnr_db(METHOD, "w4a8/float", seed, hard_model(seed, fc2_mean=0.3, gap=1), **options)
        for options in ({}, {"rms": False})
    )
    assert full > without + 1.5


def test_large_means_widen_the_weight_grid_more_than_the_input_range() -> None:
    """With floating-point activations only the weight's side counts, and then as much as both."""
    off, both, weight, activation = (
        sqnr_db(METHOD, "w4a16/float", model=hard_model(0, fc2_mean=0.3, gap=1), **options)
        for options in ({"rms": False}, {}, {"rms_side": "weight"}, {"rms_side": "activation"})
    )
    assert both == weight > off + 4
    assert activation == pytest.approx(off, abs=0.1)


@pytest.mark.parametrize("seed", [0, 1])
def test_msq_pays_where_visual_tokens_dominate_the_mlp(seed: int) -> None:
    full, without = (
        sqnr_db(METHOD, "float/w8a8", seed, hard_model(seed, fc2_mean=0, gap=60), **options)
        for options in ({}, {"msq": False})
    )
    assert full > without + 4


def test_aifs_changes_no_output() -> None:
    outputs = []
    for aifs in (True, False):
        model, _, batch = quantized(aifs=aifs)
        outputs.append(logits(model, batch))
    assert torch.allclose(*outputs, atol=1e-4)


def test_same_seed_same_model_other_seed_another() -> None:
    states = [quantized(seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_tied_head_is_untied_and_text_still_runs() -> None:
    model = tiny_model(torch.float32)
    model.lm_head.weight = model.get_input_embeddings().weight
    batch = tiny_batch(model, num_images=2)
    expected = logits(model, batch)
    METHOD.quantize(model, tiny_layout(model), Recipe("mquant", "w8a8", "w8a8"), [batch])
    error = (logits(model, batch) - expected).norm() / expected.norm()
    assert error < 0.1


@pytest.mark.parametrize("options", [{}, {"ln2rms": False}, {"online_out_hadamard": True, "rms_rule": "any"}])
def test_saving_and_loading_gives_identical_logits(tmp_path: Path, options: dict[str, object]) -> None:
    model, report, batch = quantized(fc2_mean=0.3, **options)
    save_quantized(model, report, Recipe("mquant", "w8a8", "w4a8", 0, options), tmp_path, "tiny")
    fresh = tiny_model(torch.float32)
    loaded = LoadedModel("tiny", fresh, None, tiny_layout(fresh))
    load_quantized(tmp_path, loaded, METHOD.restore)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    decoder = fresh.get_submodule(loaded.layout.text_root)
    assert len(decoder._forward_pre_hooks) == len(model.get_submodule(loaded.layout.text_root)._forward_pre_hooks) > 0


def test_errors() -> None:
    model = tiny_model(torch.float32)
    layout, batch = tiny_layout(model), tiny_batch(model)
    with pytest.raises(CalibrationError, match="needs calibration samples"):
        METHOD.quantize(model, layout, Recipe("mquant", "w8a8", "w8a8"), [])
    with pytest.raises(UnknownNameError, match="unknown rounding"):
        METHOD.quantize(model, layout, Recipe("mquant", "w8a8", "w8a8", options={"rounding": "up"}), [batch])
    model = tiny_model(torch.float32)
    with torch.no_grad():
        model.get_submodule(layout.projector[0]).weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=layout.projector[0]):
        METHOD.quantize(model, layout, Recipe("mquant", "w8a8", "w8a8"), [batch])


def calibration(model: nn.Module, count: int = 3) -> list[Batch]:
    return [tiny_batch(model, num_images=2, batch_size=4, seed=100 + index) for index in range(count)]


def quantized(
    bits: str = "w8a8/w4a8", seed: int = 0, fc2_mean: float = 0.0, **options: object
) -> tuple[nn.Module, QuantReport, dict[str, Tensor]]:
    """A quantized tiny float32 model, its report and a batch with images."""
    model = tiny_model(torch.float32)
    add_fc2_means(model, fc2_mean)
    recipe = Recipe("mquant", *bits.split("/"), seed, options)
    report = METHOD.quantize(model, tiny_layout(model), recipe, calibration(model))
    return model, report, tiny_batch(model, num_images=2)
