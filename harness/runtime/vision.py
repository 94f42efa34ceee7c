"""What stands before and behind the vision tower's blocks: patch embedding and projector, on flat rows."""

from __future__ import annotations

from torch import Tensor, nn

from mqbench.harness.runtime.pointwise import RowNorm
from mqbench.harness.runtime.projection import Projection


class PatchRows(nn.Module):
    """A patch embedding that reads one row per patch.

    Shapes: (patches, ...) -> (patches, C).
    """

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(pixels.flatten(1).contiguous())


class Projector(nn.Module):
    """Norm, linear, activation, linear: patches to visual tokens.

    Args:
        norm: Of each patch.
        chunks: Consecutive patches that make one token.
        projection_in: The first linear.
        activation: Key of ``pointwise.ACTIVATIONS``.
        projection_out: The second linear.

    Shapes: (patches, C) -> (patches / chunks, LLM width).
    """

    def __init__(
        self, norm: RowNorm, chunks: int, projection_in: Projection, activation: str, projection_out: Projection
    ) -> None:
        super().__init__()
        self.norm, self.chunks, self.activation = norm, chunks, activation
        self.projection_in, self.projection_out = projection_in, projection_out

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden, _ = self.projection_in.of_norm(self.norm, x, residual, self.chunks)
        return self.projection_out.of_activation(hidden, self.activation)
