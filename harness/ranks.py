"""One evaluation by several processes that torchrun started: each rank answers its share of the batches.

Every rank loads and quantizes the model alike, since seeds, data and order are the same, and answers every ``size``-th
batch; answers meet on all ranks, and rank 0 scores, stores and prints. Batches are those of a single process, so that
records are, too.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mqbench.harness.errors import MQBenchError, RequestError

Item = TypeVar("Item")

LOST = "error: another rank is gone; finished cells are stored, the same command goes on from here"
"""No cell failed, so no record may say so: this rank ends, too."""

MAX_REASON = 200


class OtherRankError(MQBenchError):
    """Another rank failed at what this one did."""


@dataclass(frozen=True)
class Ranks:
    """This process among its like.

    Attributes:
        rank: From 0 on.
        size: How many there are.
        local_rank: Among those on this machine: the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, items: list[Item]) -> list[Item]:
        """Every ``size``-th item from this rank's own on."""
        return items[self.rank :: self.size]

    def device(self, device: str) -> str:
        """This rank's device: ``cuda`` is the GPU with its local number."""
        return f"cuda:{self.local_rank}" if device == "cuda" else device

    def merge(self, answer: Callable[[], Mapping[str, str]]) -> dict[str, str]:
        """The answers of all ranks, on each of them.

        Raises:
            OtherRankError: another rank raised; what this one raises comes out as it is.
            SystemExit: another rank is gone.
        """
        if self.size == 1:
            return dict(answer())
        own: Mapping[str, str] = {}
        failed: Exception | None = None
        try:
            own = answer()
        except Exception as error:  # all ranks must meet, or the others wait forever
            failed = error
        shares = self._gather((dict(own), "" if failed is None else f"{type(failed).__name__}: {failed}"))
        if failed is not None:
            raise failed
        for rank, (_, reason) in enumerate(shares):
            if reason:
                raise OtherRankError(f"rank {rank} failed: {reason}")
        return {index: text for answers, _ in shares for index, text in answers.items()}

    def meet(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            self._gather(None)

    def _gather(self, item: Item) -> list[Item]:
        from torch import distributed

        items: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(items, item)
        except RuntimeError as error:
            raise SystemExit(f"{LOST}: {' '.join(str(error).split())[:MAX_REASON]}") from error
        return items


def join_ranks() -> Ranks:
    """This process among those that torchrun started with it; alone without torchrun.

    Raises:
        RequestError: torchrun's variables are incomplete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    try:
        ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except KeyError as error:
        raise RequestError(f"WORLD_SIZE is set, but {error} is not; start mqbench by torchrun, or unset both") from None
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")  # only Python objects travel
        atexit.register(_leave)
    return ranks


def _leave() -> None:
    """Ends the group before the interpreter ends: its threads abort a process that just exits."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
