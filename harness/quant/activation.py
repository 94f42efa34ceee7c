"""Activation quantizers: per-tensor static, per-modality static (MSQ) and per-token dynamic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mqbench.harness.errors import CalibrationError, NonFiniteError
from mqbench.harness.quant.modality import ModalityContext
from mqbench.harness.quant.observers import Observer, make_observer
from mqbench.harness.quant.scheme import QuantArgs, Strategy


def fake_quantize(x: Tensor, scale: Tensor, args: QuantArgs, zero_point: Tensor | None = None) -> Tensor:
    """Rounds to the integer grid and back (Eq. 2). ``scale`` and ``zero_point`` broadcast against ``x``."""
    offset = 0 if zero_point is None else zero_point
    level = torch.clamp(torch.round(x / scale) + offset, args.quant_min, args.quant_max)
    return (level - offset) * scale


class InputQuantizer(nn.Module):
    """Quantizes the input of one linear.

    Static strategies pass through these states: ``observing`` (records ranges, output unchanged), then ``freeze``
    (scales computed), then quantizing. Dynamic per-token needs no calibration.

    Attributes:
        scale: (1,) per tensor, (2,) per modality as (text, visual); empty before ``freeze`` and when dynamic.
    """

    def __init__(self, name: str, args: QuantArgs, context: ModalityContext, observer: str = "minmax") -> None:
        super().__init__()
        self.name = name
        self.args = args
        self.context = context
        self.observing = False
        self.enabled = True
        groups = 2 if args.strategy is Strategy.MODALITY else 1
        self.observers: list[Observer] = [] if args.dynamic else [make_observer(observer, args) for _ in range(groups)]
        self.register_buffer("scale", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self._observe(x)
            return x
        if not self.enabled:
            return x
        return fake_quantize(x, self._scale_of(x), self.args)

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
        if not torch.isfinite(x).all():
            raise NonFiniteError(f"the input of '{self.name}' holds NaN or Inf; check the weights and the dtype")
        rows = x.detach().reshape(-1, x.shape[-1])
        valid = _rows(self.context.valid, rows)
        if len(self.observers) == 1:
            self.observers[0].update(rows if valid is None else rows[valid])
            return
        visual = _rows(self.context.visual, rows)
        visual = torch.zeros(len(rows), dtype=torch.bool, device=rows.device) if visual is None else visual
        keep = torch.ones_like(visual) if valid is None else valid
        for observer, mask in zip(self.observers, (keep & ~visual, keep & visual), strict=True):
            if mask.any():
                observer.update(rows[mask])

    def _scale_of(self, x: Tensor) -> Tensor:
        if self.args.dynamic:
            return (x.abs().amax(-1, keepdim=True) / self.args.quant_max).clamp_min(torch.finfo(x.dtype).tiny)
        scale = self.scale.to(x.dtype)
        visual = self.context.visual
        if len(scale) == 1:
            return scale[0]
        if visual is None:
            return scale[0]
        return scale[visual.long()].unsqueeze(-1).reshape(*x.shape[:-1], 1)


def _rows(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """The (B, T) mask flattened, when it describes these rows (vision-tower inputs have other lengths)."""
    if mask is None or mask.numel() != len(rows):
        return None
    return mask.reshape(-1)
