"""A runtime straight from a config, with random values: times and memory do not depend on what the weights are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.errors import RequestError
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.modality import ModalityContext, track_modality
from mqbench.harness.runtime.engine import FusedRuntime
from mqbench.harness.runtime.family import family_of
from mqbench.harness.runtime.fuse import FusedModel, fuse, put
from mqbench.harness.runtime.graph import with_index
from mqbench.harness.runtime.interface import Runtime
from mqbench.harness.runtime.plain import TransformersRuntime
from mqbench.harness.runtime.random_source import RandomSource, RandomValues, place_of
from mqbench.harness.runtime.rows import Rows
from mqbench.harness.runtime.systems import System

NOWHERE_ELSE: Mapping[str, torch.device] = MappingProxyType({})


@torch.no_grad()
def build_runtime(
    config: Any,
    system: System,
    *,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device_map: Mapping[str, str | torch.device] | None = None,
) -> Runtime:
    """Builds a model on the meta device and fills it, block by block, in the form in which it runs.

    While it builds, no more is allocated than the result holds, but for the temporaries of one layer.

    Args:
        config: Of a Transformers model whose family the runtime knows.
        system: What to build.
        device: Of inputs, logits and all that ``device_map`` does not place; ``meta`` gives shapes and sizes only.
        dtype: Of everything in floating point.
        seed: Of the values.
        device_map: Device by name of an LLM block (see ``spread_blocks``); graphs are then not used.

    Raises:
        UnknownNameError: the runtime does not know the model's family.
        RequestError: the system cannot run on a device, or ``device_map`` names something else than an LLM block.
        LayoutError: the architecture has something that the runtime does not cover.
    """
    family = family_of(config)
    layout = family.layout(config)
    places = _checked_places(device_map or {}, layout, system, torch.device(device))
    device = with_index(device)
    model = family.empty_model(config)
    values = RandomValues(seed)
    if system.transformers:
        fill(model, device, dtype, values, places)
        return TransformersRuntime(model, layout, family, system, device, places)
    rows, context = Rows(), ModalityContext()
    source = RandomSource(model, layout, system, rows, device, dtype, values, places)
    fill(model.get_submodule(layout.text.entry[0]), device, dtype, values)
    fused = FusedModel(model, layout, family, rows, context)
    fuse(fused, system, source)
    _renew_rotary(model, device)
    track_modality(model, layout, context)
    return FusedRuntime(fused, system, device)


def spread_blocks(layout: Layout, devices: Sequence[str | torch.device]) -> dict[str, str | torch.device]:
    """A ``device_map`` with the LLM's blocks in equal runs on several devices, for models that one cannot hold."""
    blocks = layout.text.blocks
    return {block.name: devices[index * len(devices) // len(blocks)] for index, block in enumerate(blocks)}


def fill(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    values: RandomValues,
    places: Mapping[str, torch.device] = NOWHERE_ELSE,
) -> None:
    """Puts all that is still on the meta device onto a device: random weights, ones for norms, zeros for biases.

    Rotary embeddings are made anew from their config. Parameters that are one stay one. ``places`` names the modules
    that go to another device.
    """
    _renew_rotary(model, device)
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        place = place_of(path, places, device)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = _parameter(name, parameter, place, dtype, values)
                setattr(module, name, made[id(parameter)])


def _renew_rotary(model: nn.Module, device: torch.device) -> None:
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)) and hasattr(module, "inv_freq"):
            with torch.device(device):
                put(model, name, type(module)(module.config))


def _parameter(
    name: str, meta: nn.Parameter, device: torch.device, dtype: torch.dtype, values: RandomValues
) -> nn.Parameter:
    shape = tuple(meta.shape)
    if len(shape) > 1:
        data = values.normal(shape, dtype, device, 1 / math.sqrt(math.prod(shape[1:])))
    else:
        data = torch.full(shape, float(name != "bias"), dtype=dtype, device=device)
    return nn.Parameter(data, requires_grad=False)


def _checked_places(
    device_map: Mapping[str, str | torch.device], layout: Layout, system: System, device: torch.device
) -> dict[str, torch.device]:
    places = {name: torch.device(place) for name, place in device_map.items()}
    for place in {device, *places.values()}:
        reason = system.runs_on(place)
        if reason is not None:
            raise RequestError(f"system '{system.name}' cannot run on {place}: {reason}")
    blocks = {block.name for block in layout.text.blocks}
    for name in places:
        if name not in blocks:
            raise RequestError(f"device_map names '{name}', which is no block of the LLM; leave it out")
    return {name: with_index(place) for name, place in places.items()}
