"""How widths run on a GPU: every plan computes the matrix of the CPU, exactly, within the limits of a program."""

from __future__ import annotations

from functools import reduce
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mqbench.kernels.gemm_configs import FAMILIES
from mqbench.kernels.hadamard import hadamard_factors, hadamard_transform, is_supported, padded_size
from mqbench.kernels.hadamard_construct import base_matrix, is_power_of_two
from mqbench.kernels.hadamard_plan import (
    MAX_ELEMENTS,
    MAX_SIDE,
    MIN_TILE,
    OUTER,
    Plan,
    Rows,
    Tiles,
    _split,
    cheapest_outer,
    cover,
    plan,
    signs,
)

WIDTHS = (18944, 29568, 5120, 1280, 3584, 11008, 13824, 14336, 15360, 8960, *(2**p for p in range(16)))
PADDED = {4304: 4320, 13696: 13824}
SMALL = [n for n in range(1, 330) if is_supported(n)]
BUDGETS = [family.shared_memory_bytes for family in FAMILIES.values()]


def factors_of(how: Plan) -> tuple[int, ...]:
    """All factors, in Kronecker order: the stages were peeled off in front of the rows."""
    rows = () if how.rows is None else (*how.rows.outer_factors, *how.rows.inner_factors)
    return (*(factor for stage in how.stages for factor in stage.factors), *rows)


def transformed(how: Plan, x: np.ndarray) -> np.ndarray:
    """What the kernels do with integer rows (M, n), axis by axis, in integers: rows first, then the stages."""
    count = len(x)
    if how.rows is not None:
        rows = how.rows
        x = x.reshape(-1, rows.outer.order, rows.inner.order)
        x = signs(rows.outer_factors).astype(np.int64) @ x
        levels = 2**rows.levels
        tiles = x.reshape(*x.shape[:2], levels, -1)
        tiles = np.einsum("pq,raqb->rapb", base_matrix(levels).astype(np.int64), tiles)
        x = tiles @ signs(rows.inner_signs).astype(np.int64).T
    for stage in how.stages:
        x = x.reshape(count, stage.groups, stage.order, stage.stride)
        x = signs(stage.factors).astype(np.int64) @ x
    return x.reshape(count, -1)


@pytest.mark.parametrize("shared_bytes", BUDGETS)
@pytest.mark.parametrize("item_size", [2, 4])
@pytest.mark.parametrize("width", [*WIDTHS, *PADDED.values()])
def test_widths_of_models_have_a_plan(width: int, item_size: int, shared_bytes: int) -> None:
    how = plan(width, item_size, shared_bytes)
    assert padded_size(width) == how.width == width
    assert prod(factors_of(how)) == width
    assert [f for f in factors_of(how) if not is_power_of_two(f)] == [
        f for f in hadamard_factors(width) if not is_power_of_two(f)
    ]
    if how.rows is not None:
        assert how.rows.num_stages(item_size, shared_bytes) in (1, 2)
        assert how.rows.elements <= MAX_ELEMENTS
        assert max(how.rows.outer.padded, how.rows.inner.padded) <= MAX_SIDE


def test_padding() -> None:
    assert {width: padded_size(width) for width in PADDED} == PADDED


def test_rows_of_the_main_widths_take_one_program() -> None:
    """On an H100 in 16 bits; 8960 and 29568 go through memory, and so do tiny rows."""
    fused = {width for width in WIDTHS if plan(width).fused}
    assert fused == set(WIDTHS) - {8960, 29568} - {2**p for p in (0, 1, 2, 3, 4, 5, 6, 7, 15)}
    assert set(OUTER) - fused == {4320}


@pytest.mark.parametrize("width", SMALL)
def test_small_plans_are_the_matrix(width: int) -> None:
    """Applied to the identity, in integers: the Kronecker product, whose rows are orthogonal."""
    matrix = transformed(plan(width), np.eye(width, dtype=np.int64)).T
    expected = reduce(np.kron, (base_matrix(order).astype(np.int64) for order in hadamard_factors(width)))
    assert np.array_equal(matrix, expected)
    wide = matrix.astype(np.float64)  # BLAS; exact below 2^53
    assert np.array_equal(wide @ wide.T, width * np.eye(width))


@pytest.mark.parametrize("shared_bytes", BUDGETS)
@pytest.mark.parametrize("width", [*WIDTHS, *PADDED.values()])
def test_large_plans_are_the_matrix(width: int, shared_bytes: int) -> None:
    """On a few integer rows, against the transform of the CPU in float64, which is off by less than a half."""
    x = np.random.default_rng(0).integers(-9, 10, (2, width))
    expected = hadamard_transform(torch.from_numpy(x).double()) * width**0.5
    assert np.array_equal(transformed(plan(width, 2, shared_bytes), x), expected.round().long().numpy())


@given(st.integers(1, 256))
def test_tiles_cover_an_order(order: int) -> None:
    tiles = cover(order)
    sides = [tiles.first] + [tiles.second] * bool(tiles.second)
    assert all(is_power_of_two(side) and side >= MIN_TILE for side in sides)
    assert tiles.first < order or not tiles.second
    one = max(1 << (order - 1).bit_length(), MIN_TILE)
    assert order <= tiles.padded <= one


def test_two_tiles_where_one_would_waste() -> None:
    assert (cover(148), cover(80), cover(112)) == (Tiles(148, 128, 32), Tiles(80, 64, 16), Tiles(112, 128, 0))


@pytest.mark.parametrize("width", OUTER)
def test_the_table_is_no_worse_than_the_rule(width: int) -> None:
    """Twice the rule's multiplications at most: the table may know better, but not by that much."""
    factors = hadamard_factors(width)
    rows = plan(width).rows
    rule = cheapest_outer(factors)
    assert rows is not None and rule is not None
    assert rows.outer.order == OUTER[width]
    assert rows.cost <= 2 * rows_of(width, rule).cost


def rows_of(width: int, outer: int) -> Rows:
    rows = _split(hadamard_factors(width), outer)
    assert rows is not None
    return rows


def test_small_memory_takes_passes() -> None:
    """A row of 18944 in 16 bits takes one program on an H100, and two passes where shared memory is smaller."""
    orders = [[stage.order for stage in plan(18944, 2, budget).stages] for budget in sorted(BUDGETS)]
    assert orders == [[148, 128], [148, 128], []]


def test_unsupported_width() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix can be built for width 4304"):
        plan(4304)
