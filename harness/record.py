"""One result and the settings that made it: frozen data with a strict JSON form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from mqbench.harness.errors import RecordError
from mqbench.harness.quant.scheme import Recipe

SCHEMA_VERSION = 3
"""Version of the JSON form of a ``Record``; raised when a field is added, renamed or changes its meaning."""

ADDED_FIELDS: Mapping[int, Mapping[str, Any]] = MappingProxyType({2: {"arrays": {}, "prompts_sha256": ""}})
"""Fields that a version brought, with what they are in older records."""


class Status(StrEnum):
    OK = "ok"
    FAILED = "failed"


class Backend(StrEnum):
    """How quantized layers were computed: floating point on the integer grid, integer kernels, or some of each."""

    SIMULATED = "simulated"
    REAL = "real"
    MIXED = "mixed"


SIMULATED, INTEGER = "simulated", "integer"
"""Backends that a user can ask for."""


@dataclass(frozen=True)
class CalibrationInfo:
    """Which samples set the static scales.

    Attributes:
        dataset: Where they come from, as ``--calib-split`` and the task names say.
        split: Its split.
        num_samples: How many.
        seed: Seed of the draw.
        sha256: Hash of the samples' content (images, prompts, answers).
    """

    dataset: str
    split: str
    num_samples: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class Cell:
    """One model under one recipe on one benchmark, with every setting that can change the result.

    Attributes:
        model: Registered model name.
        weights_sha256: Fingerprint of the weights folder.
        recipe: The quantization; method ``none`` for the float baseline.
        method_version: Version that the method declares; raised when its results change.
        task: Benchmark name in VLMEvalKit's spelling.
        limit: Evaluated rows at most, or None for all.
        data_sha256: Hash of the rows evaluated.
        calibration: None when the method needs none.
        device: Kind of device: ``cpu`` or the GPU's name.
        dtype: Floating-point type, as torch spells it.
        batch_size: Prompts per forward pass (it changes the order of floating-point sums).
        backend: What was asked for, ``simulated`` or ``integer``; the JSON form leaves ``simulated`` out, so that keys
            from before there was a choice stay as they are.
    """

    model: str
    weights_sha256: str
    recipe: Recipe
    method_version: str
    task: str
    limit: int | None
    data_sha256: str
    calibration: CalibrationInfo | None
    device: str
    dtype: str
    batch_size: int
    backend: str = SIMULATED

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON: equal exactly when every setting is equal."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()

    @property
    def label(self) -> str:
        """For progress lines and messages."""
        return f"{self.model} {self.recipe.label} {self.recipe.bits} {self.task}"

    def to_json(self) -> dict[str, Any]:
        calibration = None if self.calibration is None else asdict(self.calibration)
        shallow = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.backend == SIMULATED:
            del shallow["backend"]
        return shallow | {"recipe": recipe_to_json(self.recipe), "calibration": calibration}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """The inverse of ``to_json``.

        Raises:
            RecordError: a field is missing, unknown or of the wrong type.
        """
        data = {"backend": SIMULATED} | dict(data) if isinstance(data, Mapping) else data
        _check_fields("cell", data, cls)
        calibration = data["calibration"]
        if calibration is not None:
            _check_fields("calibration", calibration, CalibrationInfo)
            calibration = CalibrationInfo(**calibration)
        return cls(**{**data, "recipe": recipe_from_json(data["recipe"]), "calibration": calibration})


@dataclass(frozen=True)
class Sample:
    """One evaluated row: its index in the benchmark, the model's answer, and its score (None when only sums exist)."""

    index: str
    prediction: str
    score: float | None


