"""AWQ: channels of large inputs are scaled up before rounding, then ranges are clipped (Lin et al. 2023).

Both searches look at the float model, as the original does (arXiv 2306.00978, Sec. 3.2): first all factors, then all
clipping thresholds, then every weight is rounded to nearest. Weights are asymmetric by default (``zero_point``). The
recipe's label names the variants: ``awq[duo_scaling=true]`` takes AutoAWQ's rule, ``awq[clip=false]`` leaves the clip
search out. Where the bit setting rounds activations too, they get their quantizers behind the weights, as with every
method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mqbench.baselines import awq_clip, awq_scale
from mqbench.baselines.awq_clip import round_weights_clipped
from mqbench.baselines.awq_scale import scale_channels
from mqbench.harness.quant import kv_cache
from mqbench.harness.quant.calibrate import (
    ACTIVATION_OPTIONS,
    ZERO_POINT,
    attach_input_quantizers,
    calibrate_activations,
)
from mqbench.harness.quant.kv_cache import kv_cache_steps
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Step


def awq_steps(recipe: Recipe) -> Sequence[Step]:
    """Scale, round inside clipped ranges, calibrate."""
    weights = (scale_channels, round_weights_clipped)
    return (*weights, attach_input_quantizers, calibrate_activations, *kv_cache_steps(recipe))


METHOD = StepMethod(
    name="awq",
    aliases=("autoawq",),
    summary="channels of large inputs scaled up, ranges clipped, asymmetric round-to-nearest weights",
    steps=awq_steps,
    uses_data=True,
    options=(
        *awq_scale.OPTIONS,
        *awq_clip.OPTIONS,
        replace(ZERO_POINT, default=True),
        *ACTIVATION_OPTIONS,
        *kv_cache.OPTIONS,
    ),
)
