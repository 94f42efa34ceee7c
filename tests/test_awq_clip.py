"""AWQ's clipped ranges: the search against a slow reference, what is clipped, and rounding inside the ranges."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fakes.awq import GROUPED, awq_session, naive_rounded
from mqbench.baselines import awq_clip
from mqbench.baselines.awq_clip import clip_limits, clipped_rows, group_hessians, round_clipped, round_weights_clipped
from mqbench.baselines.awq_scale import scale_channels
from mqbench.harness.quant.capture import Replay, visit_groups


def naive_limits(weight: Tensor, rows: Tensor, group_size: int) -> Tensor:
    """The clip search written as loops over output channels and groups, on the rows themselves."""
    starts = range(0, weight.shape[1], group_size)
    limits = torch.empty(len(weight), len(starts), dtype=weight.dtype)
    for (channel, row), (index, start) in itertools.product(enumerate(weight), enumerate(starts)):
        group, inputs = row[start : start + group_size], rows[:, start : start + group_size]
        errors = []
        for step in range(10):
            limit = group.abs().max() * (1 - step / 20)
            rounded = naive_rounded(group.clamp(-limit, limit)[None], group_size)[0]
            errors.append((inputs @ (rounded - group)).square().mean().item())
        limits[channel, index] = group.abs().max() * (1 - errors.index(min(errors)) / 20)
    return limits


@pytest.mark.parametrize("in_features", [48, 40], ids=["full groups", "shorter last group"])
def test_limits_are_those_of_a_slow_float64_reference(in_features: int) -> None:
    """Heavy-tailed weights, where clipping pays, and correlated inputs. Expected equal to the last digits."""
    generator = torch.Generator().manual_seed(in_features)
    weight = torch.randn(24, in_features, generator=generator, dtype=torch.float64) ** 3
    rows = torch.randn(200, in_features, generator=generator, dtype=torch.float64).cumsum(1)
    replay: Replay = lambda on_rows: [on_rows(part) for part in rows.split(64)] and None  # noqa: E731
    ours = clip_limits(weight, group_hessians(replay, GROUPED, "fc"), GROUPED)
    expected = naive_limits(weight, rows, 16)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    assert (ours < weight.abs().amax(1, keepdim=True)).any() and len(torch.unique(ours / naive_peaks(weight))) > 3


def naive_peaks(weight: Tensor) -> Tensor:
    return torch.stack([part.abs().amax(1) for part in weight.split(16, dim=1)], dim=1)


def test_clip_never_hurts_the_calibration_error_of_a_group() -> None:
    """No shrinkage is among the candidates, so this holds by construction, for every channel and group."""
    session = awq_session("w3a16-g16")
    improved = 0

    def visit(names: tuple[str, ...], replay: Replay) -> None:
        nonlocal improved
        hessians = group_hessians(replay, GROUPED, names[0])
        for name in names:
            args = session.weight_args(name)
            assert args is not None
            weight = session.linears[name].weight.detach()
            with_clip, without = (
                group_errors(round_clipped(weight, limit, args).weight - weight, hessians)
                for limit in (clip_limits(weight, hessians, args), None)
            )
            assert (with_clip <= without * (1 + 1e-12)).all()
            improved += int((with_clip < 0.9 * without).sum())

    visit_groups(session, visit)
    assert improved > 100


def group_errors(change: Tensor, hessians: Tensor) -> Tensor:
    parts = awq_clip.group_rows(change, GROUPED).view(len(change), *hessians.shape[:2])
    return torch.einsum("ogi,gij,ogj->og", parts, hessians, parts)


def test_queries_and_keys_are_not_clipped() -> None:
    session = awq_session()
    assert session.layout.vision is not None
    rows = clipped_rows(session.layout)
    vision, text = session.layout.vision.blocks[0], session.layout.text.blocks[0]
    assert rows[vision.attention.value] == slice(64, 96)
    assert [rows[name] for name in text.attention_norm.readers] == [None, None, slice(0, 16)]
    expected = {name: round_clipped(linear.weight, None, GROUPED) for name, linear in session.linears.items()}
    round_weights_clipped(session)
    for name in text.attention_norm.readers[:2]:
        assert torch.equal(session.linears[name].weight, expected[name].weight)
    assert torch.equal(
        session.linears[vision.attention.value].weight[:64], expected[vision.attention.value].weight[:64]
    )
    assert not torch.equal(session.linears[text.mlp_out].weight, expected[text.mlp_out].weight)


def test_clip_off_is_round_to_nearest_of_the_scaled_weights() -> None:
    session = awq_session(clip=False)
    scale_channels(session)
    expected = {name: round_clipped(linear.weight, None, GROUPED).levels for name, linear in session.linears.items()}
    round_weights_clipped(session)
    for name, linear in session.linears.items():
        assert linear.weight_scale is not None and linear.weight_zero_point is not None
        index = torch.arange(linear.in_features) // 16
        levels = linear.weight / linear.weight_scale[:, index] + linear.weight_zero_point[:, index]
        assert torch.equal(levels.round().int(), expected[name])
