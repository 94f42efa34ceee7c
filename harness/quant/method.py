"""A method as a named list of steps: checks before, modality tracking and timing around, verification after."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from mqbench.harness.errors import CalibrationError, MQBenchError
from mqbench.harness.quant.calibrate import layer_report
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.linear import QuantLinear, wrap_linears
from mqbench.harness.quant.modality import ModalityContext, track_modality
from mqbench.harness.quant.options import Option, check_options, declared_defaults
from mqbench.harness.quant.scheme import Recipe, Strategy
from mqbench.harness.quant.session import Batch, QuantReport, Session, Step
from mqbench.harness.quant.weight import check_finite

Restore = Callable[[nn.Module, Layout, Recipe, ModalityContext], None]
"""Puts back what a method changed beside modules and tensors (a reordered forward pass) on a loaded model."""


@dataclass(frozen=True)
class StepMethod:
    """A ``Quantizer`` made of steps.

    Attributes:
        name: As users type it.
        aliases: Other spellings.
        summary: One line for ``mqbench methods``.
        steps: The steps of a recipe, in order. An ablation is a recipe for which a step is left out.
        uses_data: Some step reads the calibration batches even when no static activation scale is asked for.
        options: The recipe options that its steps read; a recipe with another one is refused.
        restore: Called by ``serialize.load_quantized`` on the loaded model; None where tensors and modules say it all.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    steps: Callable[[Recipe], Sequence[Step]]
    uses_data: bool = False
    options: tuple[Option, ...] = ()
    restore: Restore | None = None

    def quantize(self, model: nn.Module, layout: Layout, recipe: Recipe, batches: Sequence[Batch]) -> QuantReport:
        """Quantizes ``model`` in place; the modality hooks stay on it.

        Raises:
            UnknownNameError: the recipe has an option that the method does not have, or not with that value.
            RequestError: an option's value is of the wrong kind, or out of range.
            CalibrationError: the recipe needs calibration data and ``batches`` is empty.
            LayoutError: ``layout`` does not describe ``model``.
            NonFiniteError: a weight or an activation is NaN or Inf (names the layer).
        """
        check_options(self, recipe)
        layout.check(model)
        check_weights(model)
        if not batches and self.needs_data(recipe):
            raise CalibrationError(f"method '{self.name}' at {recipe.bits} needs calibration samples; give some")
        session = open_session(model, layout, recipe, batches, self.options)
        for step in self.steps(recipe):
            _run_timed(step, session)
        session.context.clear()
        verify(session)
        return session.report

    def needs_data(self, recipe: Recipe) -> bool:
        """Whether a recipe cannot do without calibration batches."""
        schemes = (recipe.vision_scheme, recipe.text_scheme)
        if self.uses_data and any(scheme.weights is not None for scheme in schemes):
            return True
        static = (declared_defaults(self.options) | dict(recipe.options)).get("activations") != Strategy.TOKEN
        return static and any(scheme.activations is not None for scheme in schemes)


def open_session(
    model: nn.Module, layout: Layout, recipe: Recipe, batches: Sequence[Batch], options: tuple[Option, ...] = ()
) -> Session:
    """Wraps the linears, starts tracking modality and puts the model in evaluation mode."""
    model.eval()
    model.requires_grad_(False)
    linears = wrap_linears(model, list(layout.quantized_linears()))
    context = ModalityContext()
    track_modality(model, layout, context)
    defaults = declared_defaults(options)
    session = Session(model, layout, recipe, batches, linears, context, QuantReport(), defaults)
    for name in linears:
        layer_report(session, name)
    return session


def check_weights(model: nn.Module) -> None:
    """Raises ``NonFiniteError`` for the first module, in the model's order, with NaN or Inf in a parameter."""
    for name, parameter in model.named_parameters():
        check_finite(parameter, name.removesuffix(".weight"))


def verify(session: Session) -> None:
    """Every linear has what its scheme asks for, and nothing else.

    Raises:
        MQBenchError: names the linear that a method forgot.
    """
    for name, linear in session.linears.items():
        scheme = session.scheme(name)
        if linear.weight_num_bits != (scheme.weights.num_bits if scheme.weights else None):
            raise MQBenchError(_forgotten(session, name, "weight", linear))
        activations = session.activation_args(name)
        if _activation_num_bits(linear) != (activations.num_bits if activations else None):
            raise MQBenchError(_forgotten(session, name, "input", linear))


def _activation_num_bits(linear: QuantLinear) -> int | None:
    quantizer = linear.input_quantizer
    if quantizer is None or quantizer.observing or not quantizer.enabled:
        return None
    calibrated = quantizer.args.dynamic or len(quantizer.scale) > 0
    return quantizer.args.num_bits if calibrated else None


def _forgotten(session: Session, name: str, what: str, linear: QuantLinear) -> str:
    return (
        f"method '{session.recipe.method}' left the {what} of '{name}' other than its scheme asks "
        f"({session.recipe.bits}); add the missing step to the method"
    )


def _run_timed(step: Step, session: Session) -> None:
    started = time.perf_counter()
    step(session)
    name = step_name(step)
    session.report.step_s[name] = session.report.step_s.get(name, 0.0) + time.perf_counter() - started


def step_name(step: Step) -> str:
    """The function's name, also behind ``functools.partial``."""
    while isinstance(step, partial):
        step = step.func
    return getattr(step, "__name__", type(step).__name__)
