"""What is timed: a call, its inputs, the work it cannot avoid, and the check that it must pass first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 25
"""Results are compared in blocks of rows of about this many elements: float64 truth of a whole one may not fit."""

SAME_DTYPE_FACTOR = 2.0
"""A result may be this many times as far from the truth as the truth rounded to the result's dtype."""

FLOAT_LIMIT = 1e-2
"""Relative error (2-norm) of results whose sums run in bfloat16 or in another order."""

LEVELS_LIMIT = 1e-2
"""Share of levels that may differ, by one: a rounding of the bfloat16 value before them fell the other way."""


class Unavailable(Exception):
    """This machine, shape or installation has no such contender; the message says why."""


class WrongResult(Exception):
    """A contender did not pass its check, so that nobody times it."""


@dataclass(frozen=True)
class Check:
    """How far a result is from the truth, and how far it may be."""

    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class Contender:
    """A call that can be timed.

    Attributes:
        run: What is timed.
        inputs: Its arguments, tensors or modules; copies of them stand in other memory.
        check: Judges a result.
        bytes: What has to be read and written at least.
        ops: Arithmetic operations, a multiplication and an addition being two.
    """

    run: Callable[..., Any]
    inputs: tuple[Any, ...]
    check: Callable[[Any], Check]
    bytes: int
    ops: int = 0


Makers = Mapping[str, Callable[[], Contender]]
"""Contenders by name, made when their turn comes; the first is what the others are compared with."""

Truth = Callable[[slice], Tensor]
"""Some rows of the right result, in float64 or float32."""


def check_rounded(result: Tensor, truth: Truth) -> Check:
    """Element by element: at most ``SAME_DTYPE_FACTOR`` times as far off as the rounded truth.

    Errors are relative to the element's size, or to a sixteenth of the root mean square where that is larger: there,
    the truth is a small difference of large terms.
    """
    error = own = 0.0
    for rows in blocks_of(result):
        right = truth(rows).double()
        scale = right.abs().clamp_min(right.square().mean().sqrt() / 16).clamp_min(torch.finfo(torch.float64).tiny)
        error = _larger(error, ((result[rows].double() - right).abs() / scale).max().item())
        own = max(own, ((right.to(result.dtype).double() - right).abs() / scale).max().item())
    return Check(error, SAME_DTYPE_FACTOR * own)


def check_norm(result: Tensor, truth: Truth, limit: float = FLOAT_LIMIT) -> Check:
    """Relative error in the 2-norm."""
    wrong = size = 0.0
    for rows in blocks_of(result):
        right = truth(rows).double()
        wrong += (result[rows].double() - right).square().sum().item()
        size += right.square().sum().item()
    return Check((wrong / size) ** 0.5, limit)


def check_levels(result: Tensor, expected: Tensor) -> Check:
    """Share of levels that differ; more than one level apart is infinitely wrong."""
    differing, largest = 0, 0
    for rows in blocks_of(result):
        apart = (result[rows].int() - expected[rows].int()).abs()
        differing += int(apart.count_nonzero().item())
        largest = max(largest, int(apart.max().item()))
    return Check(differing / result.numel() if largest <= 1 else float("inf"), LEVELS_LIMIT)


def check_equal(result: Tensor, expected: Tensor) -> Check:
    """Bit for bit."""
    return Check(0.0 if torch.equal(result, expected) else 1.0, 0.0)


def blocks_of(x: Tensor) -> Iterable[slice]:
    """Slices along the first dimension."""
    step = max(1, BLOCK_ELEMENTS // max(x[0].numel(), 1))
    return (slice(start, start + step) for start in range(0, len(x), step))


def need_cuda(device: torch.device) -> None:
    """Raises ``Unavailable`` on other devices."""
    if device.type != "cuda":
        raise Unavailable("needs a GPU")


def _larger(one: float, other: float) -> float:
    """``max`` that keeps a NaN."""
    return other if not other <= one else one
