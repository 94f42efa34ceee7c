"""RMS: Eq. 8 against dense matrices, the Eq. 9 decision, exactness of the split and what it buys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakes.sessions import add_fc2_means, logits, tiny_session
from mqbench.baselines.fusion import fuse_norms, layernorm_to_rmsnorm
from mqbench.baselines.gptq import round_weights_gptq
from mqbench.baselines.rotation import attach_online_hadamard, rotate_residual, rotate_values
from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.activation import InputQuantizer, fake_quantize
from mqbench.harness.quant.capture import collect_rows
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.scheme import QuantArgs, Strategy
from mqbench.harness.quant.session import Session
from mqbench.harness.quant.transforms import OnlineHadamard
from mqbench.harness.quant.weight import round_to_nearest, store_rounded
from mqbench.kernels.hadamard import hadamard_matrix
from mqbench.mquant.rms import Side, eq9_sides, split_channel0, split_spikes

WIDTHS = [8, 12, 24, 48, 67, 128]
W4 = QuantArgs(4, strategy=Strategy.CHANNEL)
FC2 = "model.visual.blocks.0.mlp.fc2"


@given(width=st.sampled_from(WIDTHS), outputs=st.integers(1, 9), mean=st.floats(-1, 1), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_eq8_and_both_sides_of_eq9_follow_from_dense_matrices(width: int, outputs: int, mean: float, seed: int) -> None:
    weight = mean + torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    linear = hadamard_linear(weight)
    padded = linear.in_features
    columns = torch.zeros(padded, outputs, dtype=torch.float64)
    columns[:width] = weight.T
    dense = hadamard_matrix(padded, torch.float64) @ columns  # the paper's H W
    assert torch.allclose(dense[0].abs(), (padded**0.5 * columns.mean(0)).abs(), atol=1e-12)
    spike, peak = eq9_sides(linear)
    assert torch.allclose(spike, dense[0].abs(), atol=1e-12)
    assert torch.allclose(peak, weight.abs().amax(1), atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_exact_before_rounding(seed: int) -> None:
    session, batch, _ = tiny_session(seed)
    with torch.no_grad():
        weight = session.linears[FC2].weight
        weight += torch.linspace(-0.3, 0.3, len(weight), dtype=weight.dtype)[:, None]
    expected = logits(session.model, batch)
    transform(session)
    split_spikes(session)
    assert session.report.layers[FC2].rms_split
    assert torch.allclose(logits(session.model, batch), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("x0_bits", [None, 8, 4])
def test_split_of_one_linear(x0_bits: int | None) -> None:
    weight = 0.5 + torch.randn(6, 24, dtype=torch.float64)
    linear, x = hadamard_linear(weight), torch.randn(5, 24, dtype=torch.float64)
    first = linear.weight[:, 0].clone()
    split_channel0(linear, x0_bits)
    assert not linear.weight[:, 0].any()
    prepared, x0 = linear.prepare_input(x)
    assert not prepared[:, 0].any()
    assert torch.allclose(x0[:, 0], x.sum(-1) / 24**0.5)
    error = (linear(x) - x @ weight.T).abs().max()
    if x0_bits is None:
        assert error < 1e-12
    else:
        step = first.abs().max() / (2 ** (x0_bits - 1) - 1)
        assert 0 < error <= x0.abs().max() * step * 0.5 + 1e-12
        assert len((linear.x0_weight / step).round().unique()) <= 2**x0_bits - 1


def test_eq9_decides_per_layer_on_the_final_matrix() -> None:
    session, _, _ = tiny_session()
    with torch.no_grad():
        weight = session.linears[FC2].weight
        weight.copy_(0.01 * weight + 0.2)
    attach_online_hadamard(session)
    split_spikes(session)
    crafted, other = (session.report.layers[FC2.replace("0.mlp", f"{index}.mlp")] for index in (0, 1))
    assert crafted.rms_split and crafted.eq9_margin > 5
    assert not other.rms_split and other.eq9_margin < 1
    assert set(session.report.layers) == {block.mlp_out for tower in session.layout.towers for block in tower.blocks}


def test_centred_outputs_lose_the_mean_that_all_of_them_share() -> None:
    """Eq. 9 is a property of the final matrix: LayerNorm-to-RMSNorm removes what is common to all output rows."""
    session, _, _ = tiny_session()
    with torch.no_grad():
        weight = session.linears[FC2].weight
        weight.copy_(0.01 * weight + 0.2)
    transform(session)
    split_spikes(session)
    assert session.report.layers[FC2].eq9_margin < 1


@pytest.mark.parametrize(
    ("means", "split"),
    [
        ([2.0, 2.0, 0.0], {"median", "any", "norm"}),
        ([2.0, 0.0, 0.0], {"any", "norm"}),
        ([0.5, 0.5, 0.5], {"median", "any", "norm"}),
        ([0.2, 0.0, 0.0], {"any"}),
        ([0.0, 0.0, 0.0], set()),
    ],
)
def test_rules_of_aggregation(means: list[float], split: set[str]) -> None:
    """Rows of +-1 around a mean, width 64: the right side of Eq. 9 is 1 + |mean|, the left 8 |mean|."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(32)
    rows = torch.stack([signs + mean for mean in means])
    for rule in ("median", "any", "norm"):
        session, _, _ = tiny_session(rms_rule=rule)
        session.linears = {FC2: hadamard_linear(rows)}
        split_spikes(session)
        assert session.report.layers[FC2].rms_split == (rule in split), rule


