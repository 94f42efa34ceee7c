"""A runtime that computes nothing: it knows how many bytes it takes, and fails when the fake device has no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from mqbench.harness.runtime.interface import MemoryParts, RuntimeInputs
from mqbench.harness.runtime.systems import System
from mqbench.harness.sweep.device import Watched

VISION_ROOT = "model.visual"


class PlainMemory:
    """Watches nothing, and collects no garbage: with all of transformers in memory, that takes a second."""

    def watch(self, work: Callable[[], Any]) -> tuple[Any, Watched]:
        return work(), Watched(7, 5)

    def used_bytes(self) -> int | None:
        return 123

    def release(self) -> None:
        pass


@dataclass
class FakeDevice:
    """Memory of a made-up device.

    Attributes:
        capacity: Bytes in all.
        size_of: Bytes of a system's weights, by its name.
        pass_bytes: Bytes that a prefill takes for its duration.
        calls: What was done, in order.
        failures: (what, system) -> error to raise.
    """

    capacity: int = 1000
    size_of: Callable[[str], int] = lambda name: 10
    pass_bytes: int = 0
    used: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)
    failures: dict[tuple[str, str], BaseException] = field(default_factory=dict)

    def take(self, num_bytes: int) -> None:
        if self.used + num_bytes > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes} bytes")
        self.used += num_bytes

    def log(self, what: str, system: str) -> None:
        self.calls.append((what, system))
        if (what, system) in self.failures:
            raise self.failures[what, system]

    def build(self, config: Any, system: System, **_: Any) -> FakeRuntime:
        """In place of ``build_runtime``."""
        self.log("build", system.name)
        return FakeRuntime(self, system)

    def count(self, what: str, system: str) -> int:
        return self.calls.count((what, system))


class FakeRuntime:
    """Counts calls; see ``FakeDevice``."""

    def __init__(self, place: FakeDevice, system: System) -> None:
        self.place, self.system, self.bytes = place, system, place.size_of(system.name)
        place.take(self.bytes)
        self.model = nn.Module()
        self.model.add_module("model", nn.Module())
        self.model.model.add_module("visual", nn.Identity())
        self.device = torch.device("cpu")
        self.reserved = (0, 0)
        self.length = 0
        self.closed = False

    def reserve(self, batch_size: int, num_tokens: int) -> None:
        self.place.log("reserve", self.system.name)
        self.reserved, self.length = (batch_size, num_tokens), 0

    def prefill(self, inputs: RuntimeInputs) -> Tensor:
        self.place.log("prefill", self.system.name)
        self.place.take(self.place.pass_bytes)
        with record_function("mqbench:vision gemm"):
            self.model.get_submodule(VISION_ROOT)(torch.ones(64, 64) @ torch.ones(64, 64))
        with record_function("mqbench:llm gemm"):
            _ = torch.ones(64, 64) @ torch.ones(64, 64)
            with record_function("mqbench:quantize and norm"):
                _ = torch.ones(64, 64).mul(2.0)
        self.place.used -= self.place.pass_bytes
        return self._advance(inputs.batch_size, inputs.num_tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        self.place.log("decode", self.system.name)
        return self._advance(len(tokens), 1)

    def _advance(self, batch: int, tokens: int) -> Tensor:
        assert not self.closed and batch == self.reserved[0], "closed, or another batch than reserved"
        self.length += tokens
        assert self.length <= self.reserved[1], "the cache is full"
        return torch.zeros(batch, 4)

    def reset(self) -> None:
        self.length = 0

    def memory(self) -> MemoryParts:
        return MemoryParts(self.bytes, 2, 1)

    @contextmanager
    def instrumented(self) -> Iterator[None]:
        self.place.log("instrumented", self.system.name)
        yield

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.place.used -= self.bytes
