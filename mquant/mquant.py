"""MQuant (arXiv 2502.00425): the recipe that composes its parts; an ablation is a recipe with a step left out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mqbench.baselines.quarot import rounding_step
from mqbench.baselines.rotation import rotation_steps
from mqbench.harness.quant.calibrate import attach_input_quantizers, calibrate_activations
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.modality import ModalityContext
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Step
from mqbench.mquant.aifs import enable_aifs, reorder_tokens
from mqbench.mquant.msq import attach_msq
from mqbench.mquant.rms import split_spikes


def mquant_steps(recipe: Recipe) -> Sequence[Step]:
    """Exact transforms, RMS split, weights, static scales, reordering (paper Fig. 2 and Sec. 3).

    Switches of the recipe, all True by default:
        ln2rms, rotation, online_hadamard: See ``rotation_steps``.
        rms: Split input channel 0 off where Eq. 9 holds; also ``rms_rule``, ``rms_x0_bits``.
        msq: Two static scales per LLM linear, visual and text; without it one.
        aifs: Visual tokens run first. It changes no output, only where the scales' boundary lies.

    Further options:
        rounding: ``gptq`` (the default) or ``rtn``.
        activations: Overrides ``msq``: ``modality``, ``tensor`` or ``token`` (dynamic).
        observer, weight_clip, act_order, percdamp, block_size, online_out_hadamard: See the steps.

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
    restore=restore_order,
)
