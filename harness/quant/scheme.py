"""What is quantized to how many bits: plain data, shared by all methods."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any

from mqbench.harness.errors import UnknownNameError


class Strategy(StrEnum):
    """Which values share one scale."""

    TENSOR = "tensor"
    MODALITY = "modality"
    TOKEN = "token"
    CHANNEL = "channel"
    GROUP = "group"


class Tokens(StrEnum):
    """Which tokens of the LLM have their activations rounded."""

    ALL = "all"
    VISUAL = "visual"
    TEXT = "text"


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


FLOAT = "float"
FLOAT_BITS = "16"
NAME_PATTERN = re.compile(r"w(?P<weight>[2-8]|16)a(?P<activation>[4-8]|16int|16)(-g(?P<group>[1-9]\d*))?")
GRAMMAR = (
    "write VISION/LLM, each side 'float' or w{2..8|16}a{4..8|16}[-g{N}], where 16 stays floating point, a16int is a "
    "16-bit integer grid and N is the weights' group size: w8a8/w4a8, float/w4a16-g128, w4a4, float/w16a16int"
)


@dataclass(frozen=True)
class Recipe:
    """One quantization of one model: everything that decides its result except the calibration data.

    Attributes:
        method: Registered method name.
        vision: Bit setting (see ``scheme_named``) of patch embedding, vision blocks and projector.
        text: Bit setting of the LLM's linears.
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

    @property
    def label(self) -> str:
        """The method with its options by name, values as JSON: ``mquant`` or ``mquant[aifs=false,rms=false]``."""
        if not self.options:
            return self.method
        return f"{self.method}[{','.join(f'{key}={json.dumps(self.options[key])}' for key in sorted(self.options))}]"


@lru_cache
def scheme_named(name: str) -> Scheme:
    """Reads the bit setting of one tower.

    ``float``, or ``w{2..8|16}a{4..8|16}[-g{N}]``: bits of weights and activations, 16 for a side that stays in floating
    point. Weights have one scale per output channel, with ``-gN`` one per N input channels (a width that N does not
    divide ends in a shorter group). ``a16int`` puts activations on a 16-bit integer grid.

    Raises:
        UnknownNameError: ``name`` is no such setting; the message says how to write one.
    """
    if name == FLOAT:
        return Scheme(None, None)
    match = NAME_PATTERN.fullmatch(name)
    if match is None or (match["group"] and match["weight"] == FLOAT_BITS):
        raise UnknownNameError("bit setting", name, (), GRAMMAR)
    return Scheme(_weights(match["weight"], match["group"]), _activations(match["activation"]))


def parse_bits(text: str) -> tuple[str, str]:
    """Splits ``"w8a8/w4a8-g128"`` into the settings of (vision, LLM); one setting stands for both.

    ``w16a16`` comes back as ``float``, so that one meaning has one name.

    Raises:
        UnknownNameError: a part is no bit setting.
    """
    parts = text.strip().lower().split("/")
    if len(parts) > 2:
        raise UnknownNameError("bit setting", text, (), GRAMMAR)
    names = [FLOAT if scheme_named(part) == Scheme(None, None) else part for part in parts]
    return names[0], names[-1]


def _weights(bits: str, group_size: str | None) -> QuantArgs | None:
    if bits == FLOAT_BITS:
        return None
    if group_size is None:
        return QuantArgs(int(bits), strategy=Strategy.CHANNEL)
    return QuantArgs(int(bits), strategy=Strategy.GROUP, group_size=int(group_size))


def _activations(bits: str) -> QuantArgs | None:
    return None if bits == FLOAT_BITS else QuantArgs(int(bits.removesuffix("int")))
