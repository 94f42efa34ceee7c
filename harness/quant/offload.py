"""Quantizing and running a model whose blocks do not fit on the device together: they wait in host memory.

Everything outside the towers' blocks stays on the device. A block moves there for the time of its forward pass, or,
while a step visits it, until the visit ends. So the device holds one block, the rest of the model, and activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.modality import Hooks

HOST = torch.device("cpu")

Move = Callable[[str, nn.Module, torch.device], None]
"""Moves a block, given its name, to a device."""


def move_module(_: str, module: nn.Module, device: torch.device) -> None:
    """Parameters and buffers, in place."""
    module.to(device)


_OFFLOADS: WeakKeyDictionary[nn.Module, BlockOffload] = WeakKeyDictionary()


@contextmanager
def on_device(model: nn.Module, name: str) -> Iterator[None]:
    """While this is open, a block of a model is where it runs; does nothing for a model that is not offloaded."""
    offload = _OFFLOADS.get(model)
    if offload is None:
        yield
        return
    with offload.holding(name):
        yield


class BlockOffload:
    """Keeps the blocks of every tower in host memory while they do not run.

    Args:
        model: On any device; its blocks are moved to the host, everything else to ``device``.
        layout: Names the blocks.
        device: Where blocks run.
        move: What moves a block.

    Attributes:
        device: Where blocks run.
        blocks: Names of the blocks that come and go.
    """

    def __init__(self, model: nn.Module, layout: Layout, device: torch.device, move: Move = move_module) -> None:
        self.device = device
        self.blocks = tuple(block.name for tower in layout.towers for block in tower.blocks)
        self._modules = {name: model.get_submodule(name) for name in self.blocks}
        self._users = dict.fromkeys(self.blocks, 0)
        self._move = move
        for name, module in self._modules.items():
            move(name, module, HOST)
        _move_others(model, self._modules, device)
        _OFFLOADS[model] = self
        self._model = ref(model)
        self._hooks = Hooks([hook for name in self.blocks for hook in self._watch(name)])

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """While this is open, a block stays on the device; any other module is there anyway."""
        if name not in self._users:
            yield
            return
        self._enter(name)
        try:
            yield
        finally:
            self._leave(name)

    def remove(self) -> None:
        """Ends the traffic; every block stays where it is, in host memory."""
        self._hooks.remove()
        model = self._model()
        if model is not None:
            _OFFLOADS.pop(model, None)

    def _watch(self, name: str) -> tuple[Any, Any]:
        module = self._modules[name]
        return (
            module.register_forward_pre_hook(lambda *_: self._enter(name)),
            module.register_forward_hook(lambda *_: self._leave(name), always_call=True),
        )

    def _enter(self, name: str) -> None:
        if self._users[name] == 0:
            self._move(name, self._modules[name], self.device)
        self._users[name] += 1

    def _leave(self, name: str) -> None:
        self._users[name] -= 1
        if self._users[name] == 0:
            self._move(name, self._modules[name], HOST)


def _move_others(model: nn.Module, blocks: dict[str, nn.Module], device: torch.device) -> None:
    """Moves every parameter and buffer outside the blocks; tied ones stay tied."""
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
