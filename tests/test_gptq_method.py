"""GPTQ as a method: every layer on inputs that already rounded layers produce, and better than round-to-nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fakes.sessions import logits, sqnr_db
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines.gptq import METHOD
from mqbench.baselines.rtn import METHOD as RTN
from mqbench.harness.errors import CalibrationError, UnknownNameError
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.linear import QuantLinear, wrap_linears
from mqbench.harness.quant.scheme import Recipe, parse_bits

Batches = Sequence[dict[str, Tensor]]


def tiny_batches(model: nn.Module) -> list[dict[str, Tensor]]:
    return [tiny_batch(model, num_images=2, batch_size=4, seed=seed) for seed in range(6)]  # type: ignore[arg-type]


@torch.no_grad()
def naive_hessian(model: nn.Module, linear: QuantLinear, batches: Batches, is_text: bool) -> Tensor:
    """2 / N sum x x^T over plain forward passes of the whole model, padding left out. Float64."""
    rows: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    for batch in batches:
        model(**batch)
    handle.remove()
    if is_text:
        masks = [batch["attention_mask"].bool() for batch in batches]
        inputs = torch.cat([row[mask] for row, mask in zip(rows, masks, strict=True)]).double()
    else:
        inputs = torch.cat([(row.flatten(1) if linear.flatten else row.flatten(0, -2)) for row in rows]).double()
    return 2 / len(inputs) * inputs.T @ inputs


def llmcompressor_weight(linear: QuantLinear, before: Tensor, hessian: Tensor, actorder: str | None) -> Tensor:
    """llmcompressor's rounding of ``before`` on the scales of ``linear``."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args, scale, zero_point = linear.weight_args, linear.weight_scale, linear.weight_zero_point
    assert args is not None and scale is not None
    theirs = QuantizationArgs(
        num_bits=args.num_bits,
        symmetric=args.symmetric,
        strategy=args.strategy.value,
        group_size=args.group_size,
        actorder=actorder,
    )
    # compressed-tensors stores unsigned levels shifted by half the range, and the zero point with them.
    shifted = torch.zeros_like(scale) if zero_point is None else zero_point - 2 ** (args.num_bits - 1)
    quantized, _, fell_back = quantize_weight(
        before.float()[None], hessian.float()[None], scale.float()[None], shifted.float()[None], None, theirs
    )
    assert not fell_back.any()
    return quantized[0]


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        ("w4a16-g16/w4a16-g16", {}),
        ("w4a16/w4a16", {}),
        ("w4a16-g16/w4a16-g16", {"act_order": False, "zero_point": True}),
        ("w8a16/w8a16-g16", {"act_order": False}),
    ],
    ids=["w4 groups", "w4 channels", "in order, asymmetric", "w8"],
)
def test_whole_model_equals_llmcompressor_layer_by_layer(bits: str, options: dict[str, Any]) -> None:
    """Every layer's weight is what llmcompressor makes of it, given inputs of the model with all layers before rounded.

    The inputs come from plain forward passes of a second model into which the method's weights are copied one by one:
    a stale or unrounded input anywhere changes that layer's weight. Expected equal: all levels but one in ten thousand
    (measured: all at W4, all but 3 of 90112 at W8), since llmcompressor rounds in float32 and ours here runs in
    float64; the scales are handed over.
    """
    model, replica = tiny_model(torch.float64), tiny_model(torch.float64)
    batches, layout = tiny_batches(model), tiny_layout(model)
    METHOD.quantize(model, layout, Recipe("gptq", *parse_bits(bits), options=options), batches)
    linears = wrap_linears(replica, list(layout.quantized_linears()))
    groups = [group for tower in layout.towers for block in tower.blocks for group in shared_inputs(block)]
    different, total = 0, 0
    for group in [(layout.patch_embed,), *groups[:8], *((name,) for name in layout.projector), *groups[8:]]:
        is_text = layout.quantized_linears()[group[0]] is Part.TEXT
        hessian = naive_hessian(replica, linears[group[0]], batches, is_text)
        for name in group:
            ours = model.get_submodule(name)
            order = "weight" if options.get("act_order", True) else None
            expected = llmcompressor_weight(ours, linears[name].weight.data, hessian, order)
            step = ours.weight_scale.repeat_interleave(-(-ours.in_features // ours.weight_scale.shape[1]), dim=1)
            different += int(((ours.weight - expected) / step[:, : ours.in_features]).abs().gt(0.5).sum())
            total += expected.numel()
        for name in group:
            linears[name].weight.data = model.get_submodule(name).weight.data
    assert total == 90112 and different <= 9


def shared_inputs(block: Any) -> list[tuple[str, ...]]:
    return [block.attention_norm.readers, (block.attention.out,), block.mlp_norm.readers, (block.mlp_out,)]


def test_inputs_of_the_float_model_would_give_other_weights() -> None:
    """The test above can tell: Hessians of the float model lead to other levels in the last layer."""
    model, replica = tiny_model(torch.float64), tiny_model(torch.float64)
    batches, layout = tiny_batches(model), tiny_layout(model)
    METHOD.quantize(model, layout, Recipe("gptq", "w4a16-g16", "w4a16-g16"), batches)
    linears = wrap_linears(replica, list(layout.quantized_linears()))
    name = layout.text.blocks[-1].mlp_out
    hessian = naive_hessian(replica, linears[name], batches, is_text=True)
    stale = llmcompressor_weight(model.get_submodule(name), linears[name].weight.data, hessian, "weight")
    assert (stale - model.get_submodule(name).weight).abs().gt(1e-3).float().mean() > 0.02


@pytest.mark.parametrize("bits", ["float/w4a16-g16", "w8a16/w4a16-g20", "w8a8/w4a8-g16"])
def test_method_runs_at_every_kind_of_bit_setting(bits: str) -> None:
    model = tiny_model(torch.float32)
    batches = tiny_batches(model)
    report = METHOD.quantize(model, tiny_layout(model), Recipe("gptq", *parse_bits(bits)), batches)
    assert {layer.weight_num_bits for layer in report.layers.values() if layer.part == Part.TEXT} == {4}
    assert {layer.activation_num_bits for layer in report.layers.values()} == {8 if bits.endswith("a8-g16") else None}
    assert torch.isfinite(logits(model, batches[0])).all()


def test_needs_calibration_data_and_refuses_foreign_options() -> None:
    model = tiny_model(torch.float32)
    with pytest.raises(CalibrationError, match="'gptq' at float/w4a16-g16 needs calibration samples"):
        METHOD.quantize(model, tiny_layout(model), Recipe("gptq", "float", "w4a16-g16"), [])
    with pytest.raises(UnknownNameError, match="duo_scaling"):
        METHOD.quantize(model, tiny_layout(model), Recipe("gptq", "float", "w4a16", options={"duo_scaling": True}), [])


@pytest.mark.parametrize("bits", ["w4a16-g16", "w4a16"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_better_than_round_to_nearest_on_unseen_data(seed: int, bits: str) -> None:
    """With the same clip search. Measured gains of seeds 0 to 2: 2.0, 1.8, 2.0 dB in groups, 2.2, 2.3, 1.6 without."""
    assert sqnr_db(METHOD, bits, seed) > sqnr_db(RTN, bits, seed, weight_clip="mse") + 1
