"""Measures one case: every contender is checked, then all are timed in turns, then checked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mqbench.harness.bench.attention import attention
from mqbench.harness.bench.catalog import FAILED, UNAVAILABLE, WRONG
from mqbench.harness.bench.contender import Check, Contender, Makers, Unavailable, WrongResult
from mqbench.harness.bench.fusion import fusion
from mqbench.harness.bench.hadamard import hadamard
from mqbench.harness.bench.linear import linear
from mqbench.harness.bench.peaks import peaks
from mqbench.harness.bench.spec import PEAKS, Case
from mqbench.harness.bench.timing import Replay, Timer, timer_for
from mqbench.harness.bench.worker import DeviceLost

TASKS: Mapping[str, Callable[[Case, torch.device], Makers]] = MappingProxyType(
    {
        PEAKS: peaks,
        "kernel_linear": linear,
        "kernel_hadamard": hadamard,
        "kernel_fusion": fusion,
        "kernel_attention": attention,
    }
)

MAX_NOTE_CHARACTERS = 300


@dataclass(frozen=True)
class Timed:
    """One contender's figures.

    Attributes:
        times_ms: Every sample, milliseconds per call.
        ratio: Median over the rounds of the baseline's time over this one's.
        check: Before it was timed.
        bytes: Read and written at least.
        ops: Arithmetic operations.
    """

    times_ms: tuple[float, ...]
    ratio: float
    check: Check
    bytes: int
    ops: int

    @property
    def median_ms(self) -> float:
        return median(self.times_ms)

    @property
    def iqr_ms(self) -> float:
        """Interquartile range."""
        low, _, high = quantiles(self.times_ms, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True)
class Measurement:
    """One case.

    Attributes:
        baseline: Whom ratios compare with.
        timed: Figures by contender.
        notes: Why the others were not timed, by contender: ``unavailable``, ``wrong`` or ``failed``, and the reason.
    """

    baseline: str
    timed: Mapping[str, Timed]
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Ready:
    contender: Contender
    check: Check
    replay: Replay
    times_ms: list[float] = field(default_factory=list)


def measure(
    case: Case, device: str, rounds: int, sample_ms: float, skip: Mapping[str, str] = MappingProxyType({})
) -> Measurement:
    """Checks and times all contenders of a case.

    Args:
        case: The shape.
        device: As torch names it.
        rounds: Samples of each; in a round everyone has a turn, so that clocks and heat are the same for all.
        sample_ms: Time of a sample.
        skip: Contenders to leave out, with the note to keep.

    Raises:
        WrongResult: the baseline could not be timed, so that there is no ratio.
        DeviceLost: a contender broke the GPU's context; this process can measure no more.
    """
    place = torch.device(device)
    notes: dict[str, str] = dict(skip)
    with torch.inference_mode():
        makers = TASKS[case.task](case, place)
        baseline = next(iter(makers))
        wanted = {name: make for name, make in makers.items() if name not in skip}
        ready = _prepared(wanted, timer_for(place, sample_ms), place, notes)
        _need(baseline, ready, notes)
        _time(list(ready.items()), rounds, place)
        _drop_wrong(ready, notes)
    _need(baseline, ready, notes)
    reference = ready[baseline].times_ms
    return Measurement(baseline, {name: _timed(entry, reference) for name, entry in ready.items()}, notes)


def _prepared(makers: Makers, timer: Timer, device: torch.device, notes: dict[str, str]) -> dict[str, _Ready]:
    """Everyone who passes the check, ready to be timed; the others get a note."""
    ready: dict[str, _Ready] = {}
    for name, make in makers.items():
        try:
            contender = make()
            check = _checked(contender)
            ready[name] = _Ready(contender, check, timer.prepare(contender))
        except Exception as error:  # anything may come from other people's libraries; the note says what
            notes[name] = _note(name, error, device)
    return ready


def _need(baseline: str, ready: Mapping[str, _Ready], notes: Mapping[str, str]) -> None:
    if baseline not in ready:
        raise WrongResult(f"{baseline}: {notes[baseline]}")


def _drop_wrong(ready: dict[str, _Ready], notes: dict[str, str]) -> None:
    """Those whose last timed result is no longer right get a note in place of times."""
    for name, entry in list(ready.items()):
        again = entry.contender.check(entry.replay.result)
        if not again.ok:
            notes[name] = f"{WRONG}: right at first, then an error of {again.error:.3g}, limit {again.limit:.3g}"
            del ready[name]


def _checked(contender: Contender) -> Check:
    """Judges a second result, in memory that held NaN where the first one stood."""
    _poison(contender.run(*contender.inputs), contender.inputs)
    check = contender.check(contender.run(*contender.inputs))
    if not check.ok:
        raise WrongResult(f"error {check.error:.3g}, limit {check.limit:.3g}")
    return check


def _poison(result: Any, inputs: Sequence[Any]) -> None:
    """Overwrites a result, unless it is an input: NaN, or the lowest integer."""
    own = {value.data_ptr() for value in inputs if isinstance(value, Tensor)}
    for x in result if isinstance(result, tuple) else (result,):
        if x.numel() and x.data_ptr() not in own:
            x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min)


def _time(entries: Sequence[tuple[str, _Ready]], rounds: int, device: torch.device) -> None:
    """One untimed round, then ``rounds`` more; who begins changes from round to round."""
    for number in range(rounds + 1):
        first = number % len(entries)
        for name, entry in (*entries[first:], *entries[:first]):
            try:
                time_ms = entry.replay.sample()
            except RuntimeError as error:
                raise DeviceLost(name, _one_line(error)) from error
            if number:
                entry.times_ms.append(time_ms)


def median_ratio(reference: Sequence[float], times: Sequence[float]) -> float:
    """Median over the rounds of the reference's time over the other's in the same round."""
    return median(base / own for base, own in zip(reference, times, strict=True))


def _timed(entry: _Ready, reference: Sequence[float]) -> Timed:
    times, contender = tuple(entry.times_ms), entry.contender
    return Timed(times, median_ratio(reference, times), entry.check, contender.bytes, contender.ops)


def _note(name: str, error: Exception, device: torch.device) -> str:
    """What a record keeps of an error.

    Raises:
        DeviceLost: the GPU's context is gone, and with it this process.
    """
    text = _one_line(error)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as lost:
            raise DeviceLost(name, text) from lost
    kind = {Unavailable: UNAVAILABLE, WrongResult: WRONG}.get(type(error), FAILED)
    return f"{kind}: {text}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, Unavailable | WrongResult)
    return (text if known else f"{type(error).__name__}: {text}")[:MAX_NOTE_CHARACTERS]
