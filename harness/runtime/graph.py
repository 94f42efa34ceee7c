"""How a pass reaches the device. Everything that only a GPU can run stands here; on a CPU a pass is a plain call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mqbench.harness.runtime.systems import Engine

Pass = Callable[[Mapping[str, Tensor]], Tensor]

WARM_UPS = 2
"""Runs before a capture: Triton compiles, and cuBLAS allocates its workspace."""

BACKENDS: Mapping[str, SDPBackend] = MappingProxyType(
    {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
)
"""By the names in ``System.attention``."""


@dataclass(frozen=True)
class _Captured:
    graph: Any
    inputs: Mapping[str, Tensor]
    output: Tensor


def with_index(device: str | torch.device) -> torch.device:
    """The device as its tensors call it: ``cuda`` is one of ``cuda:0``, ``cuda:1``, ..."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


class PassRunner:
    """Runs passes: eagerly, or as CUDA graphs that are captured when a key is seen first.

    A pass must be repeatable: run twice on the same tensors it leaves the same behind, since it runs several times
    before its graph exists.

    Args:
        engine: See ``Engine``; on a CPU, and across several devices, every engine is eager.
        devices: All devices that the passes use.
        attention: Backends of torch's attention on a GPU by falling priority; empty leaves them as they are.
    """

    def __init__(self, engine: Engine, devices: Sequence[torch.device], attention: tuple[str, ...] = ()) -> None:
        devices = [with_index(device) for device in devices]
        self.device = devices[0]
        self.on_gpu = all(device.type == "cuda" for device in devices)
        self.captures = self.on_gpu and len(set(devices)) == 1 and engine is not Engine.EAGER
        self.compiles = self.captures and engine is Engine.COMPILE
        self.attention = [BACKENDS[name] for name in attention]
        self.paused = False
        self._pool: Any = None
        self._captured: dict[Hashable, _Captured] = {}

    def __call__(self, key: Hashable, run: Pass, tensors: Mapping[str, Tensor]) -> Tensor:
        """The output of ``run(tensors)``. Passes of one key have equal shapes, and differ in nothing but values."""
        if not self.captures or self.paused:
            with self._backends():
                return run(tensors)
        with torch.cuda.device(self.device):
            if key not in self._captured:
                self._captured[key] = self._capture(run, tensors)
            captured = self._captured[key]
            for name, x in tensors.items():
                captured.inputs[name].copy_(x)
            captured.graph.replay()
            return captured.output

    def drop(self) -> None:
        """Forgets all graphs and frees their memory."""
        self._captured.clear()
        self._pool = None

    @property
    def workspace_bytes(self) -> int:
        """Bytes of static inputs, and of the graphs' private pool, which holds activations and outputs."""
        inputs = [x for captured in self._captured.values() for x in captured.inputs.values()]
        return sum(x.numel() * x.element_size() for x in inputs) + self._pool_bytes()

    def _backends(self) -> AbstractContextManager[Any]:
        return sdpa_kernel(self.attention, set_priority=True) if self.on_gpu and self.attention else nullcontext()

    def _capture(self, run: Pass, tensors: Mapping[str, Tensor]) -> _Captured:
        inputs = {name: x.clone() for name, x in tensors.items()}
        if self.compiles:
            run = torch.compile(run, dynamic=False)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with self._backends():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    run(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool):
                output = run(inputs)
        return _Captured(graph, inputs, output)

    def _pool_bytes(self) -> int:
        if self._pool is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))
