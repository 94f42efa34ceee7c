"""Integer Hadamard matrices of the base orders that larger ones are Kronecker products of.

Four constructions, tried in this order:

* Sylvester doubling for powers of two;
* Paley I: order ``q + 1`` for a prime power ``q = 3 (mod 4)``;
* Paley II: order ``2 (q + 1)`` for a prime power ``q = 1 (mod 4)``;
* the Goethals-Seidel array of four circulants for orders that neither reaches. Their first rows come from a search
  (``hadamard_search.py``) and are shipped as data.

Sources: R. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933); J. Goethals and J. Seidel, "A skew Hadamard
matrix of order 36", J. Austral. Math. Soc. 11 (1970).
"""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

IntMatrix = npt.NDArray[np.int8]

MAX_BASE_ORDER = 512
"""Largest dense factor: beyond it the dense product costs more than the zero-padding that avoids it."""

DATA_PATH = Path(__file__).with_name("hadamard_data.safetensors")


@cache
def base_orders() -> tuple[int, ...]:
    """All orders up to `MAX_BASE_ORDER` that `base_matrix` builds, powers of two left out, ascending."""
    multiples_of_four = range(4, MAX_BASE_ORDER + 1, 4)
    return tuple(order for order in multiples_of_four if not is_power_of_two(order) and _has_construction(order))


@cache
def base_matrix(order: int) -> IntMatrix:
    """Build a Hadamard matrix whose first row is all ones.

    Args:
        order: A power of two or one of `base_orders`.

    Returns:
        Read-only matrix of +1 and -1, shape (order, order), with ``H @ H.T == order * I``.

    Raises:
        ValueError: When no construction reaches this order.
    """
    if is_power_of_two(order):
        matrix = _sylvester(order)
    elif _is_paley_one(order):
        matrix = _paley_one(order - 1)
    elif _is_paley_two(order):
        matrix = _paley_two(order // 2 - 1)
    elif str(order) in _searched_rows():
        matrix = goethals_seidel(_searched_rows()[str(order)])
    else:
        raise ValueError(f"no construction for a base Hadamard matrix of order {order}")
    normalized: IntMatrix = matrix * matrix[0]
    normalized.setflags(write=False)
    return normalized


def goethals_seidel(rows: npt.NDArray[np.int8]) -> IntMatrix:
    """Assemble the Goethals-Seidel array.

    Args:
        rows: First rows of four circulants, +1 and -1, shape (4, n), whose periodic autocorrelations sum to zero at
            every non-zero shift.

    Returns:
        Hadamard matrix of order 4 n, not normalized.
    """
    a, *others = (_circulant(row) for row in rows)
    b, c, d = (matrix[:, ::-1] for matrix in others)
    bt, ct, dt = (matrix.T[:, ::-1] for matrix in others)
    return np.block([[a, b, c, d], [-b, a, dt, -ct], [-c, -dt, a, bt], [-d, ct, -bt, a]])


def is_power_of_two(n: int) -> bool:
    """Whether `n` is 1, 2, 4, 8, ..."""
    return n >= 1 and n & (n - 1) == 0


def _has_construction(order: int) -> bool:
    return _is_paley_one(order) or _is_paley_two(order) or str(order) in _searched_rows()


def _is_paley_one(order: int) -> bool:
    return order % 4 == 0 and _prime_power(order - 1) is not None


def _is_paley_two(order: int) -> bool:
    return order % 8 == 4 and _prime_power(order // 2 - 1) is not None


@cache
def _searched_rows() -> dict[str, npt.NDArray[np.int8]]:
    """Order -> first rows of its four circulants, shape (4, order / 4)."""
    rows: dict[str, npt.NDArray[np.int8]] = load_file(DATA_PATH)
    return rows


def _circulant(row: npt.NDArray[np.int8]) -> IntMatrix:
    positions = np.arange(len(row))
    circulant: IntMatrix = row[(positions - positions[:, None]) % len(row)]
    return circulant


def _sylvester(order: int) -> IntMatrix:
    matrix = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _paley_one(q: int) -> IntMatrix:
    """Paley I: I + S, where S borders the skew Jacobsthal matrix of GF(q) with +1 above and -1 on the left."""
    return np.eye(q + 1, dtype=np.int8) + _bordered_jacobsthal(q, left=-1)


def _paley_two(q: int) -> IntMatrix:
    """Paley II: each entry s of the symmetric conference matrix of GF(q) becomes a 2 x 2 block."""
    conference = _bordered_jacobsthal(q, left=1)
    off_diagonal = np.array([[1, 1], [1, -1]], dtype=np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(conference, off_diagonal) + np.kron(np.eye(q + 1, dtype=np.int8), diagonal)


def _bordered_jacobsthal(q: int, left: int) -> IntMatrix:
    bordered = np.zeros((q + 1, q + 1), dtype=np.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = left
    bordered[1:, 1:] = _jacobsthal(q)
    return bordered


def _jacobsthal(q: int) -> IntMatrix:
    """Quadratic character of a_i - a_j over all pairs of elements of GF(q): 1 for a square, -1 for none, 0 for zero."""
    factored = _prime_power(q)
    if factored is None:
        raise ValueError(f"GF({q}) does not exist: {q} is no prime power")
    p, degree = factored
    weights = p ** np.arange(degree)
    powers = np.array(_generator_powers(p, degree)) @ weights
    character = np.zeros(q, dtype=np.int8)
    character[powers[0::2]] = 1
    character[powers[1::2]] = -1
    elements = np.arange(q)[:, None] // weights % p
    differences = (elements[:, None] - elements) % p
    return character[differences @ weights]


def _generator_powers(p: int, degree: int) -> list[tuple[int, ...]]:
    """Powers 1, x, x^2, ... of a generator of GF(p^degree)'s multiplicative group, as coefficients over GF(p).

    Tries reductions ``x^degree = sum_i c_i x^i`` until the powers of x run through all non-zero residues. Each of those
    then has an inverse, so the residue ring is the field, and its squares are the even powers.
    """
    one = (1,) + (0,) * (degree - 1)
    for reduction in product(range(p), repeat=degree):
        powers = [one]
        while len(powers) < p**degree:
            *low, carry = powers[-1]
            following = tuple((a + carry * c) % p for a, c in zip((0, *low), reduction, strict=True))
            if following == one or not any(following):
                break
            powers.append(following)
        if len(powers) == p**degree - 1:
            return powers
    raise ValueError(f"{p} is not a prime, so it has no field of {p}^{degree} elements")


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((divisor for divisor in range(2, int(q**0.5) + 1) if q % divisor == 0), q)
    degree = 0
    while q % p == 0:
        q //= p
        degree += 1
    return (p, degree) if q == 1 else None