def test_unknown_rule_is_refused() -> None:
    session, _, _ = tiny_session(rms_rule="mean")
    with pytest.raises(UnknownNameError, match="unknown RMS rule 'mean'"):
        split_spikes(session)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_split_lowers_the_rounding_error_of_a_large_mean_layer(num_bits: int) -> None:
    """Weights and activations with a large mean, as behind GELU; both sides on symmetric per-tensor/per-row grids."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator, dtype=torch.float64)
    weight += 1.5 * torch.randn(64, 1, generator=generator, dtype=torch.float64).sign()
    x = torch.nn.functional.gelu(2 * torch.randn(256, 128, generator=generator, dtype=torch.float64))
    expected = x @ weight.T
    plain, split = hadamard_linear(weight), hadamard_linear(weight)
    split_channel0(split)
    errors = [(quantized(linear, x, num_bits) - expected).norm() / expected.norm() for linear in (plain, split)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("bias", [False, True])
def test_each_side_computes_its_formula(side: Side, bias: bool) -> None:
    """The formulas of ``split_spikes``, written out, with W4 rows and an 8-bit input; x0 is far out of range."""
    generator = torch.Generator().manual_seed(1)
    weight = 0.5 + torch.randn(6, 24, generator=generator, dtype=torch.float64)
    linear = hadamard_linear(weight)
    if bias:
        linear.bias = torch.nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64), requires_grad=False)
    x = 1 + torch.randn(7, 24, generator=generator, dtype=torch.float64)
    z, w = linear.prepare_input(x)[0], linear.weight.clone()
    split_channel0(linear, side=side)
    without = torch.eye(24, dtype=torch.float64)
    without[0, 0] = 0
    seen = z if side is Side.WEIGHT else z @ without
    grid = w if side is Side.ACTIVATION else w @ without
    scale = seen.abs().max() / 127
    rounded = round_to_nearest(grid, W4).weight
    q = fake_quantize(seen, scale, QuantArgs(8))
    x0 = q[:, 0] if side is Side.WEIGHT else z[:, 0]
    w0 = rounded[:, 0] if side is Side.ACTIVATION else w[:, 0]
    expected = q @ rounded.T + (linear.bias if bias else 0) + torch.outer(x0, w0)
    store_rounded(linear, round_to_nearest(linear.weight, W4), W4)
    linear.input_quantizer = InputQuantizer("fc2", QuantArgs(8))
    linear.input_quantizer.observing = True
    linear(x)
    linear.input_quantizer.freeze()
    assert linear.input_quantizer.scale.item() == scale.item()
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-12)
    assert (w[:, 0] == linear.x0_weight).all() if side is not Side.ACTIVATION else linear.x0_weight is None


@pytest.mark.parametrize("side", list(Side))
def test_weight_rounding_sees_the_rows_that_meet_its_weight(side: Side) -> None:
    """Under ``activation`` w0 is rounded with the others, so its Hessian has x0; elsewhere channel 0 is no channel."""
    session, _, _ = tiny_session(bits="w4a16", rms_rule="any", rms_side=side.value)
    add_fc2_means(session.model, 0.3)
    attach_online_hadamard(session)
    split_spikes(session)
    linear, rows = session.linears[FC2], []
    with collect_rows(session, FC2, rows.append):
        session.run_calibration()
    assert torch.cat(rows)[:, 0].any().item() is (side is Side.ACTIVATION)
    round_weights_gptq(session)
    assert linear.weight[:, 0].any().item() is (side is Side.ACTIVATION)


def test_each_side_helps_where_its_outlier_is() -> None:
    """Large w0 hurts a weight grid, large x0 an input range: each side mends its own, both mend both."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(64, 128, generator=generator, dtype=torch.float64)
    rows = torch.randn(256, 128, generator=generator, dtype=torch.float64)
    large_mean = {"weight": (noise + 1.5, rows), "activation": (noise, rows + 3)}
    for helps, (weight, x) in large_mean.items():
        errors = {None: rounding_error(weight, x, None)} | {side: rounding_error(weight, x, side) for side in Side}
        idle = Side.ACTIVATION if helps == "weight" else Side.WEIGHT
        assert errors[Side(helps)] < 0.7 * errors[None], helps
        assert errors[Side.BOTH] < 0.7 * errors[None]
        assert errors[idle] == pytest.approx(errors[None], rel=0.3)


