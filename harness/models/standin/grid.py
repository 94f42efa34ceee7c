"""Where in a picture a family's visual tokens stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mqbench.harness.models.standin.render import HEIGHT_PX


@dataclass(frozen=True)
class VisualGrid:
    """Rows of visual tokens that cover a picture.

    Attributes:
        rows: Rows of tokens, the first on top.
        columns: Tokens of a row.
        margin_px: What the family adds above and below a picture before it cuts the rows.
    """

    rows: int
    columns: int
    margin_px: int = 0

    def places(self) -> Tensor:
        """(rows, columns, 2): x and y of each token's middle; a picture spans -1 to 1 in both."""
        high = HEIGHT_PX + 2 * self.margin_px
        y = ((torch.arange(self.rows) + 0.5) / self.rows * high - self.margin_px) / HEIGHT_PX * 2 - 1
        x = (torch.arange(self.columns) + 0.5) / self.columns * 2 - 1
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
