"""Modality-Specific Static Quantization (MQuant Sec. 3.2): two static scales per LLM linear, visual and text.

The scales themselves are those of the shared ``InputQuantizer`` under ``Strategy.MODALITY``; this file decides who gets
them and measures what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mqbench.harness.quant.calibrate import attach_input_quantizers
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.modality import ModalityContext
from mqbench.harness.quant.scheme import Strategy
from mqbench.harness.quant.session import Session


def attach_msq(session: Session) -> None:
    """Step: input quantizers with one static scale per modality on the LLM's linears, one scale on all others.

    Recipe option ``activations`` overrides the strategy, ``observer`` names how scales follow from what was seen.

    Raises:
        UnknownNameError: an option's value is unknown.
    """
    attach_input_quantizers(session, Strategy.MODALITY)


@dataclass(frozen=True)
class ModalityRange:
    """Largest magnitude of one linear's input over the calibration data, as its quantizer would see it.

    Attributes:
        text: Over text tokens (answers and vision start/end markers included); 0 when there were none.
        visual: Over image placeholders; 0 when there were none.
    """

    text: float
    visual: float

    @property
    def ratio(self) -> float:
        """Visual over text: far from 1, one shared scale wastes most of its levels on one modality."""
        return self.visual / self.text if self.text > 0 else float("inf")


def modality_ranges(session: Session) -> dict[str, ModalityRange]:
    """Measures each LLM linear's input per modality on the calibration batches; call it before and after rotation.

    Inputs are taken after the online transform and without a split-off channel 0. Padded tokens do not count.

    Raises:
        CalibrationError: there are no calibration batches.
    """
    peaks: dict[str, Tensor] = {}
    with _watching(session, peaks):
        session.run_calibration()
    return {name: ModalityRange(*peak.tolist()) for name, peak in peaks.items()}


def text_linears(session: Session) -> list[str]:
    """The linears whose inputs mix both modalities: the LLM's, but for experts of one modality."""
    own = session.layout.modality_of
    return [name for name in session.linears if session.part(name) is Part.TEXT and own(name) is None]


@contextmanager
def _watching(session: Session, peaks: dict[str, Tensor]) -> Iterator[None]:
    def watch(name: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = _peaks(session.linears[name].prepare_input(args[0])[0], session.context)
            peaks[name] = torch.maximum(peaks[name], seen) if name in peaks else seen

        return session.linears[name].register_forward_pre_hook(hook)

    handles = [watch(name) for name in text_linears(session)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _peaks(x: Tensor, context: ModalityContext) -> Tensor:
    """Shapes: (B, T, C) -> (2,) largest magnitude over text and over visual tokens."""
    token_peak = x.detach().abs().amax(-1)
    if context.valid is not None:
        token_peak = token_peak * context.valid
    if context.visual is None:
        return torch.stack([token_peak.max(), token_peak.new_zeros(())])
    return torch.stack([(token_peak * ~context.visual).max(), (token_peak * context.visual).max()])
