"""The float model: nothing is quantized."""

from __future__ import annotations

from mqbench.harness.quant.method import StepMethod

METHOD = StepMethod(
    name="none",
    aliases=("float", "bf16"),
    summary="the float model, nothing quantized",
    steps=lambda recipe: (),
)
