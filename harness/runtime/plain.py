"""A model as Transformers runs it, behind the interface of a runtime: what the paper calls PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mqbench.harness.quant.layout import Layout
from mqbench.harness.runtime.family import Family
from mqbench.harness.runtime.fuse import unique_bytes
from mqbench.harness.runtime.interface import MemoryParts, RuntimeInputs
from mqbench.harness.runtime.parts import LLM_ATTENTION, OTHER, VISION_ATTENTION, PartClock, clock, part, part_of
from mqbench.harness.runtime.systems import System


@dataclass(frozen=True)
class PlainPrompt:
    """A prompt with its position ids, (rows, B, T), counted behind what the cache held."""

    inputs: RuntimeInputs
    positions: Tensor


class TransformersRuntime:
    """``interface.Runtime`` over an untouched model, with Transformers' growing cache.

    Args:
        model: The model.
        layout: Its layout.
        family: Its family.
        system: What runs.
        device: Where inputs go in and logits come out.
        places: Other devices, by name of the LLM block that is there.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        family: Family,
        system: System,
        device: torch.device,
        places: Mapping[str, torch.device] | None = None,
    ) -> None:
        self.model: Any = model
        self.layout, self.family, self.system, self.device = layout, family, system, device
        self._cache: Any = None
        self._valid: Tensor | None = None
        self._next: Tensor | None = None
        if places:
            _join(model, layout, places, device)

    def reserve(self, batch_size: int, num_tokens: int) -> None:
        """Empties the cache, which grows by itself."""
        self.reset()

    def prepare(self, inputs: RuntimeInputs) -> PlainPrompt:
        """See ``interface.Runtime``: position ids, as ``generate`` works them out before the model runs."""
        inputs = inputs.to(self.device)
        first = 0 if self._next is None else self._next
        return PlainPrompt(inputs, self.family.text_positions(self.model, inputs) + first)

    @torch.no_grad()
    def prefill(self, inputs: RuntimeInputs | PlainPrompt) -> Tensor:
        """See ``interface.Runtime``."""
        prompt = self.prepare(inputs) if isinstance(inputs, RuntimeInputs) else inputs
        batch = prompt.inputs.as_batch()
        valid = torch.ones_like(prompt.inputs.input_ids) if prompt.inputs.attention_mask is None else None
        valid = prompt.inputs.attention_mask if valid is None else valid
        assert valid is not None
        self._valid = valid if self._valid is None else torch.cat([self._valid, valid], dim=1)
        self._next = (prompt.positions.amax(0) * valid).amax(1, keepdim=True) + 1
        return self._forward(prompt.positions, **batch | {"attention_mask": self._valid})

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """See ``interface.Runtime``."""
        if self._valid is None or self._next is None:
            raise ValueError("nothing was prefilled; call prefill first")
        if tokens.shape != self._valid.shape[:1]:
            raise ValueError(f"tokens must have shape ({len(self._valid)},), got {tuple(tokens.shape)}")
        self._valid = F.pad(self._valid, (0, 1), value=1)
        positions, self._next = self._next.expand(self.family.position_rows, -1, -1), self._next + 1
        return self._forward(positions, input_ids=tokens.to(self.device)[:, None], attention_mask=self._valid)

    def reset(self) -> None:
        """See ``interface.Runtime``; memory is freed."""
        self._cache = self._valid = self._next = None

    def memory(self) -> MemoryParts:
        """See ``interface.Runtime``; activations come and go, so there is no workspace."""
        layers = [] if self._cache is None else self._cache.layers
        kept = [x for layer in layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return MemoryParts(unique_bytes(self.model), sum(x.numel() * x.element_size() for x in kept), 0)

    def part_of(self, name: str) -> str:
        """See ``interface.Runtime``."""
        return part_of(name, self.layout)

    @contextmanager
    def instrumented(self) -> Iterator[PartClock]:
        """See ``interface.Runtime``; rotary embeddings and sums are ``other``."""
        with clock(self.device) as parts, ExitStack() as stack:
            attention = stack.enter_context(_AttentionRanges())
            if self.layout.vision_root is not None:
                attention.watch(self.model.get_submodule(self.layout.vision_root), stack)
            for name, module in self.model.named_modules():
                if not any(module.children()) and self.part_of(name) != OTHER:
                    _time_module(module, self.part_of(name), stack)
            yield parts

    def close(self) -> None:
        """See ``interface.Runtime``."""
        self.reset()
        self.model = nn.Module()

    def _forward(self, positions: Tensor, **batch: Tensor) -> Tensor:
        from transformers import DynamicCache

        if self._cache is None:
            self._cache = DynamicCache(config=self.model.config.get_text_config())
        ids = positions if self.family.position_rows > 1 else positions[0]
        output = self.model(**batch, position_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


def _join(model: nn.Module, layout: Layout, places: Mapping[str, torch.device], device: torch.device) -> None:
    """What a block reads comes to its device, and what follows the last block to ``device``."""
    from accelerate.utils import send_to_device

    def bring(place: torch.device) -> Callable[..., Any]:
        return lambda _, args, kwargs: send_to_device((args, kwargs), place, skip_keys=["past_key_values"])

    assert layout.text.final_norm is not None
    for name, place in {**places, layout.text.final_norm.name: device}.items():
        model.get_submodule(name).register_forward_pre_hook(bring(place), with_kwargs=True)


class _AttentionRanges(TorchFunctionMode):
    """Times calls of torch's attention, as the vision tower's while that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.name = LLM_ATTENTION

    def watch(self, visual: nn.Module, stack: ExitStack) -> None:
        """Follows the vision tower until the stack unwinds."""

        def set_name(name: str) -> Callable[..., None]:
            return lambda *_: setattr(self, "name", name)

        stack.callback(visual.register_forward_pre_hook(set_name(VISION_ATTENTION)).remove)
        stack.callback(visual.register_forward_hook(set_name(LLM_ATTENTION), always_call=True).remove)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with part(self.name):
            return func(*args, **(kwargs or {}))


def _time_module(module: nn.Module, name: str, stack: ExitStack) -> None:
    """Times every call of a module as a part, until the stack unwinds."""
    running: list[AbstractContextManager[None]] = []

    def enter(*_: Any) -> None:
        running.append(part(name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)
