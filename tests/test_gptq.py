"""GPTQ bit for bit against llmcompressor, and against the textbook loop in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines.gptq import gptq_round, input_hessian, inverse_factor, round_weights_gptq
from mqbench.harness.errors import CalibrationError, NonFiniteError
from mqbench.harness.quant.calibrate import round_weights_rtn
from mqbench.harness.quant.capture import Replay
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.method import open_session, verify
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Strategy
from mqbench.harness.quant.session import Session
from mqbench.harness.quant.weight import round_to_nearest, weight_scale

CHANNEL = QuantArgs(4, strategy=Strategy.CHANNEL)
GROUP = QuantArgs(4, strategy=Strategy.GROUP, group_size=128)
W8 = QuantArgs(8, strategy=Strategy.CHANNEL)
RAGGED = QuantArgs(4, strategy=Strategy.GROUP, group_size=80)
ASYMMETRIC = QuantArgs(4, symmetric=False, strategy=Strategy.GROUP, group_size=128)

Oracle = Callable[[Tensor, Tensor, QuantArgs, Any, bool], Tensor]


@pytest.fixture(scope="module")
def llmcompressor_gptq() -> Oracle:
    """Dequantized weights of llmcompressor's ``quantize_weight`` on given scales."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    def run(weight: Tensor, hessian: Tensor, args: QuantArgs, grid: Any, act_order: bool) -> Tensor:
        theirs = QuantizationArgs(
            num_bits=args.num_bits,
            symmetric=args.symmetric,
            strategy=args.strategy.value,
            group_size=args.group_size,
            actorder="weight" if act_order else None,
        )
        zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        quantized, _, fell_back = quantize_weight(
            weight.clone()[None], hessian.clone()[None], grid.scale[None], zero_point[None], None, theirs
        )
        assert not fell_back.any()
        return quantized[0]

    return run


def problem(
    rows: int, columns: int, seed: int, dead: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, in which the first ``dead`` channels never fire."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    inputs *= torch.rand(columns, generator=generator, dtype=torch.float64).mul(3).exp()
    inputs[:, :dead] = 0
    return weight.to(dtype), (inputs.T @ inputs * (2 / len(inputs))).to(dtype)


def textbook(weight: Tensor, hessian: Tensor, scale: Tensor, args: QuantArgs, percdamp: float = 0.01) -> Tensor:
    """Optimal brain quantization column by column, with the inverse updated by Gaussian elimination. Float64."""
    weight, hessian = weight.clone(), hessian.clone()
    hessian.diagonal().add_(percdamp * hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian)
    result = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        column = scale[:, i]
        result[:, i] = (weight[:, i] / column).round().clamp(args.quant_min, args.quant_max) * column
        error = (weight[:, i] - result[:, i]) / inverse[i, i]
        weight -= error[:, None] * inverse[i]
        inverse -= inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    return result


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("args", [CHANNEL, GROUP, RAGGED, W8], ids=["w4", "w4g128", "w4g80, shorter last", "w8"])
@pytest.mark.parametrize(("rows", "columns", "dead"), [(48, 128, 0), (40, 384, 3), (64, 512, 1)])
def test_equals_llmcompressor_bit_for_bit(
    llmcompressor_gptq: Oracle, args: QuantArgs, act_order: bool, rows: int, columns: int, dead: int
) -> None:
    """Same float32 Hessian and scales in, identical dequantized weights, hence identical levels, out."""
    weight, hessian = problem(rows, columns, seed=columns, dead=dead)
    grid = weight_scale(weight, args, "mse")
    ours = gptq_round(weight, hessian, args, grid=grid, act_order=act_order)
    expected = llmcompressor_gptq(weight, hessian, args, grid, act_order)
    assert torch.equal(ours.weight, expected)
    groups = torch.arange(columns) // (args.group_size or columns)
    assert torch.equal(ours.levels, (expected / grid.scale[:, groups]).round().int())


@pytest.mark.parametrize("args", [ASYMMETRIC, replace(ASYMMETRIC, group_size=96)], ids=["g128", "g96, shorter last"])
def test_asymmetric_groups_equal_llmcompressor(llmcompressor_gptq: Oracle, args: QuantArgs) -> None:
    """They round x / s + z, we round x / s and add z: the same but for ties, of which random weights have none."""
    # compressed-tensors stores unsigned levels shifted by -8, and the zero point with them.
    weight, hessian = problem(32, 256, seed=5)
    grid = weight_scale(weight, args)
    assert grid.zero_point is not None
    shifted = type(grid)(grid.scale, grid.zero_point - 8)
    assert torch.equal(
        gptq_round(weight, hessian, args, grid=grid).weight, llmcompressor_gptq(weight, hessian, args, shifted, True)
    )


@pytest.mark.parametrize("block_size", [16, 128])
def test_equals_the_textbook_in_float64(block_size: int) -> None:
    weight, hessian = problem(16, 96, seed=2, dtype=torch.float64)
    args = QuantArgs(4, strategy=Strategy.GROUP, group_size=32)
    grid = weight_scale(weight, args, "mse")
    ours = gptq_round(weight, hessian, args, grid=grid, act_order=False, block_size=block_size)
    expected = textbook(weight, hessian, grid.scale.repeat_interleave(32, dim=1), args)
    torch.testing.assert_close(ours.weight, expected, rtol=0, atol=1e-10)


def test_act_order_is_the_textbook_on_sorted_columns() -> None:
    weight, hessian = problem(16, 64, seed=3, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True)
    grid = weight_scale(weight, CHANNEL, "mse")
    expected = textbook(weight[:, order], hessian[order][:, order], grid.scale.expand(-1, 64), CHANNEL)
    torch.testing.assert_close(gptq_round(weight, hessian, CHANNEL).weight[:, order], expected, rtol=0, atol=1e-10)


def test_output_error_is_well_below_round_to_nearest() -> None:
    weight, hessian = problem(32, 128, seed=4, dtype=torch.float64)

    def error(rounded: Tensor) -> float:
        delta = rounded - weight
        return torch.einsum("oi,ij,oj->", delta, hessian, delta).item()

    nearest = error(round_to_nearest(weight, CHANNEL, "mse").weight)
    assert error(gptq_round(weight, hessian, CHANNEL).weight) < 0.5 * nearest
    assert error(gptq_round(weight, hessian, CHANNEL, act_order=False).weight) < 0.6 * nearest


def test_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = problem(8, 64, seed=6, dtype=torch.float64)
    assert torch.equal(gptq_round(weight, hessian, CHANNEL).levels, gptq_round(weight, hessian * 1024, CHANNEL).levels)


def test_inputs_are_left_alone() -> None:
    weight, hessian = problem(8, 64, seed=6, dead=2)
    copies = weight.clone(), hessian.clone()
    rounded = gptq_round(weight, hessian, CHANNEL)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])
    assert (rounded.weight[:, :2] == 0).all()


