"""Methods as lists of steps: what is checked before, kept during and verified after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines import none, rtn, smoothquant
from mqbench.harness.errors import CalibrationError, LayoutError, MQBenchError, NonFiniteError
from mqbench.harness.quant.activation import InputQuantizer
from mqbench.harness.quant.calibrate import attach_input_quantizers, calibrate_activations, round_weights_rtn
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.method import StepMethod, step_name
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.session import Batch, QuantReport, Session, Step

METHODS = [none.METHOD, rtn.METHOD, smoothquant.METHOD]
ALL_METHODS = sorted(point.name for point in entry_points(group="mqbench.methods") if point.name != "none")


def method_named(name: str) -> StepMethod:
    (point,) = entry_points(group="mqbench.methods", name=name)
    return point.load()


def quantize(
    method: StepMethod, recipe: Recipe, spoil: Callable[[nn.Module], None] = lambda model: None, num_batches: int = 2
) -> tuple[nn.Module, QuantReport, Sequence[Batch]]:
    model = tiny_model(torch.float32)
    spoil(model)
    batches = [tiny_batch(model, num_images=1, seed=seed) for seed in range(num_batches)]
    return model, method.quantize(model, tiny_layout(model), recipe, batches), batches


def rtn_with(*steps: Step) -> StepMethod:
    return StepMethod("mine", (), "for this test", lambda recipe: steps)


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w8a16", "float"])
@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)
def test_every_linear_has_the_bits_of_its_scheme(method: StepMethod, bits: str) -> None:
    model, report, batches = quantize(method, Recipe(method.name, bits, "w4a8"))
    layout = tiny_layout(tiny_model())
    assert list(report.layers) == list(layout.quantized_linears())
    weight_bits, activation_bits = {"w8a8": (8, 8), "w4a8": (4, 8), "w8a16": (8, None), "float": (None, None)}[bits]
    for name, layer in report.layers.items():
        expected = (4, 8) if layer.part is Part.TEXT else (weight_bits, activation_bits)
        assert (layer.weight_num_bits, layer.activation_num_bits) == expected
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantLinear) and (linear.input_quantizer is None) is (expected[1] is None)
    assert torch.isfinite(model(**batches[0]).logits).all()


@pytest.mark.parametrize(
    ("bits", "strategy"),
    [
        ("w4a4", "tensor"),
        ("w4a4", "token"),
        ("w4a4-g20", "modality"),
        ("w8a16int-g64", "tensor"),
        ("w3a6-g1000", "token"),
    ],
)
@pytest.mark.parametrize("name", ALL_METHODS)
def test_every_method_with_every_kind_of_grid(name: str, bits: str, strategy: str) -> None:
    """Groups of 20 leave a shorter last group in each width (32, 48, 96, 128); 1000 is wider than all of them."""
    recipe = Recipe(name, bits, bits, options={"activations": strategy})
    method = method_named(name)
    model, report, batches = quantize(method, recipe)
    scheme = recipe.text_scheme
    for layer_name, layer in report.layers.items():
        linear = model.get_submodule(layer_name)
        quantizer = linear.input_quantizer
        assert (layer.weight_num_bits, layer.activation_num_bits) == (
            scheme.weights.num_bits,
            scheme.activations.num_bits,
        )
        groups = -(-linear.in_features // (scheme.weights.group_size or linear.in_features))
        assert linear.weight_scale.shape == (linear.out_features, groups)
        is_text = layer.part == Part.TEXT
        assert quantizer.args.strategy == (strategy if is_text or strategy == "token" else "tensor")
        assert len(layer.scales) == {"token": 0, "tensor": 1, "modality": 1 + is_text}[strategy]
        assert_on_grid(quantizer, linear, batches[0])
    expected = tiny_model(torch.float32)(**batches[0]).logits
    error = (model(**batches[0]).logits - expected).norm() / expected.norm()
    assert 1e-4 < error < 1.5


def assert_on_grid(quantizer: InputQuantizer, linear: QuantLinear, batch: Batch) -> None:
    """Rounded rows lie on at most 2^b levels from -2^(b-1) to 2^(b-1) - 1, per token, modality or tensor."""
    x = torch.linspace(-300, 300, 4 * linear.in_features).view(1, 4, -1)
    low, high = quantizer.args.quant_min, quantizer.args.quant_max
    assert (low, high) == (-(2 ** (quantizer.args.num_bits - 1)), 2 ** (quantizer.args.num_bits - 1) - 1)
    y = quantizer(x)
    scale = x.abs().amax(-1, keepdim=True) / high if quantizer.args.dynamic else quantizer.scale[0]
    levels = y / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-2)
    assert low <= levels.min().round() and levels.max().round() <= high


@pytest.mark.parametrize("bits", ["float/w4a16-g128", "w4a16-g16/w8a16-g16"])
@pytest.mark.parametrize("name", ["rtn", "quarot", "mquant"])
def test_weight_only_groups(name: str, bits: str) -> None:
    model, report, batches = quantize(method_named(name), Recipe(name, *parse_bits(bits)))
    expected = tiny_model(torch.float32)(**batches[0]).logits
    error = (model(**batches[0]).logits - expected).norm() / expected.norm()
    assert all(layer.activation_num_bits is None and not layer.scales for layer in report.layers.values())
    assert {layer.weight_num_bits for layer in report.layers.values()} == ({None, 4} if "float" in bits else {4, 8})
    assert 1e-3 < error < 0.5


@pytest.mark.parametrize("name", ["rtn", "quarot", "mquant"])
def test_asymmetric_weights(name: str) -> None:
    recipe = Recipe(name, "w4a8", "w4a8-g20", options={"zero_point": True})
    model, report, _ = quantize(method_named(name), recipe)
    for layer_name in report.layers:
        linear = model.get_submodule(layer_name)
        assert not linear.weight_args.symmetric
        zero_point = linear.weight_zero_point
        assert zero_point.shape == linear.weight_scale.shape and torch.equal(zero_point, zero_point.round())
        assert zero_point.min() >= 0 and zero_point.max() <= 15 and zero_point.unique().numel() > 2


def test_a_scheme_of_sixteen_activation_bits_changes_nothing_but_weights() -> None:
    model, _, batches = quantize(rtn.METHOD, Recipe("rtn", "float", "w8a16"))
    expected = tiny_model(torch.float32)(**batches[0]).logits
    error = (model(**batches[0]).logits - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.05


def test_none_changes_outputs_by_float_noise_only() -> None:
    model, report, batches = quantize(none.METHOD, Recipe("none"), num_batches=1)
    torch.testing.assert_close(model(**batches[0]).logits, tiny_model(torch.float32)(**batches[0]).logits)
    assert report.step_s == {} and all(layer.weight_num_bits is None for layer in report.layers.values())


def test_report_holds_seconds_per_step_in_order() -> None:
    _, report, _ = quantize(smoothquant.METHOD, Recipe("smoothquant", "w8a8", "w8a8"))
    assert list(report.step_s) == ["smooth", "round_weights_rtn", "attach_input_quantizers", "calibrate_activations"]
    assert all(0 < seconds < 60 and math.isfinite(seconds) for seconds in report.step_s.values())


def test_step_name_sees_through_partial() -> None:
    assert step_name(partial(partial(attach_input_quantizers), text_strategy="modality")) == "attach_input_quantizers"


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)
def test_static_activations_without_samples_fail_before_anything_changes(method: StepMethod) -> None:
    model = tiny_model()
    with pytest.raises(CalibrationError, match=f"method '{method.name}' at w8a8/w4a8 needs calibration samples"):
        method.quantize(model, tiny_layout(model), Recipe(method.name, "w8a8", "w4a8"), [])
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_rtn_without_static_scales_needs_no_samples() -> None:
    for recipe in (Recipe("rtn", "w4a16", "w4a16"), Recipe("rtn", "w8a8", "w4a8", options={"activations": "token"})):
        _, report, _ = quantize(rtn.METHOD, recipe, num_batches=0)
        assert all(layer.weight_num_bits for layer in report.layers.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_weight_is_named_before_anything_changes(bad: float) -> None:
    def spoil(model: nn.Module) -> None:
        model.model.language_model.layers[1].mlp.up_proj.weight.data[3, 4] = bad

    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj' holds NaN or Inf"):
        quantize(rtn.METHOD, Recipe("rtn", "w8a8", "w8a8"), spoil)


def test_layout_that_misses_a_linear_is_refused() -> None:
    def spoil(model: nn.Module) -> None:
        model.model.language_model.layers[0].mlp.extra = nn.Linear(2, 2)

    with pytest.raises(LayoutError, match=r"mlp\.extra' is neither quantized"):
        quantize(rtn.METHOD, Recipe("rtn", "w8a8", "w8a8"), spoil)


def forget_down_proj(session: Session) -> None:
    name = session.layout.text.blocks[0].mlp_out
    session.linears[name].weight_args = None


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ((round_weights_rtn,), "input of '.*patch_embed.proj'"),
        ((round_weights_rtn, attach_input_quantizers), "input of '.*patch_embed.proj'"),
        ((attach_input_quantizers, calibrate_activations), "weight of '.*patch_embed.proj'"),
        (
            (round_weights_rtn, forget_down_proj, attach_input_quantizers, calibrate_activations),
            "weight.*0.mlp.down_proj",
        ),
    ],
    ids=["no quantizers", "not calibrated", "not rounded", "one forgotten"],
)
def test_a_forgotten_linear_is_an_error_that_names_it(steps: tuple[Step, ...], match: str) -> None:
    with pytest.raises(MQBenchError, match=match):
        quantize(rtn_with(*steps), Recipe("mine", "w8a8", "w8a8"))


def test_modality_scales_act_after_quantization() -> None:
    """The hooks stay on the model: visual and text rows get different scales in a plain forward pass."""
    recipe = Recipe("rtn", "float", "w8a8", options={"activations": "modality"})
    model, report, batches = quantize(rtn.METHOD, recipe)
    name = tiny_layout(tiny_model()).text.blocks[0].mlp_out
    scales = report.layers[name].scales
    seen: list[torch.Tensor] = []
    quantizer = model.get_submodule(name).input_quantizer
    handle = quantizer.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    visual = batches[0]["input_ids"] == tiny_layout(tiny_model()).image_token_id
    for mask, scale in ((visual, scales["visual"]), (~visual, scales["text"])):
        levels = seen[0][mask] / scale
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


def test_two_runs_are_identical() -> None:
    first, second = (quantize(smoothquant.METHOD, Recipe("smoothquant", "w8a8", "w4a8"))[0] for _ in range(2))
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
