"""Weight grids against naive loops and compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqbench.harness.errors import NonFiniteError, UnknownNameError
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.scheme import QuantArgs, Strategy
from mqbench.harness.quant.weight import round_to_nearest, store_rounded, weight_scale

W4 = QuantArgs(4, strategy=Strategy.CHANNEL)
W4_GROUP = QuantArgs(4, strategy=Strategy.GROUP, group_size=16)
W4_ASYM = QuantArgs(4, symmetric=False, strategy=Strategy.GROUP, group_size=16)
W4_RAGGED = QuantArgs(4, strategy=Strategy.GROUP, group_size=24)
W8 = QuantArgs(8, strategy=Strategy.CHANNEL)
GRIDS = [W4, W4_GROUP, W4_ASYM, W8]


def random_weight(seed: int = 0, rows: int = 12, columns: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0, 5] = 9.0
    return weight.to(dtype)


def naive_group(values: list[float], args: QuantArgs, clip: str) -> list[float]:
    """Dequantized values of one group, scalar by scalar in float64."""
    low, high = min(0.0, *values), max(0.0, *values)
    if args.symmetric:
        high = max(high, -low)
        low = -high
    best_error, best = float("inf"), values
    for step in range(80 if clip == "mse" else 1):
        shrink = 1 - step / 100
        scale = (high if args.symmetric else high - low) * shrink / args.quant_max
        zero = 0 if args.symmetric else round(-low * shrink / scale)
        levels = [min(max(round(value / scale) + zero, args.quant_min), args.quant_max) for value in values]
        rounded = [(level - zero) * scale for level in levels]
        error = sum(abs(a - b) ** 2.4 for a, b in zip(values, rounded, strict=True))
        if error < best_error:
            best_error, best = error, rounded
    return best


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("args", [*GRIDS, W4_RAGGED], ids=["w4", "w4g16", "w4g16-asym", "w8", "w4g24, last of 16"])
def test_equals_the_naive_search(args: QuantArgs, clip: str) -> None:
    weight = random_weight(dtype=torch.float64)
    size = args.group_size or weight.shape[1]
    rounded = round_to_nearest(weight, args, clip)
    groups = [row.split(size) for row in weight]
    naive = [[value for group in row for value in naive_group(group.tolist(), args, clip)] for row in groups]
    torch.testing.assert_close(rounded.weight, torch.tensor(naive, dtype=torch.float64), rtol=0, atol=1e-12)


@given(st.integers(1, 9), st.integers(6, 40), st.integers(2, 8), st.booleans(), st.sampled_from(["minmax", "mse"]))
@settings(deadline=None, max_examples=40)
def test_a_group_is_rounded_as_if_it_stood_alone(
    rows: int, columns: int, num_bits: int, symmetric: bool, clip: str
) -> None:
    """Whatever the width: the last group has the columns that are left."""
    args = QuantArgs(num_bits, symmetric=symmetric, strategy=Strategy.GROUP, group_size=8)
    weight = random_weight(rows, rows, columns, torch.float64)
    alone = QuantArgs(num_bits, symmetric=symmetric, strategy=Strategy.CHANNEL)
    groups = [round_to_nearest(group, alone, clip) for group in weight.split(8, dim=1)]
    rounded = round_to_nearest(weight, args, clip)
    assert torch.equal(rounded.levels, torch.cat([group.levels for group in groups], dim=1))
    assert torch.equal(rounded.weight, torch.cat([group.weight for group in groups], dim=1))
    assert torch.equal(rounded.grid.scale, torch.cat([group.grid.scale for group in groups], dim=1))


@given(st.integers(1, 9), st.integers(6, 40), st.integers(2, 8), st.booleans())
@settings(deadline=None, max_examples=40)
def test_levels_stay_on_the_grid_and_minmax_errs_at_most_half_a_step(
    rows: int, columns: int, num_bits: int, symmetric: bool
) -> None:
    args = QuantArgs(num_bits, symmetric=symmetric, strategy=Strategy.GROUP, group_size=8)
    weight = random_weight(rows, rows, columns, torch.float64)
    rounded = round_to_nearest(weight, args)
    assert rounded.grid.scale.shape == (rows, (columns + 7) // 8)
    assert rounded.levels.min() >= args.quant_min and rounded.levels.max() <= args.quant_max
    step = rounded.grid.scale.repeat_interleave(8, dim=1)[:, :columns]
    # A zero point is a whole number, which moves the ends of an asymmetric range by up to half a step more.
    assert ((rounded.weight - weight).abs() <= step * (0.5 if symmetric else 1.0) * (1 + 1e-12)).all()


@pytest.mark.parametrize("args", [W4, W4_GROUP], ids=["w4", "w4g16"])
def test_mse_clip_is_never_worse_than_minmax(args: QuantArgs) -> None:
    weight = random_weight(3)

    def error(clip: str) -> torch.Tensor:
        return (round_to_nearest(weight, args, clip).weight - weight).abs().pow(2.4).sum()

    assert error("mse") < 0.9 * error("minmax")


@pytest.mark.parametrize("args", [W4, W4_GROUP, W8], ids=["w4", "w4g16", "w8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_to_nearest_equals_compressed_tensors_bit_for_bit(args: QuantArgs, dtype: torch.dtype) -> None:
    """Dequantized weights, given our scales; levels follow, as the scales are the same."""
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize

    weight = random_weight(1, dtype=dtype)
    theirs = QuantizationArgs(
        num_bits=args.num_bits, symmetric=True, strategy=args.strategy.value, group_size=args.group_size
    )
    rounded = round_to_nearest(weight, args, "mse")
    zero_point = torch.zeros_like(rounded.grid.scale)
    assert torch.equal(rounded.weight, fake_quantize(weight, rounded.grid.scale, zero_point, theirs))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16], ids=["channel", "g16"])
def test_llmcompressors_own_round_to_nearest(symmetric: bool, num_bits: int, group_size: int | None) -> None:
    """Their whole path: min-max observer, then compressed-tensors' rounding.

    Asymmetric grids are the same as ours: equal scales, zero points (theirs are 2^(b-1) less, for signed levels) and
    dequantized weights, bit for bit. Symmetric scales differ by design: ours is max|w| / (2^(b-1) - 1) (Eq. 2), theirs
    max|w| / (2^(b-1) - 1/2). Given our scale, their rounding is ours (the test above).
    """
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from llmcompressor.observers import Observer

    strategy = Strategy.CHANNEL if group_size is None else Strategy.GROUP
    args = QuantArgs(num_bits, symmetric=symmetric, strategy=strategy, group_size=group_size)
    theirs = QuantizationArgs(num_bits=num_bits, symmetric=symmetric, strategy=strategy.value, group_size=group_size)
    weight = random_weight(4)
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=theirs)
    found = observer(weight).get_qparams()
    scale, zero_point = found["scale"], found["zero_point"]
    ours = round_to_nearest(weight, args)
    if symmetric:
        steps = 2 ** (num_bits - 1) - 0.5
        torch.testing.assert_close(scale * steps, ours.grid.scale * args.quant_max, rtol=1e-6, atol=0)
        assert not zero_point.any()
        return
    assert torch.equal(scale, ours.grid.scale)
    assert torch.equal(zero_point.float() + 2 ** (num_bits - 1), ours.grid.zero_point)
    assert torch.equal(fake_quantize(weight, scale, zero_point, theirs), ours.weight)


def test_a_zero_row_stays_zero() -> None:
    weight = torch.zeros(2, 16)
    for args in (W4, W4_ASYM, W4_RAGGED):
        rounded = round_to_nearest(weight, args, "mse")
        assert torch.equal(rounded.weight, weight) and (rounded.grid.scale == 1).all()


def test_half_precision_weight_is_the_rounded_product_of_float32_scales() -> None:
    weight = random_weight(dtype=torch.bfloat16)
    rounded = round_to_nearest(weight, W4)
    assert rounded.grid.scale.dtype == torch.float32 and rounded.weight.dtype == torch.bfloat16
    assert torch.equal(rounded.weight, (rounded.levels * rounded.grid.scale).bfloat16())


def test_store_rounded_fills_the_linear_and_returns_the_relative_error() -> None:
    weight = random_weight()
    linear = QuantLinear(weight.clone(), None, name="fc")
    rounded = round_to_nearest(weight, W4_ASYM)
    error = store_rounded(linear, rounded, W4_ASYM)
    assert error == pytest.approx(((rounded.weight - weight).norm() / weight.norm()).item(), rel=1e-5)
    assert linear.weight_num_bits == 4 and torch.equal(linear.weight, rounded.weight)
    assert linear.weight_scale.shape == linear.weight_zero_point.shape == (12, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weight_names_the_layer(bad: float) -> None:
    weight = random_weight()
    weight[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.fc"):
        round_to_nearest(weight, W4, name="blocks.0.fc")


def test_bad_requests_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"weight clip 'mes'.*did you mean 'mse'"):
        weight_scale(torch.ones(2, 20), W4, "mes")