@dataclass(frozen=True)
class Record:
    """The outcome of one cell; what tables are made of.

    Attributes:
        cell: The settings.
        status: ``ok`` or ``failed``.
        reason: Why it failed, on one line; empty when ok.
        score: The benchmark's headline figure on its own scale; None when failed.
        metrics: Every figure that the evaluator gave, by name.
        samples: One entry per evaluated row.
        arrays: Series of numbers for figures, by name.
        prompts_sha256: Hash of the prompts as the model got them; empty where there are none, or none was kept.
        environment: See ``environment.describe``.
        backend: How it was computed. That of an ok record is ``simulated`` exactly when its cell's is.
        started_at: ISO 8601, UTC.
        duration_s: Evaluation of this cell, without loading and quantizing.
        quantize_s: Quantization of the model, shared by all cells of the same model and recipe.
        schema_version: Version of this form.
    """

    cell: Cell
    status: Status
    started_at: str
    duration_s: float
    reason: str = ""
    score: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    arrays: Mapping[str, Sequence[float]] = field(default_factory=dict)
    prompts_sha256: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    backend: Backend = Backend.SIMULATED
    quantize_s: float = 0.0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status is Status.OK and (self.score is None or not math.isfinite(self.score)):
            raise RecordError(f"{self.cell.label}: an ok record needs a finite score, got {self.score}")
        if self.status is Status.FAILED and not self.reason:
            raise RecordError(f"{self.cell.label}: a failed record needs a reason")

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    def to_json(self) -> dict[str, Any]:
        shallow = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            "schema_version": self.schema_version,
            "key": self.cell.key,
            **shallow,
            "cell": self.cell.to_json(),
            "metrics": dict(self.metrics),
            "samples": [asdict(sample) for sample in self.samples],
            "arrays": {name: list(values) for name, values in self.arrays.items()},
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of ``to_json``.

        Raises:
            RecordError: written by a newer version, or a field is missing, unknown, of the wrong type, or does not
                fit the stored key.
        """
        data = _upgraded(data)
        _check_fields("record", data, cls, extra={"key"})
        rest = {name: value for name, value in data.items() if name != "key"}
        record = cls(**{**rest, **_parsed_fields(rest)})
        if record.cell.key != data["key"]:
            raise RecordError(f"{record.cell.label}: the stored key does not fit the settings; was the file edited?")
        return record


def canonical_json(data: Any) -> str:
    """Sorted keys, no spaces, no NaN: equal data gives equal text.

    Raises:
        RecordError: the data holds NaN or Inf, or something JSON has no form for.
    """
    try:
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecordError(f"cannot be written as JSON: {error}") from error


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    shallow = {item.name: getattr(recipe, item.name) for item in fields(recipe)}
    return shallow | {"options": dict(recipe.options)}


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    _check_fields("recipe", data, Recipe)
    return Recipe(**{**data, "options": dict(data["options"])})


def _parsed_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields whose Python form differs from their JSON form."""
    try:
        return {
            "cell": Cell.from_json(data["cell"]),
            "status": Status(data["status"]),
            "backend": Backend(data["backend"]),
            "samples": tuple(Sample(**sample) for sample in data["samples"]),
        }
    except (TypeError, ValueError) as error:
        raise RecordError(f"not a valid record: {error}") from error


def _upgraded(data: Mapping[str, Any]) -> dict[str, Any]:
    """A record of any known version in today's form."""
    version = data.get("schema_version")
    if not isinstance(version, int):
        raise RecordError("not a valid record: 'schema_version' is missing")
    if version > SCHEMA_VERSION:
        raise RecordError(
            f"written by a newer mqbench (schema {version}, this one reads up to {SCHEMA_VERSION}); upgrade mqbench"
        )
    added = [fields for since, fields in ADDED_FIELDS.items() if since > version]
    filled = {name: value for fields in added for name, value in fields.items()} | dict(data)
    return filled | {"schema_version": SCHEMA_VERSION}


_JSON_TYPES: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    {
        "str": str,
        "int": int,
        "float": (int, float),
        "int | None": (int, type(None)),
        "float | None": (int, float, type(None)),
        "Status": str,
        "Backend": str,
        "Sequence[Sample]": list,
    }
)
"""JSON types by annotation; anything else is an object or null."""


def _check_fields(what: str, data: Any, kind: type, extra: frozenset[str] | set[str] = frozenset()) -> None:
    """Every field of ``kind`` is there with the right JSON type, and nothing else is."""
    if not isinstance(data, Mapping):
        raise RecordError(f"not a valid record: '{what}' is {type(data).__name__}, not an object")
    expected = {item.name: str(item.type) for item in fields(kind)}
    missing = sorted((expected.keys() | extra) - data.keys())
    unknown = sorted(data.keys() - expected.keys() - extra)
    if missing or unknown:
        raise RecordError(
            f"not a valid record: {what} lacks {missing or 'nothing'}, has unknown {unknown or 'nothing'}"
        )
    for name, annotation in expected.items():
        allowed = _JSON_TYPES.get(annotation, (Mapping, type(None)))
        if not isinstance(data[name], allowed) or (isinstance(data[name], bool)):
            raise RecordError(f"not a valid record: {what}.{name} is {data[name]!r}, expected {annotation}")
