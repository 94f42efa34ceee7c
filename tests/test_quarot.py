"""QuaRot: its steps, and that it does better than round-to-nearest where outlier channels are."""

from __future__ import annotations

import pytest

from fakes.sessions import outlier_model, sqnr_db
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout
from mqbench.baselines.gptq import round_weights_gptq
from mqbench.baselines.quarot import METHOD, quarot_steps
from mqbench.baselines.rotation import (
    attach_online_hadamard,
    attach_out_hadamard,
    fuse_norms,
    layernorm_to_rmsnorm,
    rotate_residual,
    rotate_values,
    rotation_steps,
)
from mqbench.baselines.rtn import METHOD as RTN
from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.calibrate import attach_input_quantizers, calibrate_activations, round_weights_rtn
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Step
from mqbench.harness.quant.transforms import HeadHadamard, OnlineHadamard

TRANSFORMS = (fuse_norms, layernorm_to_rmsnorm, rotate_residual, rotate_values, attach_online_hadamard)


def test_steps_in_order() -> None:
    expected = (*TRANSFORMS, round_weights_gptq, attach_input_quantizers, calibrate_activations)
    assert tuple(quarot_steps(Recipe("quarot"))) == expected


@pytest.mark.parametrize(
    ("option", "missing"),
    [
        ("ln2rms", {layernorm_to_rmsnorm}),
        ("rotation", {rotate_residual, rotate_values}),
        ("online_hadamard", {attach_online_hadamard}),
    ],
)
def test_a_switch_leaves_its_step_out(option: str, missing: set[Step]) -> None:
    steps = rotation_steps(Recipe("quarot", options={option: False}))
    assert steps == [step for step in TRANSFORMS if step not in missing]


def test_original_setting_adds_the_hadamard_across_heads() -> None:
    options = {"activations": "token", "online_out_hadamard": True}
    assert attach_out_hadamard in quarot_steps(Recipe("quarot", options=options))
    model = outlier_model()
    layout = tiny_layout(model)
    report = METHOD.quantize(model, layout, Recipe("quarot", "w8a8", "w8a8", options=options), [tiny_batch(model)])
    attention = layout.text.blocks[0].attention
    out = model.get_submodule(attention.out)
    assert isinstance(out.input_transform, HeadHadamard)
    assert isinstance(model.get_submodule(layout.text.blocks[0].mlp_out).input_transform, OnlineHadamard)
    assert all(model.get_submodule(name).input_quantizer.args.dynamic for name in report.layers)
    assert out.in_features == 8 * 8  # six heads do not have a Hadamard matrix, eight do


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'gptq'"):
        quarot_steps(Recipe("quarot", options={"rounding": "gptqq"}))


def test_rounding_to_nearest_is_an_option() -> None:
    assert round_weights_rtn in quarot_steps(Recipe("quarot", options={"rounding": "rtn"}))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_beats_round_to_nearest_on_outlier_channels(bits: str, seed: int) -> None:
    quality = {method.name: sqnr_db(method, bits, seed) for method in (RTN, METHOD)}
    assert quality["quarot"] > quality["rtn"] + 3
