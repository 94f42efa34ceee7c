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

from mqbench.kernels.gemm_configs import FAMILIES
from mqbench.kernels.hadamard import hadamard_factors
from mqbench.kernels.hadamard_construct import IntMatrix, base_matrix, is_power_of_two

MIN_TILE = 16
"""Shortest side of a tensor-core product."""

MIN_ORDER = 12
"""Smallest order worth a product of its own inside a program."""

MAX_LEVELS = 2
"""Doublings done by additions: each halves the inner product, and the tiles."""

MAX_SIDE = 256
"""Largest padded order inside a program: its signs alone take 128 KiB of shared memory."""

MAX_ELEMENTS = 20480
"""Most padded elements of a row that stay in the registers of one program in float32, twice: before and after."""

WARP_ELEMENTS, GROUP_ELEMENTS = 1280, 5120
"""Most padded elements of a row for one warp, and for four; longer rows take eight."""

SHARED_BYTES = FAMILIES[90].shared_memory_bytes
"""Shared memory of a program on an H100; plans for other devices say theirs."""

SHARED_MARGIN = 2048
"""Bytes for reductions and for padding between buffers."""

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
        11008: 172,
        13824: 144,  # also 13696 padded; 12 * 12, inner 12 * 8
        14336: 112,
        15360: 240,  # 20 * 12
        18944: 148,
    }
)
"""Order of H_outer by width, for the widths of the models and powers of two; `cheapest_outer` finds others.

Others lose leading factors to passes first: 8960 = 28 * 320 and 29568 = 44 * 672.
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
    def levels(self) -> int:
        """Doublings of an inner power of two that are additions; the product that is left has `inner_side`.

        None where H_outer takes two tiles: there the smaller products cost more instructions than they save.
        """
        power = len(self.inner_factors) == 1 and is_power_of_two(self.inner.order) and not self.outer.second
        return min((self.inner.order // MIN_TILE).bit_length() - 1, MAX_LEVELS) if power else 0

    @property
    def inner_side(self) -> int:
        """Padded order of the inner product."""
        return self.inner.padded >> self.levels

    @property
    def inner_signs(self) -> tuple[int, ...]:
        """Factors of the inner product."""
        return (self.inner.order >> self.levels,) if self.levels else self.inner_factors

    @property
    def inner_first(self) -> bool:
        """The larger product comes first: its inputs need one 16-bit term, the sums that the second one reads two."""
        return self.levels == 0 and self.inner_side > self.outer.padded

    @property
    def cost(self) -> float:
        """Multiplications per element."""
        terms = (2, 1) if self.inner_first else (1, 2)
        waste = self.outer.padded * self.inner.padded / self.width
        return waste * (terms[0] * self.outer.padded + terms[1] * self.inner_side)

    @property
    def elements(self) -> int:
        """Padded elements of a row."""
        return self.outer.padded * self.inner.padded

    @property
    def num_warps(self) -> int:
        return 1 if self.elements <= WARP_ELEMENTS else 4 if self.elements <= GROUP_ELEMENTS else 8

    def shared_bytes(self, item_size: int, num_stages: int) -> float:
        """Shared memory that no compiled program exceeds: both signs, a 16-bit operand, and scratch per element.

        Args:
            item_size: Bytes of an input.
            num_stages: 2 where the next row is loaded while this one is computed.
        """
        operands = self.outer.padded**2 + self.inner_side**2 + self.elements
        if self.outer.second or self.inner.second:
            scratch = 4.0 if num_stages == 1 else 2.25 * item_size
        else:
            scratch = item_size - 2.0 if num_stages == 1 else item_size + 0.5
        return 2 * operands + scratch * self.elements + SHARED_MARGIN

    def num_stages(self, item_size: int, shared_bytes: int = SHARED_BYTES) -> int:
        """1, 2, or 0 where not even one row fits into ``shared_bytes``."""
        return max(stages for stages in (0, 1, 2) if not stages or self.shared_bytes(item_size, stages) <= shared_bytes)


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
def plan(n: int, item_size: int = 2, shared_bytes: int = SHARED_BYTES) -> Plan:
    """The plan for a width.

    Args:
        n: Width, padded already.
        item_size: Bytes of an input.
        shared_bytes: Shared memory that a program may take on the device.

    Raises:
        ValueError: no Hadamard matrix of order n can be built.
    """
    stages: list[Stage] = []
    rest, groups = hadamard_factors(n), 1
    while rest:
        rows = _rows(rest)
        if rows is not None and rows.num_stages(item_size, shared_bytes):
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
    best = min(options, key=lambda rows: (rows.cost, -rows.outer.order), default=None)
    return None if best is None else best.outer.order


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
