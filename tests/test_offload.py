"""Blocks in host memory: at most one at a time is on the device, and nothing else about a model changes.

There is no second device here, so a ledger stands for it: it says where each block is, and hooks on every linear and
every change of a weight ask the ledger.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fakes.sessions import logits
from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.harness import discover
from mqbench.harness.errors import RequestError
from mqbench.harness.quant import linear as linear_module
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.offload import HOST, BlockOffload, on_device
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.request import Request, check_device

DEVICE = torch.device("cpu", 0)
"""Not equal to ``HOST``, but the same memory."""


class Ledger:
    """Where each block is, how often it moved, and how many were on the device at once."""

    def __init__(self) -> None:
        self.resident: set[str] = set()
        self.most = 0
        self.arrivals: dict[str, int] = {}

    def move(self, name: str, _: nn.Module, device: torch.device) -> None:
        if device == HOST:
            self.resident.discard(name)
            return
        self.resident.add(name)
        self.arrivals[name] = self.arrivals.get(name, 0) + 1
        self.most = max(self.most, len(self.resident))


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[nn.Module, BlockOffload, Ledger]]:
    """A tiny model whose linears refuse to run while their block is elsewhere."""
    model, ledger = tiny_model(torch.float32), Ledger()
    offload = BlockOffload(model, tiny_layout(model), DEVICE, ledger.move)
    original = QuantLinear.forward

    def forward(self: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        own = any(self is module for module in model.modules())
        block = next((name for name in offload.blocks if own and self.name.startswith(f"{name}.")), None)
        assert block is None or block in ledger.resident, f"{self.name} runs while its block is in host memory"
        return original(self, x)

    monkeypatch.setattr(linear_module.QuantLinear, "forward", forward)
    yield model, offload, ledger


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "awq", "gptq", "quarot", "mquant"])
def test_quantizing_holds_one_block_at_a_time_and_gives_the_same_model(
    method: str, offloaded: tuple[nn.Module, BlockOffload, Ledger]
) -> None:
    model, offload, ledger = offloaded
    _quantize(model, method)
    assert ledger.most == 1
    assert ledger.arrivals.keys() == set(offload.blocks)
    assert not ledger.resident
    batch = tiny_batch(model, num_images=2, seed=9)
    found = logits(model, batch)
    offload.remove()
    plain = tiny_model(torch.float32)
    _quantize(plain, method)
    assert torch.equal(found, logits(plain, batch))


def test_a_visited_block_arrives_once_for_all_of_its_groups(offloaded: tuple[nn.Module, BlockOffload, Ledger]) -> None:
    """GPTQ replays the LLM's last block for each of its groups; the visit moves it once."""
    model, offload, ledger = offloaded
    _quantize(model, "gptq", bits="w4a16/w4a16")
    assert ledger.arrivals[offload.blocks[-1]] == 1


def test_an_error_inside_a_block_leaves_nothing_behind(offloaded: tuple[nn.Module, BlockOffload, Ledger]) -> None:
    model, offload, ledger = offloaded

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    handle = model.get_submodule(offload.blocks[-1]).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        logits(model, tiny_batch(model))
    handle.remove()
    assert not ledger.resident
    assert torch.isfinite(logits(model, tiny_batch(model))).all()
    assert ledger.most == 1


def test_a_model_that_is_not_offloaded_is_left_alone() -> None:
    model = tiny_model(torch.float32)
    with on_device(model, "model.language_model.layers.0"):
        assert torch.isfinite(logits(model, tiny_batch(model))).all()


def test_an_offloaded_model_can_be_freed() -> None:
    model = tiny_model(torch.float32)
    BlockOffload(model, tiny_layout(model), DEVICE, Ledger().move)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def _batches(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [tiny_batch(model, num_images=1, seed=seed) for seed in (1, 2)]


def _quantize(model: nn.Module, method: str, bits: str | None = None) -> None:
    bits = bits or ("w4a16-g16/w4a16-g16" if method in ("awq", "gptq") else "w4a8/w4a8")
    recipe = Recipe(method, *parse_bits(bits), 0, {})
    discover.find_method(method).quantize(model, tiny_layout(model), recipe, _batches(model))


def test_offload_without_a_gpu_is_refused() -> None:
    with pytest.raises(RequestError, match="leave one out"):
        check_device(Request(offload=True))
