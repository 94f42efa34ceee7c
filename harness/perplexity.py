"""Perplexity of a text model over fixed windows: the mean, over windows, of the mean negative log likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from mqbench.harness.errors import NonFiniteError
from mqbench.harness.models.adapter import LoadedModel

OnProgress = Callable[[Mapping[str, str]], None]
"""Called after every batch with its new losses by window number, as ``repr`` writes them: the exact float."""

ROWS_PER_CHUNK = 512
"""Positions whose logits are turned to float32 at a time."""

MAX_LOSS = 700.0
"""Nats per token; exp of more is beyond floating point."""


def window_losses(
    loaded: LoadedModel,
    windows: Tensor,
    batch_size: int,
    on_progress: OnProgress | None = None,
    done: Mapping[str, str] | None = None,
    share: Callable[[list[list[int]]], list[list[int]]] = list,
) -> dict[str, float]:
    """Mean negative log likelihood of each window, in nats per predicted token.

    Every token but a window's first is predicted from those before it in the window. Batches depend on the windows and
    ``batch_size`` alone, never on ``done``: one that was not finished before a crash is run again as a whole, so that
    an interrupted run gives the same figures as an uninterrupted one.

    Args:
        loaded: The model.
        windows: (windows, context_length) token ids, without padding.
        batch_size: Windows per forward pass.
        on_progress: Told about every finished batch.
        done: Losses of an earlier run with the same settings, by window number, as ``on_progress`` got them.
        share: Of all batches, those to run here.

    Returns:
        Window number ("0", "1", ...) -> loss, in order; windows of batches that run elsewhere are left out.

    Raises:
        NonFiniteError: a loss is NaN or Inf.
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    kept = done or {}
    losses = {str(index): float(kept[str(index)]) for index in range(len(windows)) if str(index) in kept}
    rows = list(range(len(windows)))
    for batch in share([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]):
        indices = [str(row) for row in batch]
        if all(index in losses for index in indices):
            continue
        new = dict(zip(indices, _batch_losses(loaded, windows[batch]), strict=True))
        _check_finite(new)
        losses |= new
        if on_progress is not None:
            on_progress({index: repr(loss) for index, loss in new.items()})
    return {str(row): losses[str(row)] for row in rows if str(row) in losses}


def perplexity(losses: Mapping[str, float]) -> float:
    """exp of the mean loss over windows. They are equally long, so it is the mean over predicted tokens too.

    Raises:
        NonFiniteError: it is no finite number.
    """
    mean = fmean(losses.values())
    if mean > MAX_LOSS:
        raise NonFiniteError(f"a mean loss of {mean:.0f} nats is too large for a perplexity; check the bits")
    return math.exp(mean)


@torch.no_grad()
def _batch_losses(loaded: LoadedModel, windows: Tensor) -> list[float]:
    """One loss per row of (B, T) token ids."""
    input_ids = windows.to(next(loaded.model.parameters()).device)
    logits = loaded.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    return [_row_loss(row[:-1], ids[1:]) for row, ids in zip(logits, input_ids, strict=True)]


def _row_loss(logits: Tensor, targets: Tensor) -> float:
    """Mean cross entropy, at least in float32 per token and summed in float64. Shapes: (T, vocabulary), (T,)."""
    total = 0.0
    for rows, ids in zip(logits.split(ROWS_PER_CHUNK), targets.split(ROWS_PER_CHUNK), strict=True):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total += F.cross_entropy(wide, ids, reduction="none").sum(dtype=torch.float64).item()
    return total / len(targets)


def _check_finite(losses: Mapping[str, float]) -> None:
    for index, loss in losses.items():
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss of window {index} is {loss}; check the weights, the dtype and the bits")
