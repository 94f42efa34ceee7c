"""Which rows of the running forward pass are visual: one object that the model's root fills and every quantizer reads."""

from __future__ import annotations

from torch import Tensor


class ModalityContext:
    """Holds the visual mask of the current LLM forward pass.

    Attributes:
        visual: (B, T) bool, True at image placeholders, in the order in which the LLM processes the tokens (already
            permuted under AIFS); None when every token is text (decoding) or in the vision tower.
        valid: (B, T) bool, False at padding; None when nothing is padded. Observers ignore padded rows.
    """

    def __init__(self) -> None:
        self.visual: Tensor | None = None
        self.valid: Tensor | None = None

    def clear(self) -> None:
        self.visual = None
        self.valid = None
