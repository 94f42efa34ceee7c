"""How a fast Hadamard transform of width n runs on a GPU, as data and a rule; needs no Triton.

A row that fits one program is seen as a matrix X (outer, inner), and ``H_outer X H_inner^T`` is two products on tensor
cores: of the factors of n, leading ones make up H_outer and the others H_inner, whatever makes both cheap. Wider rows
first lose leading factors to passes over memory (`Stage`). Orders that are no power of two are covered by one tile with
zeros or by two tiles: 148 = 128 + 20, in 128 + 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, reduce
from math import prod
from types import MappingProxyType

import numpy as np

from mqbench.kernels.hadamard import hadamard_factors
from mqbench.kernels.hadamard_construct import IntMatrix, base_matrix, is_power_of_two

MIN_TILE = 16
"""Shortest side of a tensor-core product."""

MIN_ORDER = 12
"""Smallest order worth a product of its own inside a program."""

MAX_SIDE = 320
"""Largest padded order inside a program."""

MAX_ELEMENTS = 20480
"""Most padded elements of a row that stay in the registers of one program in float32, twice: before and after."""

OUTER: Mapping[int, int] = MappingProxyType(
    {
        256: 16,
        512: 32,
        1024: 32,
        2048: 64,
        4096: 64,
        8192: 128,
        16384: 128,
        1280: 80,  # 20 * 4
        3584: 112,  # 28 * 4
        4320: 60,  # 4304 padded; inner 36 * 2
        5120: 80,
        8960: 28,  # inner 20 * 16
        11008: 172,
        13824: 144,  # also 13696 padded; 12 * 12, inner 12 * 8
        14336: 112,
        15360: 240,  # 20 * 12
        18944: 148,
    }
)
"""Order of H_outer by width, for the widths of the models and powers of two; `cheapest_outer` finds others.

Wider ones, such as 29568 = 44 * 672, lose leading factors to passes first.
"""


@dataclass(frozen=True)
class Tiles:
    """One or two powers of two that cover an order; ``second`` is 0 where one does."""

    order: int
    first: int
    second: int

    @property
    def padded(self) -> int:
        return self.first + self.second


@dataclass(frozen=True)
class Rows:
    """A transform of rows of ``outer.order * inner.order`` in one program each."""

    outer: Tiles
    inner: Tiles
    outer_factors: tuple[int, ...]
    inner_factors: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.outer.order * self.inner.order

    @property
    def inner_first(self) -> bool:
        """The larger product comes first: its inputs need one 16-bit term, the sums that the second one reads two."""
        return self.inner.padded > self.outer.padded

    @property
    def cost(self) -> float:
        """Multiplications per element."""
        small, large = sorted((self.outer.padded, self.inner.padded))
        return small * large / self.width * (large + 2 * small)

    @property
    def num_warps(self) -> int:
        return 8 if self.outer.padded * self.inner.padded > 4096 else 4


@dataclass(frozen=True)
class Stage:
    """A pass over memory: H_order over an axis of a row seen as (groups, order, stride)."""

    factors: tuple[int, ...]
    groups: int
    stride: int

    @property
    def order(self) -> int:
        return prod(self.factors)


@dataclass(frozen=True)
class Plan:
    """``rows`` over the last part of the row, if any, then ``stages``; they commute."""

    width: int
    rows: Rows | None
    stages: tuple[Stage, ...]

    @property
    def fused(self) -> bool:
        """Whether one program holds a row, so that quantization costs no memory traffic of its own."""
        return self.rows is not None and not self.stages


@cache
def plan(n: int) -> Plan:
    """The plan for a width.

    Raises:
        ValueError: no Hadamard matrix of order n can be built.
    """
    rest, stages, groups = hadamard_factors(n), [], 1
    while rest:
        rows = _rows(rest)
        if rows is not None:
            return Plan(n, rows, tuple(stages))
        factors, rest = _peel(rest)
        stages.append(Stage(factors, groups, prod(rest)))
        groups *= prod(factors)
    return Plan(n, None, tuple(stages))


def cover(order: int) -> Tiles:
    """The fewest padded elements with one tile, or with two."""
    whole = max(1 << (order - 1).bit_length(), MIN_TILE)
    half = whole // 2
    rest = max(1 << max(order - half - 1, 0).bit_length(), MIN_TILE)
    return Tiles(order, half, rest) if half >= MIN_TILE and half + rest < whole else Tiles(order, whole, 0)


def signs(factors: tuple[int, ...]) -> IntMatrix:
    """Kronecker product of the base matrices, +1 and -1."""
    return reduce(np.kron, (base_matrix(order) for order in factors), np.ones((1, 1), np.int8))


def cheapest_outer(factors: tuple[int, ...]) -> int | None:
    """Order of H_outer with the fewest multiplications for this factorization, or None where no split fits."""
    options = [rows for outer in _prefixes(factors) if (rows := _split(factors, outer)) is not None]
    return min(options, key=lambda rows: (rows.cost, -rows.outer.order)).outer.order if options else None


def _rows(factors: tuple[int, ...]) -> Rows | None:
    outer = OUTER.get(prod(factors)) or cheapest_outer(factors)
    return None if outer is None else _split(factors, outer)


def _prefixes(factors: tuple[int, ...]) -> list[int]:
    """Products of leading factors, the last of which may be part of the power of two at the end."""
    *dense, power = factors
    products = [prod(dense[:count]) for count in range(1, len(dense) + 1)]
    halves = [prod(dense) << shift for shift in range(1, power.bit_length() - 1)]
    return products + halves


def _split(factors: tuple[int, ...], outer: int) -> Rows | None:
    """The two sides, or None where they are too small or too large for one program."""
    inner = prod(factors) // outer
    sides = cover(outer), cover(inner)
    too_large = max(side.padded for side in sides) > MAX_SIDE or sides[0].padded * sides[1].padded > MAX_ELEMENTS
    if too_large or min(outer, inner) < MIN_ORDER:
        return None
    before: list[int] = []
    rest = list(factors)
    while prod(before) < outer:
        need = outer // prod(before)
        order = rest.pop(0)
        if is_power_of_two(order) and order > need:
            rest.insert(0, order // need)
            order = need
        before.append(order)
    return Rows(*sides, tuple(before), tuple(rest))


def _peel(factors: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading factors of one pass, and what is left: a dense order, or 16 of a power of two too large for a row."""
    order, *rest = factors
    if rest:
        small = len(rest) == 1 and rest[0] < MIN_TILE  # not worth a pass of its own
        return (factors, ()) if small else ((order,), tuple(rest))
    return ((order,), ()) if order <= 8 * MIN_TILE else ((MIN_TILE,), (order // MIN_TILE,))
