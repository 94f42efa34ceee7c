"""Where a pass spends its time: ranges around its parts that cost nothing unless somebody measures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from mqbench.harness.quant.layout import Layout, Part
from mqbench.harness.runtime.interface import PARTS

VISION_GEMM, VISION_ATTENTION, PROJECTOR, LLM_GEMM, LLM_ATTENTION, QUANTIZE, OTHER = PARTS
RANGE_PREFIX, SCOPE_PREFIX = "mqbench:", "mqbench-scope:"
VISION_SCOPE = "vision"
GEMM_PARTS: Mapping[Part, str] = {Part.VISION: VISION_GEMM, Part.PROJECTOR: PROJECTOR, Part.TEXT: LLM_GEMM}
ATTENTION_PARTS: Mapping[Part, str] = {Part.VISION: VISION_ATTENTION, Part.TEXT: LLM_ATTENTION}

_clocks: list[PartClock] = []
_nothing = nullcontext()


def part(name: str) -> AbstractContextManager[None]:
    """A range of the running pass, for the clock that is open, if one is. Ranges do not nest."""
    return _clocks[-1].range(name) if _clocks else _nothing


def scope(name: str) -> AbstractContextManager[object]:
    """A range around several parts, seen by a profiler only while a clock is open: ``mqbench-scope:<name>``."""
    return torch.profiler.record_function(SCOPE_PREFIX + name) if _clocks else _nothing


class PartClock:
    """Times ranges: by CUDA events on a GPU, by the wall clock elsewhere.

    Time outside every range, between the first and the last one, is ``other`` too.
    """

    def __init__(self, device: torch.device) -> None:
        self._stamp = _cuda_stamp if device.type == "cuda" else _wall_stamp
        self._elapsed = _cuda_elapsed if device.type == "cuda" else _wall_elapsed
        self._ranges: list[tuple[str, object, object]] = []

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Times what runs inside as ``name``."""
        with torch.profiler.record_function(RANGE_PREFIX + name):
            start = self._stamp()
            yield
            self._ranges.append((name, start, self._stamp()))

    def milliseconds(self) -> Mapping[str, float]:
        """Milliseconds by name of ``PARTS``; waits for the GPU."""
        times = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._ranges:
            times[name] += self._elapsed(start, end)
        if self._ranges:
            times[OTHER] += self._elapsed(self._ranges[0][1], self._ranges[-1][2]) - sum(times.values())
        return times


@contextmanager
def clock(device: torch.device) -> Iterator[PartClock]:
    """Opens a clock; ranges of passes inside are timed by it."""
    _clocks.append(PartClock(device))
    try:
        yield _clocks[-1]
    finally:
        _clocks.pop()


def part_of(name: str, layout: Layout) -> str:
    """The part that a module belongs to, by its name in a model of this layout."""
    linears = layout.quantized_linears() | dict.fromkeys(layout.unquantized, Part.TEXT)
    if name in linears:
        return GEMM_PARTS[linears[name]]
    for tower in layout.towers:
        if any(name == norm.name for norm in tower.norms):
            return QUANTIZE
        for block in tower.blocks:
            if name == block.attention.out.rpartition(".")[0]:
                return ATTENTION_PARTS[tower.part]
            if name.startswith(block.mlp_out.rpartition(".")[0] + "."):
                return QUANTIZE  # what stands beside the MLP's linears: its activation function
    return OTHER


def _wall_stamp() -> object:
    return time.perf_counter()


def _wall_elapsed(start: object, end: object) -> float:
    return 1000 * (end - start)  # type: ignore[operator]


def _cuda_stamp() -> object:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _cuda_elapsed(start: object, end: object) -> float:
    torch.cuda.synchronize()
    return start.elapsed_time(end)  # type: ignore[attr-defined]
