"""QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) for multimodal models: rotate, then round with GPTQ.

Rotations and online Hadamards alone: no split of channel 0, no scales per modality, no reordering. Activations have one
static scale per tensor by default, as the MQuant paper frames this baseline; QuaRot's own setting is
``activations="token", online_out_hadamard=True``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from mqbench.baselines import gptq, rotation
from mqbench.baselines.gptq import round_weights_gptq
from mqbench.baselines.rotation import rotated_kv_steps, rotation_steps
from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant import kv_cache
from mqbench.harness.quant.calibrate import (
    ACTIVATION_OPTIONS,
    WEIGHT_CLIP,
    attach_input_quantizers,
    calibrate_activations,
    round_weights_rtn,
)
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.options import Option, merge_options
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Step

ROUNDINGS: Mapping[str, Step] = MappingProxyType({"gptq": round_weights_gptq, "rtn": round_weights_rtn})

ROUNDING_OPTIONS = merge_options(
    (
        Option("rounding", "gptq", tuple(ROUNDINGS), help="how weights are rounded"),
        replace(WEIGHT_CLIP, default=None, help="how the range of a weight group is chosen; gptq: mse, rtn: minmax"),
    ),
    gptq.OPTIONS,
)
"""What ``rounding_step`` and the step that it gives read."""


def rounding_step(recipe: Recipe) -> Step:
    """The step that rounds the weights; option ``rounding``: ``gptq`` (the default) or ``rtn``.

    Raises:
        UnknownNameError: the option names neither.
    """
    name = recipe.options.get("rounding", "gptq")
    if name not in ROUNDINGS:
        raise UnknownNameError("rounding", name, ROUNDINGS)
    return ROUNDINGS[name]


def quarot_steps(recipe: Recipe) -> Sequence[Step]:
    """Rotate, round, calibrate."""
    return (
        *rotation_steps(recipe),
        rounding_step(recipe),
        attach_input_quantizers,
        calibrate_activations,
        *rotated_kv_steps(recipe),
    )


METHOD = StepMethod(
    name="quarot",
    aliases=(),
    summary="residual rotation and online Hadamards, GPTQ weights, static per-tensor activations",
    steps=quarot_steps,
    uses_data=True,
    options=(*rotation.OPTIONS, *ROUNDING_OPTIONS, *ACTIVATION_OPTIONS, *kv_cache.OPTIONS),
)
