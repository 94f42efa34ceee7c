"""Round-to-nearest: no transform, weights to their nearest level, static activation scales (METHODS.md, section 2)."""

from __future__ import annotations

from collections.abc import Sequence

from mqbench.harness.quant import calibrate, kv_cache
from mqbench.harness.quant.calibrate import attach_input_quantizers, calibrate_activations, round_weights_rtn
from mqbench.harness.quant.kv_cache import kv_cache_steps
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Step


def rtn_steps(recipe: Recipe) -> Sequence[Step]:
    """Round, then calibrate."""
    return (round_weights_rtn, attach_input_quantizers, calibrate_activations, *kv_cache_steps(recipe))


METHOD = StepMethod(
    name="rtn",
    aliases=("round-to-nearest",),
    summary="round-to-nearest weights, static per-tensor activations",
    steps=rtn_steps,
    options=(*calibrate.OPTIONS, *kv_cache.OPTIONS),
)
