"""Fresh memory that shows what a kernel forgets to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``new_empty`` and ``empty_like`` return NaN, or the lowest integer."""

    def poisoned(plain: Any) -> Any:
        def fresh(*args: Any, **kwargs: Any) -> Tensor:
            made: Tensor = plain(*args, **kwargs)
            return made.fill_(float("nan") if made.dtype.is_floating_point else torch.iinfo(made.dtype).min)

        return fresh

    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
