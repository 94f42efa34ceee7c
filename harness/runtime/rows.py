"""Which rows of the running LLM pass are visual: one object that the decoder fills and every quantizer reads."""

from __future__ import annotations

import torch
from torch import Tensor

TEXT, VISUAL = 0, 1
"""Index of a modality's scale, as in ``InputQuantizer``."""


class Rows:
    """Modality of the rows of the running pass, in the order in which they are processed.

    Without any, every row is text: decoding.
    """

    def __init__(self) -> None:
        self.use(None)

    def use(self, index: Tensor | None, slices: tuple[Tensor, Tensor] | None = None) -> None:
        """Sets the rows of the next pass.

        Args:
            index: (rows,) uint8, ``VISUAL`` or ``TEXT``; None when all are text.
            slices: Indices of the text rows and of the visual rows (``slices_of``), where linears gather them.
        """
        self._index = index
        self._slices = slices
        self._moved: dict[torch.device, tuple[Tensor, tuple[Tensor, Tensor] | None]] = {}

    def index(self, device: torch.device) -> Tensor | None:
        """(rows,) uint8 on a device, or None."""
        return None if self._index is None else self._on(device)[0]

    def slices(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Indices of text rows and of visual rows on a device, or None."""
        return None if self._slices is None else self._on(device)[1]

    def _on(self, device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        if device not in self._moved:
            assert self._index is not None
            slices = None if self._slices is None else (self._slices[0].to(device), self._slices[1].to(device))
            self._moved[device] = self._index.to(device), slices
        return self._moved[device]


def slices_of(index: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of text rows and of visual rows, int64. On a GPU the host waits."""
    return (index == TEXT).nonzero()[:, 0], (index == VISUAL).nonzero()[:, 0]
