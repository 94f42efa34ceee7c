"""A runtime from a calibrated quantized model: accuracy and latency are measured on the same object."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mqbench.harness.errors import RequestError
from mqbench.harness.quant.modality import ModalityContext, track_modality
from mqbench.harness.runtime.engine import FusedRuntime
from mqbench.harness.runtime.family import family_of
from mqbench.harness.runtime.fuse import FusedModel, fuse
from mqbench.harness.runtime.interface import Runtime
from mqbench.harness.runtime.plain import TransformersRuntime
from mqbench.harness.runtime.quantized import QuantizedSource, check_system, contexts, system_of
from mqbench.harness.runtime.rows import Rows
from mqbench.harness.runtime.systems import System

if TYPE_CHECKING:
    from mqbench.harness.models.adapter import LoadedModel


def runtime_of(loaded: LoadedModel, system: System | None = None) -> Runtime:
    """Turns a quantized model, in place, into a runtime; its integer weights are taken over.

    ``loaded.model`` stays the Transformers model: adapters' ``generate`` works on ``loaded`` as before, through the
    runtime's blocks. Its linears are no ``QuantLinear`` afterwards, so it can be neither saved nor quantized again.

    Args:
        loaded: As an adapter loads it and a method quantizes it. A float model is one of float systems.
        system: How to run it; its bits and activations must be the model's. None: fused, as the model was quantized,
            with AIFS when it has scales per modality.

    Raises:
        UnknownNameError: the runtime does not know the model's family.
        RequestError: a layer cannot run in integers, is not what the system says, or the system cannot run here.
        LayoutError: the architecture has something that the runtime does not cover.
    """
    model, layout = loaded.model, loaded.layout
    device = next(model.parameters()).device
    family = family_of(model.config)
    system = system_of(model, layout) if system is None else system
    reason = system.runs_on(device)
    if reason is not None:
        raise RequestError(f"system '{system.name}' cannot run on {device}: {reason}")
    if system.transformers:
        check_system(model, layout, system)
        return TransformersRuntime(model, layout, family, system, device)
    rows, known = Rows(), contexts(model)
    context = known[0] if known else ModalityContext()
    source = QuantizedSource(model, layout, system, rows)
    if not known:
        track_modality(model, layout, context)
    fused = FusedModel(model, layout, family, rows, context)
    with torch.no_grad():
        fuse(fused, system, source)
    return FusedRuntime(fused, system, device)
