"""Which rows of the running forward pass are visual: one object that the root fills and every quantizer reads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mqbench.harness.errors import LayoutError
from mqbench.harness.quant.layout import Layout, Modality, Part


class ModalityContext:
    """Holds the visual mask of the current LLM forward pass.

    Attributes:
        visual: (B, T) bool, True at image placeholders, in the order in which the LLM processes the tokens (already
            permuted under AIFS); None when every token is text (decoding). It says nothing about the vision tower.
        valid: (B, T) bool, False at padding; None when nothing is padded. Observers ignore padded rows.
    """

    def __init__(self) -> None:
        self.visual: Tensor | None = None
        self.valid: Tensor | None = None
        self._indexed: tuple[Tensor, Tensor] | None = None

    def row_index(self) -> Tensor | None:
        """``visual`` as (B * T,) uint8, 1 at visual rows; computed once per mask, for all linears of a pass."""
        if self.visual is None:
            return None
        if self._indexed is None or self._indexed[0] is not self.visual:
            self._indexed = self.visual, self.visual.reshape(-1).to(torch.uint8)
        return self._indexed[1]

    def clear(self) -> None:
        self.visual = None
        self.valid = None
        self._indexed = None


class RowContext(Protocol):
    """What a quantizer asks about the rows of the running pass."""

    @property
    def visual(self) -> Tensor | None: ...

    @property
    def valid(self) -> Tensor | None: ...

    def row_index(self) -> Tensor | None: ...


class ExpertContext:
    """What a linear sees that gets the rows of one modality only (CogVLM2's experts).

    Args:
        whole: Of the whole pass.
        modality: Whose rows.
    """

    def __init__(self, whole: ModalityContext, modality: Modality) -> None:
        self.whole = whole
        self._is_visual = modality is Modality.VISUAL

    @property
    def visual(self) -> Tensor | None:
        """(rows,) bool, all True for the visual expert; None for the text expert, whose rows are all text."""
        visual = self.whole.visual
        return visual[visual] if self._is_visual and visual is not None else None

    @property
    def valid(self) -> Tensor | None:
        """(rows,) bool, False at padding, or None when nothing is padded."""
        valid, visual = self.whole.valid, self.whole.visual
        if valid is None:
            return None
        if visual is None:
            return valid.reshape(-1)
        return valid[visual if self._is_visual else ~visual]

    def row_index(self) -> None:
        return None


class _Removable(Protocol):
    def remove(self) -> None: ...


class Hooks:
    """Hooks that belong together and go together."""

    def __init__(self, handles: Sequence[_Removable]) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        """Takes every hook off the model; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()


def row_context(layout: Layout, context: ModalityContext, name: str) -> RowContext | None:
    """What linear ``name`` needs to know of its rows; None where they are no tokens of the LLM."""
    if layout.quantized_linears()[name] is not Part.TEXT:
        return None
    modality = layout.modality_of(name)
    return context if modality is None else ExpertContext(context, modality)


def track_modality(model: nn.Module, layout: Layout, context: ModalityContext) -> Hooks:
    """Keeps ``context`` right during every forward pass of ``model``, prefill, later turns and decoding steps alike.

    Only the tokens of the current chunk count: ``input_ids`` (B, T) and the last T columns of ``attention_mask``
    (B, S). Behind the pass, also one that raised, the context is clear again.

    Args:
        model: The root, called with ``input_ids`` and, when something is padded, a 2-D ``attention_mask``.
        layout: Gives the image placeholder's id.
        context: The object that the quantizers of this model hold.

    Returns:
        A handle whose ``remove`` stops the tracking.
    """
    parameters = inspect.signature(model.forward)

    def fill(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = parameters.bind_partial(*args, **kwargs).arguments
        input_ids = arguments.get("input_ids")
        context.visual = visual_mask(input_ids, layout)
        context.valid = None if input_ids is None else valid_mask(arguments.get("attention_mask"), input_ids.shape[1])

    def clear(*_: Any) -> None:
        context.clear()

    return Hooks(
        [
            model.register_forward_pre_hook(fill, with_kwargs=True),
            model.register_forward_hook(clear, always_call=True),
        ]
    )


def visual_mask(input_ids: Tensor | None, layout: Layout) -> Tensor | None:
    """Image placeholders of a chunk, (B, T) bool, or None when it holds none.

    Raises:
        LayoutError: a multimodal model was called without ``input_ids``, so that nobody can tell the modalities apart.
    """
    if layout.image_token_id is None:
        return None
    if input_ids is None:
        raise LayoutError(f"a quantized '{layout.family}' model needs input_ids to tell visual tokens; pass them")
    visual = input_ids == layout.image_token_id
    return visual if visual.any() else None


def valid_mask(attention_mask: Any, num_tokens: int) -> Tensor | None:
    """The last ``num_tokens`` columns of a 2-D attention mask as bool, or None when they hold no padding.

    A mask of another form (4-D, or the dict of a static cache) says nothing about single tokens and gives None.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None
    valid = attention_mask[:, -num_tokens:].to(torch.bool)
    return None if valid.all() else valid
