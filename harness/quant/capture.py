"""Block-by-block execution over the calibration batches: what reaches each linear, with everything before it rounded.

Only one block runs at a time; between blocks the hidden states of all batches are kept, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mqbench.harness.errors import CalibrationError, NonFiniteError
from mqbench.harness.quant.activation import all_finite
from mqbench.harness.quant.layout import Block, Tower
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.offload import on_device
from mqbench.harness.quant.session import Session

OnRows = Callable[[Tensor], None]
"""Receives (N, in_features) rows: a linear's prepared input of one batch without padding."""

Replay = Callable[[OnRows], None]
"""Runs the calibration data up to one group of linears and hands over its rows, batch by batch."""

Visit = Callable[[tuple[str, ...], Replay], None]
"""What to do with a group of linears that share one input."""

VisitBlock = Callable[[Block, "Sequence[Call]"], None]
"""What to do with a block, given its calls in all calibration batches."""


class _Reached(Exception):
    """Ends a forward pass early, once what it was run for has been seen."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, with the modality context that was valid then."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    visual: Tensor | None
    valid: Tensor | None

    def with_hidden(self, hidden: Tensor) -> Call:
        """The same call on other hidden states."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs=self.kwargs | {"hidden_states": hidden})


@torch.no_grad()
def capture_calls(session: Session, name: str) -> list[Call]:
    """The call of module ``name`` in each calibration batch; the forward pass stops there.

    Batches that never call it (no image) are left out. Key/value caches are dropped, so that a replay starts anew.
    """
    calls: list[Call] = []
    context = session.context

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, _without_cache(kwargs), context.visual, context.valid))
        raise _Reached

    handle = session.model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True)
    with _removing(handle):
        _run_batches(session)
    return calls


@torch.no_grad()
def run_block(session: Session, name: str, call: Call) -> Tensor:
    """The hidden states that block ``name`` (or a part of one) returns for a captured call."""
    session.context.visual, session.context.valid = call.visual, call.valid
    output = session.model.get_submodule(name)(*call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def part_calls(session: Session, block: str, part: str, calls: Sequence[Call]) -> list[Call]:
    """The calls of module ``part`` inside ``block``, one for each call of the block; the pass stops there."""
    seen: list[Call] = []

    def record(call: Call, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(replace(call, args=args, kwargs=_without_cache(kwargs)))
        raise _Reached

    for call in calls:
        handle = session.model.get_submodule(part).register_forward_pre_hook(partial(record, call), with_kwargs=True)
        with _removing(handle):
            _until_reached(partial(run_block, session, block, call))
    session.context.clear()
    return seen


@contextmanager
def collect_rows(session: Session, name: str, on_rows: OnRows, stop: bool = False) -> Iterator[None]:
    """While open, every call of linear ``name`` hands its prepared input (transformed, x0 zeroed) to ``on_rows``.

    Padded rows are left out. With ``stop`` the forward pass ends there (``_Reached``).

    Raises:
        NonFiniteError: from the forward pass, when a row holds NaN or Inf.
    """
    linear, context = session.linears[name], session.row_context(name)

    def record(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows = prepared_rows(linear, args[0])
        if context is not None and context.valid is not None:
            rows = rows[context.valid.reshape(-1)]
        if not all_finite(rows):
            raise NonFiniteError(f"the input of '{name}' holds NaN or Inf; check the weights and the dtype")
        if len(rows):
            on_rows(rows)
        if stop:
            raise _Reached

    with _removing(linear.register_forward_pre_hook(record)):
        yield


def prepared_rows(linear: QuantLinear, x: Tensor) -> Tensor:
    """(N, in_features) rows that multiply the linear's weight, before quantization."""
    prepared = linear.weight_input(x)
    return prepared.reshape(-1, prepared.shape[-1])


def visit_groups(session: Session, visit: Visit) -> None:
    """Visits every group of linears with a weight scheme, in pipeline order.

    Patch embedding; vision blocks, each as {qkv} -> out -> {fc1} -> fc2; projector; LLM blocks, each as
    {q, k, v} -> o -> {gate, up} -> down. A group's rows come from the model as it is at the time of the visit: whatever
    earlier visits rounded is in effect.
    """
    layout = session.layout
    if layout.patch_embed is not None:
        _visit_alone(session, layout.patch_embed, visit)
    if layout.vision is not None:
        _visit_tower(session, layout.vision, visit)
    for name in layout.projector:
        _visit_alone(session, name, visit)
    _visit_tower(session, layout.text, visit)


def visit_blocks(session: Session, tower: Tower, visit: VisitBlock) -> None:
    """Visits the blocks of a tower in order of execution; none when the tower's weights stay in floating point.

    Each block's calls come from the model as it is once the blocks before it were visited. Only one block's inputs
    are kept at a time.
    """
    names = [name for block in tower.blocks for name in block.linears]
    if not names or all(session.scheme(name).weights is None for name in names):
        return
    calls = capture_calls(session, tower.blocks[0].name)
    for block in tower.blocks:
        with on_device(session.model, block.name):
            visit(block, calls)
        if block is not tower.blocks[-1]:
            calls = [call.with_hidden(run_block(session, block.name, call)) for call in calls]
    session.context.clear()


def block_replay(session: Session, block: Block, name: str, calls: Sequence[Call]) -> Replay:
    """Hands over the rows of linear ``name`` of a block, given the block's calls."""
    return partial(_replay_block, session, block.name, name, calls)


def block_groups(session: Session, block: Block) -> list[tuple[str, ...]]:
    """The linears of a block that share one input; a linear with its own transform or RMS split stands alone."""
    groups: list[tuple[str, ...]] = []
    for names in block.groups:
        linears = [session.linears[name] for name in names]
        shared = all(linear.input_transform is None and linear.x0_weight is None for linear in linears)
        groups += [names] if shared else [(name,) for name in names]
    return groups


def _visit_alone(session: Session, name: str, visit: Visit) -> None:
    if session.scheme(name).weights is not None:
        visit((name,), partial(_replay_model, session, name))


def _visit_tower(session: Session, tower: Tower, visit: Visit) -> None:
    def visit_block(block: Block, calls: Sequence[Call]) -> None:
        for group in block_groups(session, block):
            visit(group, block_replay(session, block, group[0], calls))

    visit_blocks(session, tower, visit_block)


def _replay_model(session: Session, name: str, on_rows: OnRows) -> None:
    with collect_rows(session, name, on_rows, stop=True):
        _run_batches(session)


def _replay_block(session: Session, block: str, name: str, calls: Sequence[Call], on_rows: OnRows) -> None:
    if not calls:
        raise CalibrationError(f"no calibration sample reaches '{name}'; add samples with images")
    with collect_rows(session, name, on_rows, stop=True):
        for call in calls:
            _until_reached(partial(run_block, session, block, call))


@torch.no_grad()
def _run_batches(session: Session) -> None:
    for batch in session.batches:
        _until_reached(partial(session.model, **batch))
    session.context.clear()


def _until_reached(run: Callable[[], Any]) -> None:
    try:
        run()
    except _Reached:
        return


def _without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    dropped = {"past_key_values": None, "past_key_value": None, "use_cache": False}
    return {key: dropped.get(key, value) for key, value in kwargs.items()}


@contextmanager
def _removing(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
