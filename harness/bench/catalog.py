"""Everyone who is timed, by name. Nothing heavy is imported: reports need the names only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Rate(StrEnum):
    """Which measured peak bounds the arithmetic of a contender."""

    NONE = ""
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


@dataclass(frozen=True)
class Info:
    """A contender for people: its title, whose it is, and the unit that computes it."""

    title: str
    ours: bool
    rate: Rate = Rate.NONE


CONTENDERS: Mapping[str, Info] = MappingProxyType(
    {
        "copy": Info("copy", False),
        "bf16_matmul": Info("BF16 matrix product (torch)", False, Rate.BF16),
        "int8_matmul": Info("int8 matrix product (torch._int_mm)", False, Rate.INT8),
        "int8_linear": Info("int8 matrix product (ours)", True, Rate.INT8),
        "fp8_matmul": Info("FP8 matrix product (torch._scaled_mm)", False, Rate.FP8),
        "bf16": Info("BF16", False, Rate.BF16),
        "w8a8": Info("W8A8", True, Rate.INT8),
        "w8a8_dynamic": Info("W8A8, separate per-token quantization", True, Rate.INT8),
        "w4a8": Info("W4A8", True, Rate.INT8),
        "w4a8_fused": Info("W4A8, always fused", True, Rate.INT8),
        "w4a8_unpack": Info("W4A8, always unpacked", True, Rate.INT8),
        "w4a16": Info("W4A16-g128", True, Rate.BF16),
        "fp8": Info("FP8 (torch._scaled_mm)", False, Rate.FP8),
        "int_mm": Info("torch._int_mm, no epilogue", False, Rate.INT8),
        "tinygemm": Info("W4A16-g128 (tinygemm)", False, Rate.BF16),
        "torchao": Info("W8A8 dynamic (torchao)", False, Rate.INT8),
        "gemlite": Info("W8A8 dynamic (gemlite)", False, Rate.INT8),
        "memcpy": Info("memcpy", False),
        "hadamard": Info("Hadamard", True),
        "hadamard_static": Info("Hadamard + static int8", True),
        "hadamard_token": Info("Hadamard + per-token int8", True),
        "torch_hadamard": Info("Hadamard (torch stages)", False),
        "fast_hadamard": Info("fast-hadamard-transform", False),
        "static": Info("fused static int8", True),
        "token": Info("fused per-token int8", True),
        "unfused_static": Info("BF16, then static int8", True),
        "unfused_token": Info("BF16, then per-token int8", True),
        "causal": Info("causal attention", False, Rate.BF16),
        "causal_flash": Info("causal attention (flash)", False, Rate.BF16),
        "causal_cudnn": Info("causal attention (cuDNN)", False, Rate.BF16),
        "aifs": Info("AIFS attention", True, Rate.BF16),
        "aifs_unpermute": Info("AIFS attention, unpermute", True, Rate.BF16),
        "aifs_flex": Info("AIFS attention, flex", True, Rate.BF16),
        "aifs_triton": Info("AIFS attention, triton", True, Rate.BF16),
    }
)
"""Everyone who is timed, by name. Names are keys of records."""

UNAVAILABLE, WRONG, FAILED = "unavailable", "wrong", "failed"
"""How notes begin that say why a contender was not timed: not here, another result, an error."""
