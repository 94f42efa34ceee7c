"""Generated code of the integer products on sm_80, sm_89 and sm_90, compiled without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mqbench.kernels.gemm_configs import FAMILIES

Case = dict[str, Any]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """All kernels of all capabilities, compiled once, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    worker = Path(__file__).parent / "fakes" / "triton_compile.py"
    result = subprocess.run([sys.executable, str(worker)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def _named(cases: Sequence[Case], *names: str) -> list[Case]:
    found = [case for case in cases if case["name"] in names]
    assert {case["capability"] for case in found} == set(FAMILIES)
    return found


def test_no_register_spills(cases: list[Case]) -> None:
    """A spill lies on the stack. The kernel that is starved of registers shows that one would be seen."""
    assert [case for case in cases if case["name"] != "starved" and case["stack_bytes"] + case["local_bytes"]] == []
    (starved,) = (case for case in cases if case["name"] == "starved")
    assert starved["stack_bytes"] > 0


def test_shared_memory_fits(cases: list[Case]) -> None:
    for case in cases:
        assert case["shared_bytes"] <= FAMILIES[case["capability"]].shared_memory_bytes, case


def test_int8_tensor_cores(cases: list[Case]) -> None:
    """sm_90 multiplies with wgmma, tiles of 16 rows excepted (64 is its smallest); the others with mma.sync."""
    mma = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
    for case in _named(cases, "gemm8", "gemm4"):
        (instruction,) = case["matrix"]
        if case["capability"] < 90:
            assert instruction == mma, case
    hopper = [case["matrix"][0] for case in _named(cases, "gemm8") if case["capability"] == 90]
    assert [name == mma for name in hopper] == [True, False, False, False, True]  # first and last: 16 rows
    assert all(name.startswith("wgmma.") and name.endswith(".s32.s8.s8") for name in hopper[1:-1])


def test_four_bit_operand_comes_from_registers(cases: list[Case]) -> None:
    hopper = [case for case in _named(cases, "gemm4") if case["capability"] == 90]
    assert len(hopper) == 5
    for case in hopper:
        assert case["matrix"][0].startswith("wgmma.") and case["matrix"][0].endswith(".s32.s8.s8"), case
        assert case["registers_first"], case


def test_matrix_products_prefetch(cases: list[Case]) -> None:
    for case in _named(cases, "gemm8", "gemm4"):
        assert case["async_copies"] > 0, case


def test_gemv_uses_dp4a_and_wide_loads(cases: list[Case]) -> None:
    """Layouts change once, for the result: an operand that changed its own would go through shared memory."""
    for case in _named(cases, "gemv8", "gemv4"):
        assert case["dp4a"] > 0 and case["wide_loads"] > 0 and case["layout_conversions"] == 1, case
    for case in _named(cases, "weight_only"):
        assert case["wide_loads"] > 0 and case["layout_conversions"] == 1, case


def test_unpacking_is_wide(cases: list[Case]) -> None:
    for case in _named(cases, "unpack"):
        assert case["wide_loads"] > 0 and case["layout_conversions"] == 0, case