def test_unknown_side_is_refused() -> None:
    session, _, _ = tiny_session(rms_side="weights")
    with pytest.raises(UnknownNameError, match="unknown RMS side 'weights'; did you mean 'weight'"):
        split_spikes(session)


def rounding_error(weight: Tensor, x: Tensor, side: Side | None) -> float:
    """Relative output error of a W4A4 layer behind an online Hadamard."""
    linear = hadamard_linear(weight)
    if side is not None:
        split_channel0(linear, side=side)
    store_rounded(linear, round_to_nearest(linear.weight, W4), W4)
    linear.input_quantizer = InputQuantizer("fc2", QuantArgs(4))
    linear.input_quantizer.observing = True
    linear(x)
    linear.input_quantizer.freeze()
    expected = x @ weight.T
    return ((linear(x) - expected).norm() / expected.norm()).item()


def hadamard_linear(weight: Tensor) -> QuantLinear:
    """A linear behind an online Hadamard that computes the same as ``weight`` alone."""
    online = OnlineHadamard(weight.shape[1])
    linear = QuantLinear(online(weight), None, name="fc2")
    linear.input_transform = online
    return linear


def transform(session: Session) -> None:
    for step in (fuse_norms, layernorm_to_rmsnorm, rotate_residual, rotate_values, attach_online_hadamard):
        step(session)


def quantized(linear: QuantLinear, x: Tensor, num_bits: int) -> Tensor:
    args = QuantArgs(num_bits)
    prepared, x0 = linear.prepare_input(x)
    rows = fake_quantize(linear.weight, linear.weight.abs().amax(1, keepdim=True) / args.quant_max, args)
    y = fake_quantize(prepared, prepared.abs().max() / 127, QuantArgs(8)) @ rows.T
    return y if x0 is None else y + x0 * linear.x0_weight
