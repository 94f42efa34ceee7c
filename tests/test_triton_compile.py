"""Generated code of the kernels on sm_80, sm_89 and sm_90, compiled without a GPU."""

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


def _compiled(worker: str, cache: Path) -> list[Case]:
    """What a program of `fakes` prints, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    program = Path(__file__).parent / "fakes" / worker
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """All kernels of integer products, of all capabilities, compiled once."""
    return _compiled("triton_compile.py", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def row_cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Hadamard and quantizing kernels at widths of models."""
    return _compiled("triton_compile_rows.py", tmp_path_factory.mktemp("triton"))


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


def test_rows_spill_nothing_but_at_the_largest_width(row_cases: list[Case]) -> None:
    """A row of 18944 in one program lacks 28 registers of 255 at most."""
    for case in row_cases:
        allowed = 112 if case.get("width") == 18944 else 0
        assert case["stack_bytes"] + case["local_bytes"] <= allowed, case


def test_plans_know_the_shared_memory_of_their_rows(row_cases: list[Case]) -> None:
    """Or a launch fails on the device: bound and device both hold."""
    for case in row_cases:
        limit = FAMILIES[case["capability"]].shared_memory_bytes
        assert case["shared_bytes"] <= min(case.get("bound_bytes", limit), limit), case


def test_hadamard_uses_tensor_cores_and_prefetches(row_cases: list[Case]) -> None:
    for case in _named(row_cases, "hadamard"):
        assert case["matrix"], case
        assert case["async_copies"] > 0 or case["capability"] < 90, case
    hopper = [case for case in row_cases if case["name"] == "hadamard" and case.get("width", 0) > 1280]
    assert all(any("wgmma" in name for name in c["matrix"]) for c in hopper if c["capability"] == 90)


def test_elementwise_kernels_load_16_bytes_at_once(row_cases: list[Case]) -> None:
    for case in _named(row_cases, "static", "token", "rms_norm"):
        assert case["wide_loads"] > 0, case
