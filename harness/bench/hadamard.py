"""Hadamard transforms against a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.harness.bench.contender import (
    Check,
    Contender,
    Makers,
    Unavailable,
    check_equal,
    check_levels,
    check_norm,
    check_rounded,
    need_cuda,
)
from mqbench.harness.bench.spec import SEED, Case
from mqbench.kernels import api, cpu
from mqbench.kernels.hadamard import hadamard_transform, is_supported, padded_size

DTYPE = torch.bfloat16
FAST_ORDERS = (40, 28, 20, 12)
"""Dense orders of fast-hadamard-transform, beside powers of two."""

STATIC_SCALE = 4 / 127
"""Four standard deviations of the random input, which the transform keeps."""


def hadamard(case: Case, device: torch.device) -> Makers:
    """The copy moves as many bytes as the plain transform, which is what the others are compared with."""
    rows, width = case.rows, case.shape["k"]
    x = torch.randn(rows, width, generator=torch.Generator(device).manual_seed(SEED), device=device).to(DTYPE)
    padded = padded_size(width)
    scale = torch.full((1,), STATIC_SCALE, device=device)
    read, written = x.numel() * DTYPE.itemsize, rows * padded

    def truth(rows: slice) -> Tensor:
        return hadamard_transform(F.pad(x[rows].double(), (0, padded - width)))

    def copy() -> Contender:
        size = (read + written * DTYPE.itemsize) // 2
        source = torch.randint(-128, 128, (size,), device=device, dtype=torch.int8)
        return Contender(torch.clone, (source,), partial(check_equal, expected=source), 2 * size)

    def ours() -> Contender:
        check = partial(check_rounded, truth=truth)
        return Contender(api.hadamard, (x,), check, read + written * DTYPE.itemsize)

    def quantized(scale: Tensor | None) -> Contender:
        expected = cpu.hadamard_quantize(x, scale, None, False, 8)[0]
        check = partial(_check_first, expected=expected)
        return Contender(api.hadamard_quantize, (x, scale), check, read + written + 4 * rows * (scale is None))

    def stages() -> Contender:
        if not is_supported(width):
            raise Unavailable("pads")
        return Contender(hadamard_transform, (x,), partial(check_norm, truth=truth), 2 * read)

    return {
        "memcpy": copy,
        "hadamard": ours,
        "hadamard_static": partial(quantized, scale),
        "hadamard_token": partial(quantized, None),
        "torch_hadamard": stages,
        "fast_hadamard": partial(_fast, x, truth),
    }


def _check_first(result: tuple[Tensor, ...], expected: Tensor) -> Check:
    return check_levels(result[0], expected)


def _fast(x: Tensor, truth: Callable[[slice], Tensor]) -> Contender:
    """fast-hadamard-transform where the width is one of its own. Its dense matrices are others than ours."""
    need_cuda(x.device)
    try:
        import fast_hadamard_transform as package
    except ImportError as error:
        raise Unavailable("not installed") from error
    width = x.shape[1]
    order = next((order for order in (1, *FAST_ORDERS) if width % order == 0 and _is_power(width // order)), None)
    if order is None:
        raise Unavailable(f"has no transform of width {width}")
    transform: Any = getattr(package, "hadamard_transform" if order == 1 else f"hadamard_transform_{order}N")
    check = partial(check_norm, truth=truth) if order == 1 else partial(_check_lengths, x=x)
    return Contender(lambda x: transform(x, width**-0.5), (x,), check, 2 * x.numel() * DTYPE.itemsize)


def _check_lengths(y: Tensor, x: Tensor) -> Check:
    """An orthonormal transform keeps the length of every row."""
    return check_norm(y.float().norm(dim=1, keepdim=True), lambda rows: x[rows].double().norm(dim=1, keepdim=True))


def _is_power(n: int) -> bool:
    return n & (n - 1) == 0
