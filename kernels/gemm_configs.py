"""Which tile sizes a product takes, as data; no Triton, no GPU needed to read it.

**None of these figures was measured.** They follow from the sizes of registers and shared memory (all of them compile
without spills), from counting instructions, and from the number of programs that fill a GPU. A run of
`mqbench bench kernels` on a GPU is what may change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class GemmConfig:
    """A tile of tensor-core work. ``block_k`` counts bytes of a row of the weight."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class GemvConfig:
    """Rows of the weight per program, and the 32-bit words of each that one step reads."""

    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4


@dataclass(frozen=True)
class Family:
    """What the tables need to know of GPUs that share instructions and limits."""

    num_sms: int
    shared_memory_bytes: int
    int8: tuple[tuple[int, GemmConfig], ...]
    int4: tuple[tuple[int, GemmConfig], ...]


ANY_M = 1 << 62
"""The bound of a table's last line. Every table is (largest M, tile) in ascending order."""

GEMV_MAX_M: Mapping[int, int] = MappingProxyType({8: 4, 4: 4, 16: 8})
"""Largest M of the matrix-vector kernels, by kind: W8A8, W4A8, W4A16 (counted as 16). At M = 8 `dp4a` (64 per clock and
SM) would take as long as reading 4-bit weights does, hence half of that; floating-point weights have no better path."""

UNPACK_MIN_M: Mapping[int, int] = MappingProxyType({80: 1024, 89: 1024, 90: 1024})
"""W4A8 from this M on unpacks into memory first: the fused kernel unpacks once per tile row, so twice the rows, twice
the unpacking."""

GEMV_BLOCK_N: tuple[tuple[int, int], ...] = ((1, 4), (8, 2))
"""(largest M, rows of the weight per program): accumulators are M times these per word and must fit the registers."""

GEMV_BLOCK_K = 512
"""128 threads that read 16 bytes each."""

FAMILIES: Mapping[int, Family] = MappingProxyType(
    {
        80: Family(
            num_sms=108,
            shared_memory_bytes=163 << 10,
            int8=(
                (16, GemmConfig(16, 64, 128, num_stages=4)),
                (64, GemmConfig(64, 64, 128, num_stages=4)),
                (256, GemmConfig(64, 128, 128, num_stages=4)),
                (ANY_M, GemmConfig(128, 256, 64, num_warps=8, num_stages=4)),
            ),
            int4=(
                (16, GemmConfig(16, 64, 128, num_stages=4)),
                (32, GemmConfig(32, 64, 128, num_stages=4)),
                (64, GemmConfig(64, 64, 64, num_stages=4)),
                (ANY_M, GemmConfig(128, 128, 64, num_warps=8, num_stages=4)),
            ),
        ),
        89: Family(
            num_sms=142,
            shared_memory_bytes=99 << 10,
            int8=(
                (16, GemmConfig(16, 64, 128, num_stages=4)),
                (64, GemmConfig(64, 64, 128, num_stages=4)),
                (256, GemmConfig(64, 128, 128, num_stages=3)),
                (ANY_M, GemmConfig(128, 128, 128, num_warps=8, num_stages=3)),
            ),
            int4=(
                (16, GemmConfig(16, 64, 128, num_stages=4)),
                (32, GemmConfig(32, 64, 128, num_stages=3)),
                (64, GemmConfig(64, 64, 64, num_stages=4)),
                (ANY_M, GemmConfig(128, 128, 64, num_warps=8, num_stages=3)),
            ),
        ),
        90: Family(
            num_sms=132,
            shared_memory_bytes=227 << 10,
            int8=(
                (16, GemmConfig(16, 64, 128, num_stages=5)),
                (64, GemmConfig(64, 64, 128, num_stages=5)),
                (256, GemmConfig(64, 128, 128, num_stages=5)),
                (ANY_M, GemmConfig(128, 256, 128, num_warps=8, num_stages=4)),
            ),
            int4=(
                (16, GemmConfig(16, 64, 128, num_stages=5)),
                (32, GemmConfig(32, 64, 128, num_stages=5)),
                (64, GemmConfig(64, 64, 128, num_stages=4)),
                (ANY_M, GemmConfig(128, 128, 64, num_warps=8, num_stages=4)),
            ),
        ),
    }
)
"""Tiles by compute capability (major * 10 + minor). ``num_sms`` is an A100's, an L40S's and an H100's."""

OLDEST_CAPABILITY = 80
LARGE_SHARED_MEMORY = (100, 103, 110)
"""Newer GPUs with as much shared memory as an A100; the rest have an L40S's. Their own int8 instructions, where they
have any, are beyond what Triton emits, and `mma.sync` runs on all of them."""


def family_of(capability: tuple[int, int]) -> int:
    """The key of ``FAMILIES`` for a compute capability.

    Raises:
        ValueError: below 8.0.
    """
    value = 10 * capability[0] + capability[1]
    if value < OLDEST_CAPABILITY:
        raise ValueError(f"capability must be at least 8.0 (Ampere), got {capability[0]}.{capability[1]}")
    if value in FAMILIES:
        return value
    return OLDEST_CAPABILITY if value == 87 or value in LARGE_SHARED_MEMORY else 89