def test_singular_hessian_is_damped_more_until_it_factorizes() -> None:
    """Rank 1 with a slightly negative part: 1 % of the mean diagonal cannot save it, more can."""
    direction = torch.ones(32, 1, dtype=torch.float64)
    hessian = direction @ direction.T - 0.5 * torch.eye(32, dtype=torch.float64)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    assert torch.linalg.eigvalsh(damped).min() < 0
    factor = inverse_factor(hessian, 0.01)
    stronger = hessian + 0.01 * 1000 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(stronger), rtol=0, atol=1e-10)
    weight = problem(4, 32, seed=7, dtype=torch.float64)[0]
    assert torch.isfinite(gptq_round(weight, hessian, CHANNEL).weight).all()


def test_nan_hessian_names_the_layer() -> None:
    with pytest.raises(NonFiniteError, match=r"'mlp\.fc2'"):
        inverse_factor(torch.full((4, 4), float("nan")), name="mlp.fc2")


def test_input_hessian_is_the_mean_outer_product() -> None:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def replay(on_rows: Callable[[Tensor], None]) -> None:
        for part in rows.split(7):
            on_rows(part)

    expected = 2 * torch.stack([torch.outer(row, row) for row in rows]).mean(0)
    torch.testing.assert_close(input_hessian(replay, "fc"), expected)
    nothing: Replay = lambda on_rows: None  # noqa: E731
    with pytest.raises(CalibrationError, match="reaches 'fc'"):
        input_hessian(nothing, "fc")


def session_of(text: str = "w4a16", vision: str = "w4a16", **options: Any) -> Session:
    model = tiny_model(torch.float64)
    batches = [tiny_batch(model, num_images=1, batch_size=4, seed=seed) for seed in range(8)]
    return open_session(model, tiny_layout(model), Recipe("test", vision, text, options=options), batches)


@torch.no_grad()
def logit_error(session: Session, reference: list[Tensor]) -> float:
    total = 0.0
    for batch, expected in zip(session.batches, reference, strict=True):
        valid = batch["attention_mask"].bool()
        total += (session.model(**batch).logits - expected)[valid].square().sum().item()
    return total


def test_step_rounds_every_linear_and_beats_rtn_on_the_calibration_logits() -> None:
    errors = {}
    for step in (round_weights_rtn, round_weights_gptq):
        session = session_of(weight_clip="mse")
        with torch.no_grad():
            reference = [session.model(**batch).logits for batch in session.batches]
        step(session)
        verify(session)
        assert all(layer.weight_num_bits == 4 and layer.weight_error for layer in session.report.layers.values())
        errors[step] = logit_error(session, reference)
    assert errors[round_weights_gptq] < 0.6 * errors[round_weights_rtn]


def test_step_leaves_a_float_tower_alone() -> None:
    session = session_of(vision="float")
    before = {name: linear.weight.clone() for name, linear in session.linears.items()}
    round_weights_gptq(session)
    for name, linear in session.linears.items():
        assert torch.equal(linear.weight, before[name]) is (session.part(name) is not Part.TEXT)


def test_split_channel_stays_zero_and_out_of_the_hessian() -> None:
    session = session_of()
    linear = session.linears[session.layout.text.blocks[0].mlp_out]
    linear.x0_weight = linear.weight[:, 0].clone()
    linear.weight.data[:, 0] = 0
    round_weights_gptq(session)
    assert (linear.weight[:, 0] == 0).all()
