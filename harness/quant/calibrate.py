"""Steps that every method shares: round-to-nearest weights, and activation quantizers with their static scales."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mqbench.harness.errors import UnknownNameError
from mqbench.harness.quant.activation import InputQuantizer
from mqbench.harness.quant.layout import Part
from mqbench.harness.quant.observers import OBSERVERS, PERCENTILE
from mqbench.harness.quant.options import Option
from mqbench.harness.quant.scheme import QuantArgs, Strategy, Tokens
from mqbench.harness.quant.session import LayerReport, Session
from mqbench.harness.quant.weight import Clip, RoundedWeight, round_to_nearest, store_rounded

STRATEGIES = (Strategy.TENSOR, Strategy.MODALITY, Strategy.TOKEN)

ZERO_POINT = Option("zero_point", False, kind=bool, help="asymmetric weight grids")
WEIGHT_CLIP = Option("weight_clip", "minmax", tuple(map(str, Clip)), help="how the range of a weight group is chosen")
WEIGHT_OPTIONS = (WEIGHT_CLIP, ZERO_POINT)
"""What ``round_weights_rtn`` reads."""

ACTIVATIONS = Option("activations", "tensor", tuple(map(str, STRATEGIES)), help="which values share one input scale")
ACTIVATION_OPTIONS = (
    ACTIVATIONS,
    Option("observer", "minmax", tuple(OBSERVERS), help="how static scales follow from what calibration showed"),
    Option("percentile", PERCENTILE, kind=float, minimum=0.5, maximum=1, help="quantile of observer=percentile"),
    Option("quantize_tokens", "all", tuple(map(str, Tokens)), help="LLM tokens whose activations are rounded"),
)
"""What ``attach_input_quantizers`` and ``calibrate_activations`` read."""

OPTIONS = (*WEIGHT_OPTIONS, *ACTIVATION_OPTIONS)


def attach_input_quantizers(session: Session, text_strategy: str = Strategy.TENSOR) -> None:
    """Gives every linear whose scheme has activations an ``InputQuantizer``.

    Options, beside those that say all in ``ACTIVATION_OPTIONS``:
        activations: Default ``text_strategy``. ``tensor``: one static scale; ``modality``: a static scale for visual
            and one for text rows of the LLM, one scale elsewhere and in text-only models; ``token``: dynamic per token
            everywhere.
        quantize_tokens: ``visual`` or ``text``: the LLM's rows of the other modality stay in floating point and out of
            the scale; the vision tower and the projector are not concerned.

    Raises:
        UnknownNameError: an option's value is unknown.
    """
    strategy = session.option("activations", text_strategy)
    if strategy not in STRATEGIES:
        raise UnknownNameError("activation strategy", strategy, STRATEGIES)
    make = partial(
        InputQuantizer,
        observer=session.option("observer", "minmax"),
        percentile=session.option("percentile", PERCENTILE),
    )
    tokens = Tokens(session.option("quantize_tokens", Tokens.ALL))
    for name, linear in session.linears.items():
        args = session.activation_args(name)
        if args is None:
            continue
        own_args = _with_strategy(args, strategy, is_mixed(session, name))
        chooses = session.part(name) is Part.TEXT and session.layout.modality_of(name) is None
        own_tokens = tokens if chooses else Tokens.ALL
        quantizer = make(name, own_args, session.row_context(name), tokens=own_tokens)
        linear.input_quantizer = quantizer.to(linear.weight.device)
        layer_report(session, name).activation_num_bits = args.num_bits


def calibrate_activations(session: Session) -> None:
    """Observes the calibration batches and freezes the static scales.

    One pass with rounded weights and no activation rounded (every quantizer observes and passes its input on): the
    scales then depend on the weights that will run, not on the order of the layers.

    Raises:
        CalibrationError: a static quantizer saw no data.
        NonFiniteError: an activation is NaN or Inf.
    """
    quantizers = {name: linear.input_quantizer for name, linear in session.linears.items() if linear.input_quantizer}
    if any(not quantizer.args.dynamic for quantizer in quantizers.values()):
        for quantizer in quantizers.values():
            quantizer.observing = True
        session.run_calibration()
    for name, quantizer in quantizers.items():
        quantizer.freeze()
        keys = ("text", "visual") if quantizer.args.strategy is Strategy.MODALITY else ("tensor",)
        layer_report(session, name).scales = dict(zip(keys, quantizer.scale.tolist(), strict=False))


def round_weights_rtn(session: Session) -> None:
    """Rounds every weight to nearest on the grid of its scheme; option ``weight_clip`` (default ``minmax``).

    Raises:
        NonFiniteError: a weight is NaN or Inf.
    """
    clip = session.option("weight_clip", Clip.MINMAX)
    for name, linear in session.linears.items():
        args = session.weight_args(name)
        if args is not None:
            store_and_report(session, name, round_to_nearest(linear.weight, args, clip, name), args)


def store_and_report(session: Session, name: str, rounded: RoundedWeight, args: QuantArgs) -> None:
    """Puts a rounded weight into its linear and writes its bits and error into the report."""
    layer = layer_report(session, name)
    layer.weight_error = store_rounded(session.linears[name], rounded, args)
    layer.weight_num_bits = args.num_bits


def layer_report(session: Session, name: str) -> LayerReport:
    """The report of a linear, created on first use."""
    return session.report.layers.setdefault(name, LayerReport(name, session.part(name)))


def is_mixed(session: Session, name: str) -> bool:
    """Rows of both modalities reach a linear."""
    is_text = session.part(name) is Part.TEXT
    return is_text and session.layout.is_multimodal and session.layout.modality_of(name) is None


def _with_strategy(args: QuantArgs, strategy: str, mixed: bool) -> QuantArgs:
    if strategy == Strategy.MODALITY and not mixed:
        strategy = Strategy.TENSOR
    return replace(args, strategy=Strategy(strategy), dynamic=strategy == Strategy.TOKEN)
