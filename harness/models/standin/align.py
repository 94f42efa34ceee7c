"""The first lesson of a stand-in that starts from a donor: its visual tokens learn what the donor's say.

The donor's features of a picture stand on a grid of cells. Each visual token of the new tower learns the features at
its own place, interpolated between cells: every token is told what to be in every step, where an answer's few tokens
tell the tower little. The LLM does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mqbench.harness.models.standin import qwen2_vl
from mqbench.harness.models.standin.grid import VisualGrid
from mqbench.harness.models.standin.tasks import Example
from mqbench.harness.quant.layout import Layout


class _Reached(Exception):
    """The visual tokens are there; the LLM need not run."""


class Alignment:
    """Lets a model's visual tokens learn a donor's.

    Args:
        model: The new model.
        layout: Its layout.
        feed: Its feed (``family.Feed``).
        grid: Where its visual tokens stand.
        donor: A ``Qwen2VLForConditionalGeneration``.
    """

    def __init__(self, model: nn.Module, layout: Layout, feed: Any, grid: VisualGrid, donor: Any) -> None:
        self.model, self.feed, self.grid, self.donor = model, feed, grid, donor
        self.first_block = model.get_submodule(layout.text.blocks[0].name)
        entry, tensors = layout.text.entry, dict(model.named_parameters())
        embeddings = {n for n, module in model.named_modules() if n in entry and isinstance(module, nn.Embedding)}
        self.tables = [tensors[name] for name in (*entry, *(f"{n}.weight" for n in embeddings)) if name in tensors]

    def loss(self, examples: Sequence[Example], device: str) -> Tensor:
        """Mean squared error at tokens inside the picture, relative to the features' variance over tokens.

        Raises:
            ValueError: a picture has another number of visual tokens than the grid.
        """
        wanted = self.targets(examples, device)
        got = self.visual_tokens(examples, device)
        inside = (self.grid.places().abs() < 1).all(-1).flatten().to(device)
        variance = wanted.var(dim=(0, 1)).mean()
        return (got - wanted)[:, inside].square().mean() / variance

    @torch.no_grad()
    def targets(self, examples: Sequence[Example], device: str) -> Tensor:
        """(B, rows * columns, text width): the donor's features at the grid's places."""
        pixels = torch.from_numpy(np.stack([np.asarray(example.image) for example in examples]))
        features = qwen2_vl.visual_features(self.donor, qwen2_vl.patchify(pixels).to(device)).float()
        cells = features.unflatten(1, qwen2_vl.MERGED).permute(0, 3, 1, 2)
        places = self.grid.places().to(device).expand(len(examples), -1, -1, -1)
        return F.grid_sample(cells, places, padding_mode="border", align_corners=False).flatten(2).transpose(1, 2)

    def visual_tokens(self, examples: Sequence[Example], device: str) -> Tensor:
        """(B, rows * columns, text width): what the model's LLM would read."""
        batch, seen = self.feed.collate(examples, device), []
        # Zero gradients would let weight decay shrink them.
        for table in self.tables:
            table.requires_grad_(False)

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        handle = self.first_block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.feed.logits_and_activations(self.model, batch)
        except _Reached:
            pass
        finally:
            handle.remove()
            for table in self.tables:
                table.requires_grad_(True)
        tokens = self.grid.rows * self.grid.columns
        if not (batch.visual.sum(1) == tokens).all():
            raise ValueError(f"a picture has {int(batch.visual.sum(1).max())} visual tokens, its grid {tokens}")
        return seen[0].float()[batch.visual].unflatten(0, (-1, tokens))
