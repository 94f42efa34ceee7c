"""Which architectures the runtime's blocks can stand in for, as far as a layout says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.layout import Layout, Norm, NormPlace, Tower


def check_covered(layout: Layout, text_config: Any) -> None:
    """Raises ``LayoutError`` when a model has something that the runtime's blocks do not compute; names it.

    Args:
        layout: Of the model.
        text_config: Of its LLM.
    """
    missing = list(_missing(layout))
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
        missing.append("sliding-window attention")
    if missing:
        raise LayoutError(
            f"'{layout.family}' has {', '.join(missing)}, which the runtime does not have; "
            "take mqbench eval --backend integer"
        )


def final_norm(tower: Tower) -> Norm:
    """The norm behind a tower's last block; ``check_covered`` made sure that there is one."""
    assert tower.final_norm is not None
    return tower.final_norm


def _missing(layout: Layout) -> Iterator[str]:
    if layout.resampler or layout.cross_attentions:
        yield "a resampler"
    for tower in layout.towers:
        yield from (f"{what} ({tower.part})" for what in _missing_in(tower))
    if layout.vision is None or layout.vision.final_norm is None:
        return
    norm = layout.vision.final_norm
    if norm.joint or len(layout.projector) != 2 or norm.readers != layout.projector[:1]:
        yield "a projector other than norm, linear, activation, linear"


def _missing_in(tower: Tower) -> Iterator[str]:
    if tower.norm_place is not NormPlace.PRE:
        yield "norms behind its branches"
    if tower.entry_norm is not None:
        yield "a norm before its first block"
    if tower.final_norm is None or tower.exits:
        yield "readers of the bare residual stream"
    if any(block.experts for block in tower.blocks):
        yield "experts"
    if any(True for block in tower.blocks for _ in block.scales):
        yield "LayerScale"
    if any(block.attention.value_period for block in tower.blocks):
        yield "interleaved queries, keys and values"
