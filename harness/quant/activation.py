"""Activation quantizers: per-tensor static, per-modality static (MSQ) and per-token dynamic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mqbench.harness.errors import CalibrationError, NonFiniteError
from mqbench.harness.quant.modality import RowContext
from mqbench.harness.quant.observers import PERCENTILE, Observer, make_observer
from mqbench.harness.quant.scheme import QuantArgs, Strategy, Tokens


def fake_quantize(x: Tensor, scale: Tensor, args: QuantArgs) -> Tensor:
    """Rounds to the symmetric integer grid and back (Eq. 2), at least in float32; ``scale`` broadcasts to ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = scale.to(wide.dtype)
    return (wide / scale).round_().clamp_(args.quant_min, args.quant_max).mul_(scale).to(x.dtype)


def all_finite(x: Tensor) -> bool:
    """No NaN and no Inf. One sum settles the usual case; only where it overflows is every value looked at."""
    total = x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(x).all())


class InputQuantizer(nn.Module):
    """Quantizes the input of one linear.

    Static strategies pass through these states: ``observing`` (records ranges, output unchanged), then ``freeze``
    (scales computed), then quantizing. Dynamic per-token needs no calibration.

    Args:
        name: The linear's name, for messages.
        args: Symmetric grid; strategy ``tensor``, ``modality`` or ``token`` (dynamic).
        context: Modality and padding of the LLM's rows; None where rows are no LLM tokens (vision tower, projector).
        observer: Name in ``observers.OBSERVERS``.
        percentile: The quantile that observer ``percentile`` takes.
        tokens: Which tokens are rounded. The others pass through as they are, and no shared scale sees them.

    Attributes:
        scale: (1,) per tensor, (2,) per modality as (text, visual); empty before ``freeze`` and when dynamic.
    """

    def __init__(
        self,
        name: str,
        args: QuantArgs,
        context: RowContext | None = None,
        observer: str = "minmax",
        percentile: float = PERCENTILE,
        tokens: Tokens = Tokens.ALL,
    ) -> None:
        super().__init__()
        _check_args(name, args, context, tokens)
        self.name = name
        self.args = args
        self.context = context
        self.tokens = tokens
        self.observing = False
        self.enabled = True
        seen = 0 if args.dynamic else 2 if args.strategy is Strategy.MODALITY else 1
        self.observers: list[Observer] = [make_observer(observer, args, percentile) for _ in range(seen)]
        self.register_buffer("scale", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x)
            return x
        if not self.enabled:
            return x
        rounded = self._rounded_rows(x)
        if rounded is None:
            return fake_quantize(x, self._scale_of(x), self.args)
        return torch.where(rounded, fake_quantize(x, self._scale_of(x), self.args), x)

    @property
    def visual(self) -> Tensor | None:
        """(B, T) mask of visual tokens of the running LLM pass, or None when every row is text."""
        return None if self.context is None else self.context.visual

    def freeze(self) -> None:
        """Turns the observed ranges into scales.

        Raises:
            CalibrationError: nothing was observed.
        """
        self.observing = False
        if self.args.dynamic:
            return
        seen = [observer.scale() for observer in self.observers]
        known = [scale for scale in seen if scale is not None]
        if not known:
            raise CalibrationError(f"'{self.name}' saw no calibration data; give samples that reach this layer")
        # A modality that calibration never showed borrows the other's scale.
        self.scale = torch.stack([known[0] if scale is None else scale for scale in seen])

    def _observe(self, x: Tensor) -> None:
        if self.args.dynamic:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        for observer, mask in zip(self.observers, self._masks(rows), strict=True):
            self._update(observer, rows if mask is None else rows[mask])

    def _rounded_rows(self, x: Tensor) -> Tensor | None:
        """(..., 1) bool: the rows that are rounded; None for all."""
        if self.tokens is Tokens.ALL:
            return None
        visual = x.new_zeros(x.shape[:-1], dtype=torch.bool) if self.visual is None else self.visual
        return (visual if self.tokens is Tokens.VISUAL else ~visual).reshape(*x.shape[:-1], 1)

    def _masks(self, rows: Tensor) -> list[Tensor | None]:
        """The rows that each observer sees, (N,) bool or None for all: never padding."""
        valid = None if self.context is None or self.context.valid is None else self.context.valid.reshape(-1)
        if len(self.observers) == 1 and self.tokens is Tokens.ALL:
            return [valid]
        nothing = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        visual = nothing if self.visual is None else self.visual.reshape(-1)
        keep = ~nothing if valid is None else valid
        if len(self.observers) == 1:
            return [keep & (visual if self.tokens is Tokens.VISUAL else ~visual)]
        return [keep & ~visual, keep & visual]

    def _update(self, observer: Observer, rows: Tensor) -> None:
        if len(rows) == 0:
            return
        if not all_finite(rows):
            raise NonFiniteError(f"the input of '{self.name}' holds NaN or Inf; check the weights and the dtype")
        observer.update(rows)

    def _scale_of(self, x: Tensor) -> Tensor:
        if self.args.dynamic:
            scale = x.abs().amax(-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32)) / self.args.quant_max
            return torch.where(scale > 0, scale, torch.ones_like(scale))
        if len(self.scale) == 1 or self.visual is None:
            return self.scale[0]
        return self.scale[self.visual.long()].reshape(*x.shape[:-1], 1)


def _check_args(name: str, args: QuantArgs, context: RowContext | None, tokens: Tokens) -> None:
    if not args.symmetric:
        raise ValueError(f"activations of '{name}' need a symmetric grid")
    if args.strategy not in (Strategy.TENSOR, Strategy.MODALITY, Strategy.TOKEN):
        raise ValueError(f"activations of '{name}' cannot have one scale per {args.strategy}")
    if args.dynamic is not (args.strategy is Strategy.TOKEN):
        raise ValueError(f"activations of '{name}': per-token scales are dynamic, all others static")
    if (args.strategy is Strategy.MODALITY or tokens is not Tokens.ALL) and context is None:
        raise ValueError(f"'{name}' cannot tell visual rows from text rows without a modality context")
