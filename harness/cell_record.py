"""Pieces of a cell's record that do not depend on what was measured."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mqbench.harness import environment
from mqbench.harness.errors import MQBenchError
from mqbench.harness.record import Cell, Record, Status

if TYPE_CHECKING:
    from mqbench.harness.models.adapter import LoadedModel

MAX_REASON_LENGTH = 500


def failure(cell: Cell, reason: str, started_at: str, duration_s: float = 0.0, attention: str | None = None) -> Record:
    """The record of a cell that failed."""
    return Record(
        cell=cell,
        status=Status.FAILED,
        started_at=started_at,
        duration_s=round(duration_s, 3),
        reason=reason,
        environment=environment.describe(attention),
    )


def reason_of(error: Exception) -> str:
    """One line: our own errors speak for themselves, others need their kind."""
    text = " ".join(str(error).split())
    named = text if isinstance(error, MQBenchError) else f"{type(error).__name__}: {text}"
    return named[:MAX_REASON_LENGTH]


def attention_of(loaded: LoadedModel) -> str | None:
    """The attention backend, which changes scores."""
    return getattr(getattr(loaded.model, "config", None), "_attn_implementation", None)


def now() -> str:
    """ISO 8601, UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def started_at_of(started: float) -> str:
    """ISO 8601 time of a ``time.perf_counter`` value."""
    moment = datetime.now(UTC).timestamp() - (time.perf_counter() - started)
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")
