"""Measures one point: systems are built, warmed up, and timed in turns; what does not fit in memory is split up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from mqbench.harness.bench.worker import DeviceLost
from mqbench.harness.runtime.interface import Runtime
from mqbench.harness.runtime.systems import SYSTEMS, Engine, System
from mqbench.harness.sweep import protocol
from mqbench.harness.sweep.device import clock_of, memory_of
from mqbench.harness.sweep.figures import linear_samples, memory_figures, split_figures
from mqbench.harness.sweep.findings import Entry, Findings
from mqbench.harness.sweep.inputs import decode_ids, make_turns
from mqbench.harness.sweep.model import SweepModel
from mqbench.harness.sweep.outcome import FAILED, OK, OUT_OF_MEMORY, UNAVAILABLE, Outcome, note_of, split_group
from mqbench.harness.sweep.protocol import Shape
from mqbench.harness.sweep.session import run_pass
from mqbench.harness.sweep.spec import LATENCY, LINEARS, MEMORY, Point
from mqbench.harness.sweep.split import Split, split_pass

WARMUP_PASSES = 2
WARMUP_STEPS = 2
"""Decoding steps of a warm-up pass over a single turn."""
EAGER_NOTE = f"{OK}, eagerly: a graph does not span devices"


class Build(Protocol):
    """Makes a runtime with random weights."""

    def __call__(
        self, config: Any, system: System, *, device: torch.device, dtype: torch.dtype, seed: int
    ) -> Runtime: ...


@dataclass(frozen=True)
class Settings:
    """What all points of a run have in common.

    Attributes:
        device: Where inputs go in and logits come out.
        others: Further devices that hold blocks of the LLM.
    """

    device: str
    dtype: str
    seed: int
    model: SweepModel
    others: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        return (self.device, *self.others)


Hints = dict[str, tuple[int, list[tuple[str, ...]]]]
"""Groups of systems that fitted in memory, with the length of the cache; by model and systems."""


def measure_sequences(
    point: Point,
    settings: Settings,
    skip: Mapping[str, str],
    build: Build | None = None,
    hints: Hints | None = None,
) -> Outcome:
    """Measures a point whose work is a ``Shape``.

    Args:
        point: What to measure.
        settings: Device, model and seed.
        skip: Systems to leave out, with the note to keep.
        build: Makes runtimes; by default the real ones.
        hints: What fitted at earlier points; a larger point starts from there. Extended by this one.

    Raises:
        DeviceLost: a system broke the GPU's context; this process can measure no more.
    """
    with torch.inference_mode():
        build = build or partial(build_random, others=settings.others)
        return _Measurer(point, settings, dict(skip), build, {} if hints is None else hints).run()


def build_random(
    config: Any,
    system: System,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    others: Sequence[str] = (),
) -> Runtime:
    """The real runtime, in packed form from the start; the LLM's blocks in equal runs over all devices."""
    from mqbench.harness.runtime.build import build_runtime, spread_blocks
    from mqbench.harness.runtime.family import family_of

    places = spread_blocks(family_of(config).layout(config), [device, *others]) if others else None
    return build_runtime(config, system, device=device, dtype=dtype, seed=seed, device_map=places)


