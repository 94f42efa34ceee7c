"""Observers against direct computations on all the data at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.observers import NUM_BINS, PERCENTILE, make_observer
from mqbench.harness.quant.scheme import QuantArgs

A8 = QuantArgs(8)


def heavy_tailed(num_rows: int = 4000, width: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, width, generator=generator)
    rows[17, 3] = 60.0
    return rows


def scale_of(name: str, batches: list[torch.Tensor], args: QuantArgs = A8) -> float:
    observer = make_observer(name, args)
    for batch in batches:
        observer.update(batch)
    scale = observer.scale()
    assert scale is not None and scale.dim() == 0
    return scale.item()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.integers(2, 8))
@settings(deadline=None, max_examples=50)
def test_minmax_is_the_largest_magnitude_over_the_largest_level(values: list[float], num_bits: int) -> None:
    args = QuantArgs(num_bits)
    rows = torch.tensor(values).unsqueeze(1)
    peak = max(map(abs, values))
    expected = np.float32(peak) / np.float32(args.quant_max) if peak / args.quant_max > 0 else 1.0
    assert scale_of("minmax", [rows], args) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse"])
def test_scale_does_not_depend_on_batching_or_order(name: str) -> None:
    rows = heavy_tailed()
    whole = scale_of(name, [rows])
    assert scale_of(name, list(rows.split(128))) == whole
    assert scale_of(name, list(rows.split(128))[::-1]) == whole


def test_percentile_matches_numpy_to_a_bin() -> None:
    rows = heavy_tailed()
    expected = np.quantile(rows.abs().numpy(), PERCENTILE) / A8.quant_max
    bin_width = 64 / NUM_BINS / A8.quant_max
    assert abs(scale_of("percentile", list(rows.split(500))) - expected) <= 1.5 * bin_width
    assert scale_of("percentile", [rows]) < 0.2 * scale_of("minmax", [rows])


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.999, 1.0])
def test_percentile_is_an_option(percentile: float) -> None:
    rows = heavy_tailed()
    observer = make_observer("percentile", A8, percentile)
    for batch in rows.split(500):
        observer.update(batch)
    expected = np.quantile(rows.abs().numpy(), percentile) / A8.quant_max
    assert abs(observer.scale().item() - expected) <= 1.5 * 64 / NUM_BINS / A8.quant_max
    assert make_observer("percentile", A8).percentile == PERCENTILE


@pytest.mark.parametrize("num_bits", [4, 8])
def test_mse_finds_the_best_shrink_of_an_exhaustive_search(num_bits: int) -> None:
    args = QuantArgs(num_bits)
    rows = heavy_tailed()
    candidates = [60.0 * (1 - step / 100) / args.quant_max for step in range(80)]

    def error(scale: float) -> float:
        level = (rows.double() / scale).round().clamp(args.quant_min, args.quant_max)
        return (level * scale - rows).square().sum().item()

    best = min(error(scale) for scale in candidates)
    assert error(scale_of("mse", list(rows.split(1000)), args)) <= best * 1.001


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse"])
def test_nothing_seen_gives_none_and_all_zero_gives_one(name: str) -> None:
    observer = make_observer(name, A8)
    observer.update(torch.empty(0, 4))
    assert observer.scale() is None
    assert scale_of(name, [torch.zeros(3, 4)]) == 1.0


@pytest.mark.parametrize("name", ["percentile", "mse"])
@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e6])
def test_histograms_follow_the_magnitude_of_the_data(name: str, magnitude: float) -> None:
    rows = heavy_tailed()
    assert scale_of(name, [rows * magnitude]) == pytest.approx(magnitude * scale_of(name, [rows]), rel=2e-2)


def test_zeros_first_then_data_equals_data_with_zeros() -> None:
    rows = heavy_tailed()
    zeros = torch.zeros(10, 50)
    assert scale_of("percentile", [zeros, rows]) == scale_of("percentile", [torch.cat([rows, zeros])])


def test_half_precision_scales_are_float32() -> None:
    observer = make_observer("minmax", A8)
    observer.update(torch.full((2, 2), 3.0, dtype=torch.bfloat16))
    scale = observer.scale()
    assert scale is not None and scale.dtype == torch.float32 and scale.item() == np.float32(3.0) / np.float32(127)


def test_unknown_observer_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'minmax'"):
        make_observer("minmaxx", A8)
