"""Observers: what a calibration pass remembers of an activation, and the scale that follows from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.scheme import QuantArgs

NUM_BINS = 16384
PERCENTILE = 0.99999
SMALLEST_EXPONENT = -64
SHRINK_STEPS = 80
SHRINK_GRID = 100


class Observer(ABC):
    """Sees rows of one activation and yields one symmetric scale. The state's size does not grow with the data."""

    def __init__(self, args: QuantArgs) -> None:
        self.args = args

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Takes in rows of shape (N, C)."""

    @abstractmethod
    def scale(self) -> Tensor | None:
        """A 0-d scale in float32 or wider, or None when nothing was observed. All-zero data gives 1."""


class MinMaxObserver(Observer):
    """s = max|x| / quant_max (Eq. 2)."""

    def __init__(self, args: QuantArgs) -> None:
        super().__init__(args)
        self.peak: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        if rows.numel() == 0:
            return
        low, high = torch.aminmax(rows.detach())
        peak = _widen(torch.maximum(-low, high))
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)

    def scale(self) -> Tensor | None:
        return None if self.peak is None else _positive(self.peak / self.args.quant_max)


class HistogramObserver(Observer):
    """Keeps the counts of |x| in ``NUM_BINS`` equal bins over [0, 2^k).

    The upper edge is a power of two and grows by merging neighbours, so the counts do not depend on the order of the
    batches.
    """

    def __init__(self, args: QuantArgs) -> None:
        super().__init__(args)
        self.counts: Tensor | None = None
        self.exponent = 0
        self.peak = 0.0

    def update(self, rows: Tensor) -> None:
        if rows.numel() == 0:
            return
        magnitude = _widen(rows.detach()).abs().flatten()
        peak = magnitude.max().item()
        self.peak = max(self.peak, peak)
        self._grow(math.frexp(peak)[1] if peak > 0 else None, magnitude.device)
        assert self.counts is not None
        index = (magnitude * (NUM_BINS / 2.0**self.exponent)).long().clamp_(max=NUM_BINS - 1)
        self.counts += torch.bincount(index, minlength=NUM_BINS)

    def scale(self) -> Tensor | None:
        if self.counts is None:
            return None
        limit = self.limit() if self.peak > 0 else 0.0
        return _positive(torch.tensor(limit / self.args.quant_max, device=self.counts.device))

    @abstractmethod
    def limit(self) -> float:
        """The magnitude that the largest level stands for."""

    def _grow(self, exponent: int | None, device: torch.device) -> None:
        """Makes room for magnitudes below 2^exponent."""
        if self.counts is None:
            self.counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=device)
            self.exponent = SMALLEST_EXPONENT
        if exponent is None or exponent <= self.exponent:
            return
        doublings = min(exponent - self.exponent, NUM_BINS.bit_length() - 1)
        merged = self.counts.view(-1, 2**doublings).sum(1)
        self.counts = torch.cat([merged, merged.new_zeros(NUM_BINS - len(merged))])
        self.exponent = exponent

    @property
    def centres(self) -> Tensor:
        """(NUM_BINS,) middle of each bin."""
        assert self.counts is not None
        steps = torch.arange(NUM_BINS, dtype=torch.float64, device=self.counts.device)
        return (steps + 0.5) * (2.0**self.exponent / NUM_BINS)


class PercentileObserver(HistogramObserver):
    """s = (quantile of |x|) / quant_max, to the width of one histogram bin.

    Attributes:
        percentile: The quantile as a share, 0.99999 unless set.
    """

    percentile = PERCENTILE

    def limit(self) -> float:
        assert self.counts is not None
        reached = self.counts.cumsum(0)
        rank = self.percentile * reached[-1].item()
        index = int((reached < rank).sum().item())
        before = reached[index - 1].item() if index > 0 else 0
        inside = (rank - before) / self.counts[index].item()
        return min(self.peak, (index + inside) * 2.0**self.exponent / NUM_BINS)


class MSEObserver(HistogramObserver):
    """The scale, among max|x| shrunk by 0 to 79 %, with the least squared rounding error over the histogram."""

    def limit(self) -> float:
        assert self.counts is not None
        used = self.counts.nonzero().squeeze(1)
        centres, counts = self.centres[used], self.counts[used].double()
        errors = []
        for step in range(SHRINK_STEPS):
            scale = self.peak * (1 - step / SHRINK_GRID) / self.args.quant_max
            level = (centres / scale).round_().clamp_(max=self.args.quant_max)
            errors.append((level.mul_(scale).sub_(centres).square_() @ counts).item())
        best = min(range(SHRINK_STEPS), key=errors.__getitem__)
        return self.peak * (1 - best / SHRINK_GRID)


OBSERVERS: Mapping[str, type[Observer]] = MappingProxyType(
    {"minmax": MinMaxObserver, "percentile": PercentileObserver, "mse": MSEObserver}
)


def make_observer(name: str, args: QuantArgs, percentile: float = PERCENTILE) -> Observer:
    """Makes a fresh observer; only ``percentile`` uses ``percentile``.

    Raises:
        UnknownNameError: ``name`` is no observer.
    """
    if name not in OBSERVERS:
        raise UnknownNameError("observer", name, OBSERVERS)
    observer = OBSERVERS[name](args)
    if isinstance(observer, PercentileObserver):
        observer.percentile = percentile
    return observer


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
