"""SmoothQuant: activation outliers move into the weights behind each norm (Xiao et al. 2023, Eq. 4).

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), the weight maximum joint over all linears that read the norm. The norm's
gain (and bias) is divided by s, the readers' columns are multiplied by s: exact before rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from mqbench.harness.quant import calibrate, kv_cache
from mqbench.harness.quant.calibrate import attach_input_quantizers, calibrate_activations, round_weights_rtn
from mqbench.harness.quant.capture import collect_rows
from mqbench.harness.quant.kv_cache import kv_cache_steps
from mqbench.harness.quant.layout import Norm, NormPlace
from mqbench.harness.quant.method import StepMethod
from mqbench.harness.quant.options import Option
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import Session, Step

ALPHA = 0.5
SMALLEST = 1e-5

OPTIONS = (
    Option("alpha", ALPHA, kind=float, minimum=0, maximum=1, help="share of an outlier that moves into the weights"),
)


def smooth(session: Session) -> None:
    """Smooths every norm whose readers are all quantized linears; option ``alpha`` (default 0.5).

    Norms before attention and before the MLP of each block, in both towers. The final norms are left alone: the
    LLM's feeds lm_head, which is not quantized; the vision tower's is read in concatenated chunks.
    """
    norms = smoothable_norms(session)
    seen = {norm.name: witnesses(session, norm) for norm in norms}
    peaks = channel_peaks(session, [name for names in seen.values() for name in names])
    for norm in norms:
        smooth_norm(session, norm, torch.stack([peaks[name] for name in seen[norm.name] if name in peaks]).amax(0))


def witnesses(session: Session, norm: Norm) -> list[str]:
    """Readers of a norm that together see all of its rows: one, or one per expert."""
    by_modality = {session.layout.modality_of(name): name for name in reversed(norm.readers)}
    return list(by_modality.values())


def smoothable_norms(session: Session) -> list[Norm]:
    """Norms of blocks, each with an affine map and readers whose inputs are to be rounded."""
    towers = [tower for tower in session.layout.towers if tower.norm_place is NormPlace.PRE]
    candidates = [norm for tower in towers for norm in tower.block_norms]
    return [norm for norm in candidates if _is_quantized(session, norm) and _has_gain(session, norm)]


@torch.no_grad()
def channel_peaks(session: Session, names: Sequence[str]) -> dict[str, Tensor]:
    """max|X_j| over the calibration rows of each named linear's input, (in_features,) each; padding left out."""
    peaks: dict[str, Tensor] = {}

    def keep(name: str, rows: Tensor) -> None:
        peak = rows.abs().amax(0)
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(collect_rows(session, name, partial(keep, name)))
        session.run_calibration()
    return peaks


def smoothing_factors(activation_peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """s_j of Eq. 4, both peaks clamped to at least 1e-5 and s likewise. Shapes: (C,), (C,) -> (C,)."""
    activation_peak = activation_peak.clamp_min(SMALLEST)
    weight_peak = weight_peak.clamp_min(SMALLEST)
    return (activation_peak.pow(alpha) / weight_peak.pow(1 - alpha)).clamp_min(SMALLEST)


@torch.no_grad()
def smooth_norm(session: Session, norm: Norm, activation_peak: Tensor) -> None:
    """Divides a norm's output by s and multiplies its readers' columns by s."""
    readers = [session.linears[name] for name in norm.readers]
    weight_peak = torch.stack([linear.weight.abs().amax(0) for linear in readers]).amax(0)
    factors = smoothing_factors(activation_peak, weight_peak, session.option("alpha", ALPHA))
    module = session.model.get_submodule(norm.name)
    for parameter in (module.weight, getattr(module, "bias", None)):
        if isinstance(parameter, Tensor):
            parameter.data = parameter / factors
    for linear in readers:
        linear.weight.data = linear.weight * factors


def _is_quantized(session: Session, norm: Norm) -> bool:
    schemes = [session.scheme(name) for name in norm.readers if name in session.linears]
    return len(schemes) == len(norm.readers) and all(scheme.activations is not None for scheme in schemes)


def _has_gain(session: Session, norm: Norm) -> bool:
    module: nn.Module = session.model.get_submodule(norm.name)
    return isinstance(getattr(module, "weight", None), Tensor)


def smoothquant_steps(recipe: Recipe) -> Sequence[Step]:
    """Smooth, round, calibrate."""
    return (smooth, round_weights_rtn, attach_input_quantizers, calibrate_activations, *kv_cache_steps(recipe))


METHOD = StepMethod(
    name="smoothquant",
    aliases=("sq",),
    summary="activation outliers smoothed into weights, then round-to-nearest",
    steps=smoothquant_steps,
    uses_data=True,
    options=(*OPTIONS, *calibrate.OPTIONS, *kv_cache.OPTIONS),
)
