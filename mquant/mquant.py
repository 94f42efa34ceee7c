"""MQuant (arXiv 2502.00425): the recipe that composes its parts; an ablation is a recipe with a step left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from mqbench.baselines import rotation
from mqbench.baselines.quarot import ROUNDING_OPTIONS, rounding_step
from mqbench.baselines.rotation import rotated_kv_steps, rotation_steps
from mqbench.harness.quant import kv_cache
from mqbench.harness.quant.calibrate import (
    ACTIVATION_OPTIONS,
    ACTIVATIONS,
    attach_input_quantizers,
    calibrate_activations,
)
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.modality import ModalityContext
from mqbench.harness.quant.options import Option, merge_options
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Step
from mqbench.mquant import rms
from mqbench.mquant.aifs import enable_aifs, reorder_tokens
from mqbench.mquant.msq import attach_msq
from mqbench.mquant.rms import split_spikes

SWITCHES = (
    Option("rms", True, kind=bool, help="RMS: input channel 0 leaves the matrix product where Eq. 9 holds"),
    Option("msq", True, kind=bool, help="two static scales per LLM linear, visual and text; without it one"),
    Option("aifs", True, kind=bool, help="visual tokens run first; it changes no output"),
)
STRATEGY = replace(ACTIVATIONS, default=None, help="overrides msq; its own default: modality with msq, tensor without")
OPTIONS = merge_options(
    SWITCHES, rotation.OPTIONS, rms.OPTIONS, ROUNDING_OPTIONS, (STRATEGY,), ACTIVATION_OPTIONS, kv_cache.OPTIONS
)


def mquant_steps(recipe: Recipe) -> Sequence[Step]:
    """Exact transforms, RMS split, weights, static scales, reordering (paper Fig. 2 and Sec. 3).

    ``SWITCHES`` and those of ``rotation_steps`` turn parts off; ``OPTIONS`` has all that the steps read.

    Raises:
        UnknownNameError: ``rounding`` is unknown.
    """

    def on(switch: str) -> bool:
        return bool(recipe.options.get(switch, True))

    return (
        *rotation_steps(recipe),
        *([split_spikes] if on("rms") else []),
        rounding_step(recipe),
        attach_msq if on("msq") else attach_input_quantizers,
        calibrate_activations,
        *rotated_kv_steps(recipe),
        *([reorder_tokens] if on("aifs") else []),
    )


def restore_order(model: nn.Module, layout: Layout, recipe: Recipe, context: ModalityContext) -> None:
    """Makes a saved model that was loaded process visual tokens first again, as its recipe says."""
    if recipe.options.get("aifs", True):
        enable_aifs(model, layout, context)


METHOD = StepMethod(
    name="mquant",
    aliases=(),
    summary="QuaRot plus split spikes (RMS), scales per modality (MSQ) and visual tokens first (AIFS)",
    steps=mquant_steps,
    uses_data=True,
    options=OPTIONS,
    restore=restore_order,
)
