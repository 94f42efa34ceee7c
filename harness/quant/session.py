"""The shared quantizer interface: a method is a named list of steps over one session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mqbench.harness.quant.layout import Layout, Part
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.modality import ModalityContext, RowContext, row_context
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Scheme, Tokens

Batch = Mapping[str, Tensor]


@dataclass
class LayerReport:
    """What quantization did to one linear.

    Attributes:
        name: Module name.
        part: Vision, projector or text.
        weight_num_bits: None when the weight stayed in floating point.
        activation_num_bits: None when activations stayed in floating point.
        scales: Static activation scales: ``{"tensor": s}`` or ``{"text": s_t, "visual": s_v}``.
        weight_error: Relative Frobenius error of the rounded weight.
        eq9_margin: Median over output columns of |sqrt(n) mean(w)| / max|w| (Eq. 9 holds above 1); None where no
            online Hadamard acts.
        eq9_rules: Whether Eq. 9 holds for the layer, by rule of aggregation; empty where no online Hadamard acts.
        rms_split: RMS takes input channel 0 out of the layer (see option ``rms_side``).
    """

    name: str
    part: str
    weight_num_bits: int | None = None
    activation_num_bits: int | None = None
    scales: dict[str, float] = field(default_factory=dict)
    weight_error: float | None = None
    eq9_margin: float | None = None
    eq9_rules: dict[str, bool] = field(default_factory=dict)
    rms_split: bool = False


@dataclass
class QuantReport:
    """The outcome of one quantization.

    Attributes:
        layers: A report per linear, by module name.
        step_s: Seconds per step.
        kv_bits: Bits of the LLM's KV cache; None when it stayed in floating point.
    """

    layers: dict[str, LayerReport] = field(default_factory=dict)
    step_s: dict[str, float] = field(default_factory=dict)
    kv_bits: int | None = None


@dataclass
class Session:
    """All that a step may touch.

    Attributes:
        model: The model, changed in place.
        layout: Its architecture facts.
        recipe: What to do.
        batches: Calibration inputs: each is passed as ``model(**batch)``; they include answers, so that text scales
            see decoded tokens.
        linears: Every quantizable linear by name, in pipeline order (already ``QuantLinear``).
        context: Modality of the running forward pass, kept by hooks on the model.
        report: Filled in by the steps.
        defaults: The method's declared defaults by option name.
    """

    model: nn.Module
    layout: Layout
    recipe: Recipe
    batches: Sequence[Batch]
    linears: dict[str, QuantLinear]
    context: ModalityContext
    report: QuantReport
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        return self.layout.quantized_linears()[name]

    def row_context(self, name: str) -> RowContext | None:
        """What a linear knows of its rows; None where they are no tokens of the LLM."""
        return row_context(self.layout, self.context, name)

    def scheme(self, name: str) -> Scheme:
        """The scheme of a linear: the text setting for the LLM, the vision setting for everything before it."""
        return self.recipe.text_scheme if self.part(name) is Part.TEXT else self.recipe.vision_scheme

    def weight_args(self, name: str) -> QuantArgs | None:
        """The weight grid of a linear, asymmetric under option ``zero_point``; None keeps it in floating point."""
        args = self.scheme(name).weights
        return None if args is None else replace(args, symmetric=not self.option("zero_point", False))

    def activation_args(self, name: str) -> QuantArgs | None:
        """The grid of a linear's input; None keeps it in floating point.

        Under option ``quantize_tokens`` that is also an expert that only sees rows of the other modality.
        """
        tokens, modality = self.option("quantize_tokens", Tokens.ALL), self.layout.modality_of(name)
        if modality is not None and tokens not in (Tokens.ALL, modality):
            return None
        return self.scheme(name).activations

    def option(self, key: str, default: Any) -> Any:
        """What the recipe says, else what the method declares, else ``default``."""
        return self.recipe.options.get(key, self.defaults.get(key, default))

    @torch.no_grad()
    def run_calibration(self) -> None:
        """One forward pass over every calibration batch (hooks and observers see the inputs)."""
        for batch in self.batches:
            self.model(**batch)


Step = Callable[[Session], None]


class Quantizer(Protocol):
    """What an entry point of group ``mqbench.methods`` must provide."""

    name: str
    aliases: tuple[str, ...]
    summary: str

    def quantize(self, model: nn.Module, layout: Layout, recipe: Recipe, batches: Sequence[Batch]) -> QuantReport:
        """Quantizes ``model`` in place.

        Raises:
            CalibrationError: static scales are asked for and ``batches`` is empty.
            NonFiniteError: a weight or an activation is NaN or Inf.
        """
        ...