class _Measurer:
    """Everything about one point. Groups of systems are in memory together, one group after the other."""

    def __init__(self, point: Point, settings: Settings, notes: dict[str, str], build: Build, hints: Hints) -> None:
        assert isinstance(point.work, Shape)
        self.hints = hints
        self.point, self.shape, self.settings = point, point.work, settings
        self.build = build
        self.device, self.dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        devices = [torch.device(name) for name in settings.devices]
        self.clock, self.memory = clock_of(*devices), memory_of(*devices)
        self.rules, self.config = settings.model.rules, settings.model.build_config()
        inputs = {"device": self.device, "dtype": self.dtype, "seed": settings.seed}
        self.turns = make_turns(self.shape, self.rules, self.config, **inputs)
        self.token = decode_ids(self.shape.batch, self.config, self.device, settings.seed)
        self.found = Findings(
            point,
            self.rules,
            self.config.to_dict(),
            settings.device,
            notes,
            environment={"l2": self.clock.l2_state},
            used_before=self.memory.used_bytes(),
        )

    def run(self) -> Outcome:
        groups = self._first_groups()
        done: list[tuple[str, ...]] = []
        while groups:
            group = tuple(
                name for name in groups.pop(0) if name not in self.found.notes or self.found.notes[name].startswith(OK)
            )
            if not group or (len(group) == 1 and group[0] in self.found.figures):
                continue
            if self._measure_group(group, number=len(done)):
                done.append(group)
            else:
                groups[:0] = split_group(group)
        self.hints[self._hint_key] = self._size, done
        return self.found.outcome(interleaved=len(done) == 1)

    @property
    def _hint_key(self) -> str:
        return f"{self.point.sweep} {self.settings.model.sha256} {self.point.systems}"

    @property
    def _size(self) -> int:
        """Rows of the KV cache: more of them take more memory."""
        return self.shape.batch * protocol.cache_length(self.shape, self.rules)

    def _first_groups(self) -> list[tuple[str, ...]]:
        """All that can run here together; each alone where the device's memory is what is measured."""
        able = []
        for name in self.point.systems:
            reason = SYSTEMS[name].runs_on(self.device)
            if reason is not None:
                self.found.notes.setdefault(name, f"{UNAVAILABLE}: {reason}")
            elif name not in self.found.notes:
                able.append(name)
        if self.point.sweep == MEMORY:
            return [(name,) for name in able]
        size, groups = self.hints.get(self._hint_key, (0, []))
        known = {name for group in groups for name in group}
        return list(groups) if known == set(able) and size <= self._size else [tuple(able)]

    def _measure_group(self, group: Sequence[str], number: int) -> bool:
        """False when the group does not fit in memory and has to be split; nothing of it is kept then."""
        entries: dict[str, Entry] = {}
        lost = False
        try:
            fits = self._prepare_all(group, entries) and self._time_all(group, entries)
            if fits:
                self.found.keep(entries, number)
            return fits
        except DeviceLost:
            lost = True  # closing would ask the device, and its complaint would hide this one
            raise
        finally:
            if not lost:
                for entry in entries.values():
                    entry.runtime.close()
                entries.clear()
                self.memory.release()

    def _prepare_all(self, group: Sequence[str], entries: dict[str, Entry]) -> bool:
        for name in group:
            note = self._guarded(name, partial(self._prepare, name, entries))
            if not self._goes_on(name, note, group):
                return False
        return True

    def _time_all(self, group: Sequence[str], entries: dict[str, Entry]) -> bool:
        """One untimed round, then the timed ones; who begins changes from round to round."""
        for number in range(self.point.repeats + 1):
            names = list(entries)
            first = number % len(names) if names else 0
            for name in (*names[first:], *names[:first]):
                note = self._guarded(name, partial(self._sample, entries[name], keep=number > 0))
                if not self._goes_on(name, note, group):
                    return False
                if note is not None:
                    entries.pop(name).runtime.close()
        for entry in entries.values():
            self._look_into(entry, alone=len(group) == 1)
        return True

    def _goes_on(self, name: str, note: str | None, group: Sequence[str]) -> bool:
        """Keeps a note; False when a group has to be split."""
        if note is None:
            return True
        if note.startswith(OUT_OF_MEMORY) and len(group) > 1:
            return False
        self.found.notes[name] = note
        return True

    def _guarded(self, name: str, work: Callable[[], Any]) -> str | None:
        """The note of an error, None without one.

        No error is kept: its traceback would hold the memory that the next system needs.

        Raises:
            DeviceLost: the GPU answers no more.
        """
        try:
            work()
            return None
        except Exception as error:  # a system that fails must not end the others; its note says what happened
            note = note_of(error)
        try:
            self.clock.wait()
        except RuntimeError as error:
            raise DeviceLost(name, note.removeprefix(f"{FAILED}: ")) from error
        self.memory.release()
        return note

    def _prepare(self, name: str, entries: dict[str, Entry]) -> None:
        """Builds and warms up; graphs are captured here."""
        system = SYSTEMS[name]
        arguments = {"device": self.device, "dtype": self.dtype, "seed": self.settings.seed}
        runtime, built = self.memory.watch(lambda: self.build(self.config, system, **arguments))
        try:
            _, warm = self.memory.watch(lambda: self._warm_up(runtime))
        except BaseException:
            runtime.close()
            raise
        figures = memory_figures(runtime, built.peak_bytes, built.kept_bytes + warm.peak_bytes)
        note = EAGER_NOTE if self.settings.others and system.engine is not Engine.EAGER else OK
        entries[name] = Entry(name, runtime, figures, note)

    def _warm_up(self, runtime: Runtime) -> None:
        """A single turn is warm after a few steps; later turns need every length they will see."""
        runtime.reserve(self.shape.batch, protocol.cache_length(self.shape, self.rules))
        steps = self.shape.decode_tokens if self.shape.turns > 1 else min(WARMUP_STEPS, self.shape.decode_tokens)
        for _ in range(WARMUP_PASSES):
            run_pass(runtime, self.turns, self.token, steps, self.clock)

    def _sample(self, entry: Entry, keep: bool) -> None:
        if self.point.sweep == LINEARS:
            samples = linear_samples(self._split(entry))
        else:
            times = run_pass(entry.runtime, self.turns, self.token, self.shape.decode_tokens, self.clock)
            samples = times.samples()
        if keep:
            entry.add(samples)

    def _split(self, entry: Entry) -> Split:
        """Kernels of one prefill of the first turn, by part."""

        def run() -> None:
            entry.runtime.prefill(self.turns[0])
            self.clock.wait()

        entry.runtime.reset()
        self.clock.cool()
        self.clock.wait()
        with entry.runtime.instrumented():
            return split_pass(run, self.device, self._vision_tower(entry.runtime))

    def _vision_tower(self, runtime: Runtime) -> Any:
        from mqbench.harness.models.qwen2_vl import qwen2_vl_layout

        root = qwen2_vl_layout(self.config).vision_root
        return runtime.model.get_submodule(root) if root else None

    def _look_into(self, entry: Entry, alone: bool) -> None:
        """Device memory, and the time split of a latency point; without memory for it, there is none."""
        used = self.memory.used_bytes()
        if alone and used is not None:
            entry.figures["device_peak_bytes"] = float(used)
        if self.point.sweep == LATENCY:
            note = self._guarded(entry.name, partial(self._add_split, entry))
            if note is not None:
                entry.note += f", but no time split: {note}"

    def _add_split(self, entry: Entry) -> None:
        entry.figures |= split_figures(self._split(entry))
