"""Probe: ranges of the LLM's activations over visual and over text tokens (paper Sec. 1, Fig. 1b)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mqbench.harness.errors import CalibrationError, NonFiniteError, RequestError
from mqbench.harness.probe_values import median, rounded, shown_blocks
from mqbench.harness.quant.activation import InputQuantizer, all_finite
from mqbench.harness.quant.layout import Block, Layout
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.modality import ExpertContext, Hooks, ModalityContext, RowContext, track_modality
from mqbench.harness.tasks import TaskResult

if TYPE_CHECKING:
    from mqbench.harness.probes import ProbeContext

KINDS: Mapping[str, Callable[[Block], tuple[str, ...]]] = MappingProxyType(
    {
        "block_in": lambda block: (block.name,),
        "attention_in": lambda block: tuple(path.attention_readers[0] for path in block.paths),
        "attention_out": lambda block: tuple(path.attention.out for path in block.paths),
        "mlp_in": lambda block: tuple(path.mlp_readers[0] for path in block.paths),
        "mlp_out": lambda block: tuple(path.mlp_out for path in block.paths),
    }
)
"""What is measured in each block, and the module whose input it is: with a visual expert one for each modality. Linears
that share an input share its figures."""

HEADLINE_KIND = "mlp_out"
"""Inputs of the block's last linear. Hidden states (Fig. 1b) are not quantized, norm outputs differ little between
modalities by construction: what is left of the gap where quantization acts, also behind a rotation, stands here."""

MODALITIES = ("text", "visual")

EDGES = tuple(
    sign * 2 ** (half_octave / 2)
    for sign, half_octaves in ((-1, range(24, -17, -1)), (1, range(-16, 25)))
    for half_octave in half_octaves
)
"""Histogram edges: two bins per power of two from 2^-8 to 2^12 on each side of zero; the outermost bins are open."""


@dataclass
class Seen:
    """What one place showed of one modality so far.

    Attributes:
        low: Smallest value.
        high: Largest value.
        counts: (len(EDGES) + 1,) values per bin, or None where no histogram is kept.
    """

    low: float = float("inf")
    high: float = float("-inf")
    counts: Tensor | None = None

    @property
    def peak(self) -> float:
        return max(abs(self.low), abs(self.high))

    def update(self, values: Tensor) -> None:
        if values.numel() == 0:
            return
        low, high = values.aminmax()
        self.low, self.high = min(self.low, low.item()), max(self.high, high.item())
        if self.counts is not None:
            self.counts += histogram(values).to(self.counts)


@dataclass
class Place:
    """The input of one module of one LLM block, or of its experts for the same."""

    kind: str
    block: int
    modules: tuple[str, ...]
    seen: dict[str, Seen] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.seen["visual"].peak / self.seen["text"].peak


def activation_ranges(context: ProbeContext) -> TaskResult:
    """Smallest and largest activation per LLM block, over visual and over text tokens of the calibration samples.

    Linears of a quantized model are seen as their quantizer sees them: behind the online transform, without a split-off
    channel 0. Padding does not count; text includes answers and the markers around images.

    Returns:
        score: median over the blocks of the visual over the text peak (largest magnitude) at the input of the block's
        last linear. Metrics by kind of place (``KINDS``): ``KIND.ratio_median``, ``KIND.ratio_max``,
        ``KIND.visual_peak``, ``KIND.text_peak``. Arrays by block: ``KIND.visual.min`` and so on, ``KIND.ratio``; for
        the first, middle and last block ``KIND.blockN.visual.share``, the share of values per bin of ``EDGES``.

    Raises:
        CalibrationError: no calibration sample holds an image.
        NonFiniteError: an activation is NaN or Inf.
        RequestError: the model is text-only, or quantized in a way that hides which rows are visual.
    """
    model, layout = context.loaded.model, context.loaded.layout
    if layout.image_token_id is None:
        raise RequestError(f"'{context.loaded.name}' takes no images; 'activation_ranges' needs a multimodal model")
    places = _places(layout)
    with _watching(model, layout, places), torch.no_grad():
        for batch in context.batches():
            model(**batch)
    _check_seen(places)
    return _result(places)


def _check_seen(places: Sequence[Place]) -> None:
    for place in places:
        if place.seen["visual"].low > place.seen["visual"].high:
            raise CalibrationError("no calibration sample holds an image; probe 'activation_ranges' needs some")
        if place.seen["text"].peak in (0, float("inf")):
            raise CalibrationError(f"the input of '{place.modules[0]}' is zero over all text tokens; check the weights")


def histogram(values: Tensor) -> Tensor:
    """Values per bin between ``EDGES``. Shapes: any -> (len(EDGES) + 1,)."""
    edges = torch.tensor(EDGES, dtype=torch.float64, device=values.device).to(values.dtype)
    return torch.bincount(torch.bucketize(values.flatten(), edges, right=True), minlength=len(EDGES) + 1)


def _places(layout: Layout) -> list[Place]:
    blocks = layout.text.blocks
    kept = shown_blocks(len(blocks))
    places = []
    for index, block in enumerate(blocks):
        for kind, modules in KINDS.items():
            counts = [torch.zeros(len(EDGES) + 1, dtype=torch.int64) if index in kept else None for _ in MODALITIES]
            seen = {name: Seen(counts=start) for name, start in zip(MODALITIES, counts, strict=True)}
            places.append(Place(kind, index, modules(block), seen))
    return places


@contextmanager
def _watching(model: nn.Module, layout: Layout, places: Sequence[Place]) -> Iterator[None]:
    found = _quantizers_context(model)
    context = found or ModalityContext()
    tracking = Hooks([]) if found else track_modality(model, layout, context)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            _hook(place, name, _rows(layout, context, name)), with_kwargs=True
        )
        for place in places
        for name in place.modules
    ]
    try:
        yield
    finally:
        Hooks([*handles, tracking]).remove()


def _rows(layout: Layout, context: ModalityContext, name: str) -> RowContext:
    """The rows that a module of the LLM sees: all, or those of its expert."""
    modality = layout.modality_of(name)
    return context if modality is None else ExpertContext(context, modality)


def _quantizers_context(model: nn.Module) -> ModalityContext | None:
    """The one that a quantized model keeps (its order of tokens may differ from the caller's); None for a float model.

    Raises:
        RequestError: the model is quantized, but none of its quantizers holds one.
    """
    contexts = (module.context for module in model.modules() if isinstance(module, InputQuantizer))
    wholes = (context.whole if isinstance(context, ExpertContext) else context for context in contexts)
    found = next((context for context in wholes if isinstance(context, ModalityContext)), None)
    if found is None and any(isinstance(module, QuantLinear) for module in model.modules()):
        raise RequestError("probe 'activation_ranges' needs the float model, or one with quantized LLM activations")
    return found


def _hook(place: Place, name: str, rows: RowContext) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(module, QuantLinear):
            x, _ = module.prepare_input(x)
        if not all_finite(x):
            raise NonFiniteError(f"the input of '{name}' holds NaN or Inf; check the weights and the dtype")
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if rows.valid is None else rows.valid
        visual = torch.zeros_like(valid) if rows.visual is None else rows.visual
        place.seen["text"].update(x[valid & ~visual])
        place.seen["visual"].update(x[valid & visual])

    return hook


def _result(places: Sequence[Place]) -> TaskResult:
    metrics: dict[str, float] = {}
    arrays: dict[str, list[float]] = {"edges": rounded(EDGES)}
    for kind in KINDS:
        chosen = [place for place in places if place.kind == kind]
        ratios = [place.ratio for place in chosen]
        metrics |= {f"{kind}.ratio_median": median(ratios), f"{kind}.ratio_max": max(ratios)}
        arrays[f"{kind}.ratio"] = rounded(ratios)
        for name in MODALITIES:
            seen = [place.seen[name] for place in chosen]
            metrics[f"{kind}.{name}_peak"] = max(item.peak for item in seen)
            arrays[f"{kind}.{name}.min"] = rounded(item.low for item in seen)
            arrays[f"{kind}.{name}.max"] = rounded(item.high for item in seen)
            for place in chosen:
                arrays |= _shares(f"{kind}.block{place.block}.{name}", place.seen[name].counts)
    return TaskResult(metrics[f"{HEADLINE_KIND}.ratio_median"], metrics, arrays=arrays)


def _shares(name: str, counts: Tensor | None) -> dict[str, list[float]]:
    return {} if counts is None else {f"{name}.share": rounded((counts.double() / counts.sum()).tolist())}
