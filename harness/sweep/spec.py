"""What a sweep measures, as data: ``results/specs/sweeps.toml``, changed by what a user asks for."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mqbench.harness.environment import ROOT
from mqbench.harness.errors import RequestError, UnknownNameError
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.record import INTEGER, Cell, canonical_json
from mqbench.harness.sweep.model import SweepModel
from mqbench.harness.sweep.protocol import Shape

SPEC = ROOT / "results" / "specs" / "sweeps.toml"
PAPER, CHECK = "paper", "check"
"""Profiles: the paper's sizes, and small ones for a machine without a GPU."""

METHOD = "sweep"
TASK_PREFIX = "sweep_"

LATENCY, MEMORY, BATCH, TURNS = "latency", "memory", "batch", "turns"
ATTENTION, LINEARS, QUANTIZE = "attention", "linears", "quantize"
SWEEPS: Mapping[str, str] = MappingProxyType(
    {
        LATENCY: "prefill and decoding",
        MEMORY: "memory",
        BATCH: "batches",
        TURNS: "turns of a conversation",
        ATTENTION: "AIFS attention",
        LINEARS: "linear layers",
        QUANTIZE: "quantizing",
    }
)
"""Sweeps with their titles."""


@dataclass(frozen=True)
class AttentionWork:
    """One causal attention: Q, K and V of shape (1, heads, tokens, head_dim)."""

    tokens: int
    heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _check_positive(self, least={"tokens": 30, "heads": 1, "head_dim": 1})  # text around the image takes 29

    @property
    def label(self) -> str:
        return f"{self.tokens} tokens"


@dataclass(frozen=True)
class QuantizeWork:
    """Quantizing a model of random weights.

    Attributes:
        samples: Calibration samples, of one image and random text each.
        image_px: Side of the image.
        text_tokens: Markers included.
        text_before: Of these, before the image.
        bits: VISION/LLM setting.
    """

    samples: int
    image_px: int
    text_tokens: int
    text_before: int
    bits: str

    def __post_init__(self) -> None:
        _check_positive(self, least={"samples": 1})
        parse_bits(self.bits)
        assert self.shape

    @property
    def shape(self) -> Shape:
        """One sample."""
        return Shape(self.image_px, 1, self.text_tokens, self.text_before)

    @property
    def label(self) -> str:
        return f"{self.samples} samples of {self.image_px} px, {self.bits}"


Work = Shape | AttentionWork | QuantizeWork
KINDS: Mapping[str, type] = MappingProxyType({ATTENTION: AttentionWork, QUANTIZE: QuantizeWork})
"""What a sweep's points are; ``Shape`` for all others."""


@dataclass(frozen=True)
class Point:
    """One record to make: some work, done by every system.

    Attributes:
        sweep: A key of ``SWEEPS``.
        work: What is measured; its fields are the record's options.
        systems: By name; the first is the baseline.
        repeats: Timed passes of each.
    """

    sweep: str
    work: Work
    systems: tuple[str, ...]
    repeats: int

    @property
    def task(self) -> str:
        return TASK_PREFIX + self.sweep

    @property
    def label(self) -> str:
        return f"{SWEEPS[self.sweep]}, {self.work.label}"

    def cell(self, model: SweepModel, *, version: str, device: str, dtype: str, seed: int) -> Cell:
        """The settings of its record; ``limit`` counts the timed passes."""
        inputs = canonical_json({"model": model.sha256, **asdict(self.work)})
        return Cell(
            model=model.name,
            weights_sha256=f"random:{seed}",
            recipe=Recipe(METHOD, seed=seed, options={**asdict(self.work), "systems": ",".join(self.systems)}),
            method_version=version,
            task=self.task,
            limit=self.repeats,
            data_sha256=hashlib.sha256(inputs.encode()).hexdigest(),
            calibration=None,
            device=device,
            dtype=dtype,
            batch_size=getattr(self.work, "batch", 1),
            backend=INTEGER,
        )


@cache
def load(path: Path = SPEC) -> Mapping[str, Any]:
    """The whole file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def points_of(
    sweep: str,
    profile: str,
    changes: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    systems: Sequence[str] | None = None,
    repeats: int | None = None,
) -> tuple[Point, ...]:
    """The points of a sweep in the order in which they are measured.

    Args:
        sweep: A key of ``SWEEPS``.
        profile: ``PAPER`` or ``CHECK``.
        changes: Values in place of the file's, by name; with any, only the first table of points is used.
        systems: In place of the file's; their first is the baseline.
        repeats: In place of the file's.

    Raises:
        UnknownNameError: no such sweep, or no such size in it.
        RequestError: a size makes no sense.
    """
    if sweep not in SWEEPS:
        raise UnknownNameError("sweep", sweep, SWEEPS)
    data = load()[profile][sweep]
    kind = KINDS.get(sweep, Shape)
    names = tuple(dict.fromkeys(data["systems"] if systems is None else systems))
    if repeats is not None and repeats < 1:
        raise RequestError(f"--repeats must be at least 1, got {repeats}")
    points = []
    for table in data["points"][: 1 if changes else None]:
        passes = repeats or table.get("repeats", data["repeats"])
        rest = {key: value for key, value in table.items() if key != "repeats"}
        points += [Point(sweep, kind(**one), names, passes) for one in _combinations(kind, {**rest, **changes})]
    return tuple(dict.fromkeys(points))


def _combinations(kind: type, table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    known = {item.name: item.default for item in fields(kind)}
    for name in table:
        if name not in known:
            raise UnknownNameError("size of this sweep", name, known)
    missing = [name for name, default in known.items() if default is MISSING and name not in table]
    if missing:
        raise RequestError(f"{SPEC.name}: a point lacks {', '.join(missing)}")
    lists = [value if isinstance(value, list | tuple) else [value] for value in table.values()]
    return (dict(zip(table, values, strict=True)) for values in product(*lists))


def _check_positive(work: Any, least: Mapping[str, int]) -> None:
    for name, low in least.items():
        if getattr(work, name) < low:
            raise RequestError(f"{name} must be at least {low}, got {getattr(work, name)}")
