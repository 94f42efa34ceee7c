"""One timed pass over a point: prefill and decoding of every turn, on the device's clock and on the host's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mqbench.harness.runtime.interface import Runtime, RuntimeInputs
from mqbench.harness.sweep.device import Clock

CHUNK_TOKENS = 16
"""Decoding steps between two marks: one sample of ``decode_ms``."""


@dataclass
class Times:
    """Milliseconds of one pass.

    Attributes:
        prefill_ms: Every turn's, added; from the call until its logits are there, the host's work included.
        prefill_wall_ms: The same on the host's clock.
        decode_ms: Per token, one entry per chunk of steps.
        decode_total_ms: All decoding.
    """

    prefill_ms: float = 0.0
    prefill_wall_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)
    decode_total_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.prefill_ms + self.decode_total_ms

    def samples(self) -> dict[str, list[float]]:
        """By figure, as records name them."""
        found = {
            "prefill_ms": [self.prefill_ms],
            "prefill_wall_ms": [self.prefill_wall_ms],
            "total_ms": [self.total_ms],
        }
        if self.decode_ms:
            found |= {"decode_ms": self.decode_ms, "decode_total_ms": [self.decode_total_ms]}
        return found


def run_pass(runtime: Runtime, turns: Sequence[RuntimeInputs], token: Tensor, steps: int, clock: Clock) -> Times:
    """Empties the cache and runs all turns.

    Args:
        runtime: What is timed; its cache holds all turns.
        turns: A prefill each.
        token: (B,) id that every decoding step gets.
        steps: Decoding steps behind each prefill.
        clock: Of the runtime's device.
    """
    times = Times()
    runtime.reset()
    clock.cool()
    clock.wait()
    for turn in turns:
        started = time.perf_counter()
        before = clock.mark()
        runtime.prefill(turn)
        after = clock.mark()
        clock.wait()
        times.prefill_wall_ms += (time.perf_counter() - started) * 1e3
        times.prefill_ms += clock.between_ms(before, after)
        _decode(runtime, token, steps, clock, times)
    return times


def _decode(runtime: Runtime, token: Tensor, steps: int, clock: Clock, times: Times) -> None:
    """Steps follow each other without waiting for the device."""
    marks, counts = [clock.mark()], []
    for done in range(0, steps, CHUNK_TOKENS):
        counts.append(min(CHUNK_TOKENS, steps - done))
        for _ in range(counts[-1]):
            runtime.decode(token)
        marks.append(clock.mark())
    clock.wait()
    for count, start, end in zip(counts, marks[:-1], marks[1:], strict=True):
        span = clock.between_ms(start, end)
        times.decode_ms.append(span / count)
        times.decode_total_ms += span
