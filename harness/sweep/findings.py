"""What is known of a point while its systems are measured, and the outcome that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from mqbench.harness.runtime.interface import Runtime
from mqbench.harness.runtime.systems import SYSTEMS
from mqbench.harness.sweep import protocol
from mqbench.harness.sweep.figures import HEADLINES, TIMED, TOTAL, launch_gap
from mqbench.harness.sweep.outcome import OK, Outcome, merged, note_of, ratio, summary
from mqbench.harness.sweep.peaks import measured_peaks, peak_metrics
from mqbench.harness.sweep.protocol import ImageRules, Shape
from mqbench.harness.sweep.roofline import Peaks, decode_limit_ms, prefill_limit_ms
from mqbench.harness.sweep.spec import MEMORY, Point


@dataclass
class Entry:
    """A system in memory with its samples."""

    name: str
    runtime: Runtime
    figures: dict[str, float]
    note: str = OK
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, samples: Mapping[str, Sequence[float]]) -> None:
        for name, values in samples.items():
            self.samples.setdefault(name, []).extend(values)


@dataclass
class Findings:
    """One point's figures by system.

    Attributes:
        point: What is measured; its work is a ``Shape``.
        rules: The model's image preprocessor.
        config: The model's configuration.
        device: Where it runs, as the user named it.
        notes: ``ok`` or why not, by system.
        environment: What the record says of the device besides.
        used_before: Bytes in use on the device before the first system.
    """

    point: Point
    rules: ImageRules
    config: Mapping[str, Any]
    device: str
    notes: dict[str, str]
    environment: dict[str, object]
    used_before: int | None
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, list[float]]]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    @cached_property
    def peaks(self) -> Peaks | None:
        """None where no limit is shown, or peaks could not be measured: times are kept without them."""
        try:
            return measured_peaks(self.device)
        except Exception as error:  # whatever it is, it must not cost the times of this point; the record names it
            self.environment["peaks"] = note_of(error)
            return None

    @property
    def shape(self) -> Shape:
        assert isinstance(self.point.work, Shape)
        return self.point.work

    @property
    def timed(self) -> str:
        """The figure that ratios compare."""
        return TIMED.get(self.point.sweep, TOTAL)

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def keep(self, entries: Mapping[str, Entry], number: int) -> None:
        """Takes over what a group of systems, which were in memory together, came to.

        Args:
            entries: By system; the first of the point is the baseline of the ratios.
            number: Of the group.
        """
        baseline = entries.get(self.point.systems[0])
        for name, entry in entries.items():
            self.figures.setdefault(name, {**entry.figures, "group": float(number)})
            self.samples.setdefault(name, []).append(entry.samples)
            self.notes[name] = entry.note
            if baseline is not None and self.point.sweep != MEMORY:
                found = ratio(baseline.samples.get(self.timed, ()), entry.samples.get(self.timed, ()))
                if found is not None:
                    self.ratios.setdefault(name, found)

    def outcome(self, interleaved: bool) -> Outcome:
        """What the record keeps; ``interleaved`` says whether all systems took turns in one group."""
        metrics = {**protocol.figures(self.shape, self.rules), "interleaved": float(interleaved)}
        if self.used_before is not None:
            metrics["device_before_bytes"] = float(self.used_before)
        arrays: dict[str, tuple[float, ...]] = {}
        scores: dict[str, float] = {}
        for name in self.point.systems:
            if name not in self.figures:
                continue
            samples = merged(self.samples[name])
            arrays |= {f"{name}.{figure}": values for figure, values in samples.items()}
            metrics |= summary(name, samples) | self._figures(name)
            if self._on_gpu:  # an operation on the CPU is no launch
                metrics |= launch_gap(name, metrics)
            scores[name] = metrics[f"{name}.{HEADLINES.get(self.point.sweep, TOTAL)}"]
        metrics |= peak_metrics(self.peaks) if scores and self._on_gpu else {}
        notes = {name: self.notes[name] for name in self.point.systems if name in self.notes}
        return Outcome(metrics, arrays, notes, scores, self.environment)

    def _figures(self, name: str) -> dict[str, float]:
        """What was looked at once, the ratio and the limits."""
        found = dict(self.figures[name])
        if name in self.ratios:
            found["ratio"] = self.ratios[name]
        if self.peaks is not None:
            arguments = (self.shape, self.rules, self.config, SYSTEMS[name], self.peaks)
            limits = {"limit_ms": prefill_limit_ms(*arguments)}
            if self.shape.decode_tokens:
                limits["decode_limit_ms"] = decode_limit_ms(*arguments)
            found |= {key: value for key, value in limits.items() if value is not None}
        return {f"{name}.{figure}": value for figure, value in found.items()}
