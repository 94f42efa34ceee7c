"""What is quantized to how many bits: plain data, shared by all methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from mqbench.harness.errors import UnknownNameError


class Strategy(StrEnum):
    """Which values share one scale."""

    TENSOR = "tensor"
    MODALITY = "modality"
    TOKEN = "token"
    CHANNEL = "channel"
    GROUP = "group"


@dataclass(frozen=True)
class QuantArgs:
    """How one tensor is quantized.

    Attributes:
        num_bits: Width of the integer grid, 2 to 16.
        symmetric: Grid centred on zero, no zero point.
        strategy: Which values share a scale.
        group_size: Input channels per scale, for ``Strategy.GROUP`` only.
        dynamic: Scales computed at run time (activations only).
    """

    num_bits: int
    symmetric: bool = True
    strategy: Strategy = Strategy.TENSOR
    group_size: int | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 16:
            raise ValueError(f"num_bits must be 2 to 16, got {self.num_bits}")
        if (self.strategy is Strategy.GROUP) != (self.group_size is not None):
            raise ValueError("group_size belongs to strategy 'group', and only to it")

    @property
    def quant_max(self) -> int:
        """Largest integer level: 2^(b-1) - 1 when symmetric (Eq. 2), else 2^b - 1."""
        return 2 ** (self.num_bits - 1) - 1 if self.symmetric else 2**self.num_bits - 1

    @property
    def quant_min(self) -> int:
        """Smallest integer level: -2^(b-1) when symmetric, else 0."""
        return -(2 ** (self.num_bits - 1)) if self.symmetric else 0


@dataclass(frozen=True)
class Scheme:
    """Weight and activation quantization of one tower; ``None`` keeps that side in floating point."""

    weights: QuantArgs | None
    activations: QuantArgs | None


def _weight(num_bits: int) -> QuantArgs:
    return QuantArgs(num_bits, strategy=Strategy.CHANNEL)


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "float": Scheme(None, None),
        "w8a8": Scheme(_weight(8), QuantArgs(8)),
        "w4a8": Scheme(_weight(4), QuantArgs(8)),
        "w8a16": Scheme(_weight(8), None),
        "w4a16": Scheme(_weight(4), None),
    }
)


@dataclass(frozen=True)
class Recipe:
    """One quantization of one model: everything that decides its result except the calibration data.

    Attributes:
        method: Registered method name.
        vision: Scheme name (a key of ``SCHEMES``) of patch embedding, vision blocks and projector.
        text: Scheme name of the LLM's linears.
        seed: Seed of every random choice (rotation signs).
        options: The method's own switches; a missing key takes the method's default.
    """

    method: str
    vision: str = "float"
    text: str = "float"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vision_scheme(self) -> Scheme:
        return scheme_named(self.vision)

    @property
    def text_scheme(self) -> Scheme:
        return scheme_named(self.text)

    @property
    def bits(self) -> str:
        """The setting as users type it: ``vision/text``."""
        return f"{self.vision}/{self.text}"


def scheme_named(name: str) -> Scheme:
    """Looks up a preset.

    Raises:
        UnknownNameError: ``name`` is no preset.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise UnknownNameError("bit setting", name, SCHEMES) from None


def parse_bits(text: str) -> tuple[str, str]:
    """Splits ``"w8a8/w4a8"`` into (vision, text) preset names; one name stands for both.

    Raises:
        UnknownNameError: a part is no preset.
    """
    parts = text.lower().split("/")
    if len(parts) > 2:
        raise UnknownNameError("bit setting", text, SCHEMES)
    for part in parts:
        scheme_named(part)
    return parts[0], parts[-1]
