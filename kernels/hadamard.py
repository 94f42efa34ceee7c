"""Orthonormal Hadamard transforms of any width that a Kronecker product of known Hadamard matrices reaches.

``H_n = (H_k1 (x) H_k2 (x) ... (x) H_2^p) / sqrt(n)`` is in general **not symmetric**. Every H_n here has a first row of
ones / sqrt(n), so that output 0 of the transform is ``sum(x) / sqrt(n)``, which is what MQuant's rotation magnitude
suppression (Eq. 8 and 9) relies on. A linear layer ``y = W x`` keeps its output when its input and the rows of its
weight both go through `hadamard_transform`, since ``(W H^T) (H x) = W x``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, reduce
from itertools import count
from math import log2, prod

import numpy as np
import torch
from torch import Tensor

from mqbench.kernels.hadamard_construct import IntMatrix, base_matrix, base_orders, is_power_of_two

PADDING_MAX_ORDER = 128
"""Largest dense factor of a width that padding may choose; a width that needs no padding may have larger ones."""

# Dense Sylvester blocks of up to 64 are 4-6x faster than a butterfly of one pass per doubling (CPU, widths 256-8192).
_MAX_RADIX = 64
# A smaller power of two is merged into the last dense factor: its own pass over memory costs more than the products.
_MIN_RADIX = 16
_FAST_BACKEND_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_FAST_BACKEND_MAX_WIDTH = 32768


def hadamard_transform(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Apply the orthonormal Hadamard matrix of order ``n = x.shape[-1]`` to the last dimension.

    float16 and bfloat16 inputs are computed in float32 and rounded once, at the end. The work per element is the sum of
    the factors of n, not n. On CUDA, float32 products obey ``torch.backends.cuda.matmul.allow_tf32``.

    For powers of two on CUDA, the `fast_hadamard_transform` package is used when it can be imported; its PyPI archive
    lacks its CUDA sources, so install it from its git repository (Dao-AILab on GitHub).

    Args:
        x: Floating-point tensor, shape (..., n). Leading dimensions may be empty.
        inverse: Apply ``H_n^T`` (the inverse) instead of ``H_n``.

    Returns:
        ``x @ H_n.T``, or ``x @ H_n`` for the inverse; shape, dtype and device of `x`.

    Raises:
        TypeError: When `x` is not a real floating-point tensor.
        ValueError: When `x` is a scalar, or no Hadamard matrix of order n can be built (see `padded_size`).
    """
    if not x.is_floating_point():
        raise TypeError(f"hadamard_transform needs a real floating-point tensor, got {x.dtype}; convert it first")
    if x.dim() == 0:
        raise ValueError("hadamard_transform needs at least one dimension, got a scalar; reshape it to (1,)")
    n = x.shape[-1]
    stages = _stages(n)
    if fast := _fast_backend(n, x.dtype, x.device.type):
        return fast(x, n**-0.5)
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute_dtype)
    stride = n
    for stage in stages:
        stride //= prod(stage)
        matrix = _stage_matrix(stage, inverse, compute_dtype, x.device)
        y = _apply_stage(y, matrix, x.numel() // (len(matrix) * stride), stride)
    y = y.mul_(n**-0.5)  # one scaling, last: the sums before it are exact for integers that fit
    return y.reshape(x.shape).to(x.dtype)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """Build the dense orthonormal matrix that `hadamard_transform` applies.

    Its integer factors are cached; the product is not, so the caller owns the tensor.

    Args:
        n: Order.
        dtype: Floating-point dtype of the result.
        device: Device of the result, the CPU by default.

    Returns:
        ``H_n``, shape (n, n), with ``H_n @ H_n.T = I`` and first row ``1 / sqrt(n)``.

    Raises:
        ValueError: When no Hadamard matrix of order n can be built (see `padded_size`).
    """
    signs = _kronecker(hadamard_factors(n))
    return torch.tensor(signs, dtype=dtype, device=device or "cpu") * n**-0.5


def hadamard_factors(n: int) -> tuple[int, ...]:
    """Factorization used for order n: dense orders, largest first, then one power of two (which may be 1).

    18944 is (148, 128), 29568 is (44, 28, 12, 2), 4096 is (4096,). Among all factorizations it is the one with the
    fewest additions per element, ``sum(dense orders) + log2(power of two)``.

    Raises:
        ValueError: When no Hadamard matrix of order n can be built (see `padded_size`).
    """
    factors = _factorize(n)
    if factors is None:
        advice = f"zero-pad it to padded_size({n}) = {padded_size(n)}" if n >= 1 else "it must be at least 1"
        raise ValueError(f"no Hadamard matrix can be built for width {n}; {advice}")
    return factors


def is_supported(n: int) -> bool:
    """Whether `hadamard_transform` takes width n without padding."""
    return _factorize(n) is not None


def padded_size(n: int) -> int:
    """Width to zero-pad to: n itself when supported, else the next larger width that is cheap.

    The padded width is the smallest one with no dense factor above `PADDING_MAX_ORDER`, because a slightly smaller
    width with large factors would cost more than the added zeros: 4304 -> 4320 and 13696 -> 13824.

    Raises:
        ValueError: When n < 1.
    """
    if n < 1:
        raise ValueError(f"width must be at least 1, got {n}")
    if is_supported(n):
        return n
    return next(m for m in count(n + 1) if _factorize(m, PADDING_MAX_ORDER) is not None)


@lru_cache(maxsize=65536)
def _factorize(n: int, max_order: int | None = None) -> tuple[int, ...] | None:
    """Cheapest factorization with dense orders in descending order and at most `max_order`, or None."""
    options: list[tuple[int, ...]] = [(n,)] if is_power_of_two(n) else []
    for order in base_orders():
        if n < order or n % order or (max_order is not None and order > max_order):
            continue
        rest = _factorize(n // order, order)
        if rest is not None:
            options.append((order, *rest))
    return min(options, key=_cost, default=None)


def _cost(factors: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    *dense, power = factors
    return sum(dense) + log2(power), factors


@cache
def _stages(n: int) -> tuple[tuple[int, ...], ...]:
    """Base orders of each dense product that the transform applies, in Kronecker order."""
    *dense, power = hadamard_factors(n)
    if power < _MIN_RADIX and dense:
        return (*((order,) for order in dense[:-1]), (dense[-1], power))
    return (*((order,) for order in dense), *((radix,) for radix in _radices(power)))


def _radices(power: int) -> list[int]:
    """Split a power of two into balanced powers of two of at most `_MAX_RADIX`, ascending."""
    exponent = power.bit_length() - 1
    parts = -(-exponent // (_MAX_RADIX.bit_length() - 1)) or 1
    return [2 ** ((exponent + i) // parts) for i in range(parts)]


def _kronecker(orders: tuple[int, ...]) -> IntMatrix:
    return reduce(np.kron, (base_matrix(order) for order in orders))


@lru_cache(maxsize=256)
def _stage_matrix(orders: tuple[int, ...], inverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    signs = _kronecker(orders)
    # A cached tensor must stay usable in autograd when the first call happens to run in inference mode.
    with torch.inference_mode(False):
        return torch.tensor(signs.T if inverse else signs, dtype=dtype, device=device)


def _apply_stage(y: Tensor, matrix: Tensor, blocks: int, stride: int) -> Tensor:
    """Multiply the middle axis of y, seen as (blocks, order, stride), by `matrix`, shape (order, order)."""
    order = len(matrix)
    if stride == 1:
        return y.reshape(blocks, order) @ matrix.T
    return matrix @ y.reshape(blocks, order, stride)


@cache
def _imported_backend() -> Callable[[Tensor, float], Tensor] | None:
    try:
        from fast_hadamard_transform import hadamard_transform as fast_transform
    except ImportError:
        return None
    return fast_transform


def _fast_backend(n: int, dtype: torch.dtype, device_type: str) -> Callable[[Tensor, float], Tensor] | None:
    """`fast_hadamard_transform`'s kernel when it covers this input; it too is in Sylvester's order, so symmetric."""
    covered = is_power_of_two(n) and n <= _FAST_BACKEND_MAX_WIDTH and dtype in _FAST_BACKEND_DTYPES
    return _imported_backend() if device_type == "cuda" and covered else None
