"""Watches a running model for NaN and Inf and names the layer where they start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.errors import NonFiniteError
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.linear import QuantLinear


@contextlib.contextmanager
def finite_outputs(model: nn.Module, layout: Layout) -> Iterator[None]:
    """While this is open, a forward pass whose logits are not finite raises.

    Every linear leaves its smallest and largest output behind, two numbers per call; they are only looked at when the
    logits are bad, so a GPU waits for nothing but the logits themselves. Integers cannot hold NaN or Inf, so a linear
    that runs in integers could make good logits of a bad input: it leaves the ends of its input behind as well, and
    when there is such a linear, all ends are looked at together with the logits.

    Raises:
        NonFiniteError: names the first linear, in order of execution, with NaN or Inf in its input or output.
    """
    extremes: list[tuple[str, Tensor]] = []

    def forget(*_: Any) -> None:
        extremes.clear()

    def check(_: nn.Module, __: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if logits is not None and not (torch.isfinite(logits).all() and hidden_are_finite(logits.device)):
            raise NonFiniteError(_message(extremes))

    def hidden_are_finite(device: torch.device) -> bool:
        if not any(isinstance(module, QuantLinear) and module.integer is not None for module in model.modules()):
            return True
        return bool(torch.stack([torch.isfinite(ends).all().to(device) for _, ends in extremes]).all())

    handles = [model.register_forward_pre_hook(forget), model.register_forward_hook(check)]
    names = (*layout.quantized_linears(), *layout.unquantized)
    handles += [_record_extremes(model.get_submodule(name), name, extremes) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record_extremes(module: nn.Module, name: str, extremes: list[tuple[str, Tensor]]) -> Any:
    def record(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # aminmax propagates NaN and, unlike a sum, cannot overflow.
        if isinstance(module, QuantLinear) and module.integer is not None:
            extremes.append((f"the input of '{name}'", torch.stack(torch.aminmax(args[0].detach()))))
        extremes.append((f"the output of '{name}'", torch.stack(torch.aminmax(output.detach()))))

    return module.register_forward_hook(record)


def _message(extremes: list[tuple[str, Tensor]]) -> str:
    bad = next((name for name, values in extremes if not torch.isfinite(values).all()), None)
    where = bad or "the logits, though in no linear's output"
    return f"NaN or Inf in {where}; check the weights, the dtype and the bits of this layer"
