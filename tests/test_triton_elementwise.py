"""Quantizing kernels in Triton, interpreted where there is no GPU, against the CPU operations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakes.poison import poison_fresh_memory
from mqbench.kernels import api, cpu, ops, reference, triton_elementwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHARE = 0.02
"""Of the levels may differ by one, where exp, erf or a sum rounds otherwise; one level always may."""

rows = st.sampled_from([0, 1, 2, 3, 7])
widths = st.integers(1, 40) | st.sampled_from([64, 127, 128, 129, 300])
dtypes = st.sampled_from(DTYPES)
bits = st.sampled_from([4, 8])
strategies = st.sampled_from(["tensor", "index", "token"])
seeds = st.integers(0, 999)
some = settings(max_examples=25)
# numpy, under the interpreter, tells of infinities that are meant
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|underflow):RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks, so that short rows take several; and fresh memory that shows what a kernel forgets to write."""
    monkeypatch.setattr(triton_elementwise, "PIECE_BLOCK", 32)
    monkeypatch.setattr(triton_elementwise, "MAX_ROW_BLOCK", 128)
    monkeypatch.setattr(triton_elementwise, "LOOP_BLOCK", 64)
    poison_fresh_memory(monkeypatch)
    yield


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, gain: float = 3.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * gain).to(DEVICE, dtype)


def scales(seed: int, num_rows: int, strategy: str) -> tuple[Tensor | None, Tensor | None]:
    """Static scale and row index; (None, None) per token."""
    generator = torch.Generator().manual_seed(seed)
    if strategy == "token":
        return None, None
    if strategy == "tensor":
        return (torch.rand(1, generator=generator) + 0.01).to(DEVICE), None
    index = torch.randint(0, 3, (num_rows,), generator=generator, dtype=torch.uint8)
    return (torch.rand(3, generator=generator) + 0.01).to(DEVICE), index.to(DEVICE)


def expected_of(name: str, *args: Any) -> Any:
    """The CPU operation on copies of the arguments."""
    return getattr(cpu, name)(*(a.cpu() if isinstance(a, Tensor) else a for a in args))


def check_quantized(found: Tensor, row_scale: Tensor, expected: Tensor, expected_scale: Tensor, y_ulp: float) -> None:
    """Row scales within ``y_ulp`` of the CPU's; levels at most one off, in `SHARE` of all."""
    assert found.dtype == torch.int8 and found.shape == expected.shape
    assert row_scale.dtype == torch.float32 and row_scale.shape == expected_scale.shape
    torch.testing.assert_close(row_scale.cpu(), expected_scale, rtol=2 * y_ulp, atol=0)
    off = (found.cpu().int() - expected.int()).abs()
    assert off.numel() == 0 or int(off.max()) <= 1
    assert int(off.sum()) <= max(1, SHARE * off.numel())


OURS = [name for name, module in ops.CUDA_MODULES.items() if module.endswith(("triton_elementwise", "triton_hadamard"))]


@pytest.mark.parametrize("name", OURS)
def test_launchers_take_the_arguments_of_their_operation(name: str) -> None:
    """``ops`` passes them by position."""
    schema = getattr(torch.ops.mqbench, name).default._schema
    launcher = getattr(import_module(ops.CUDA_MODULES[name]), name)
    assert list(inspect.signature(launcher).parameters) == [argument.name for argument in schema.arguments]


# --- quantization alone is exact


@given(rows, widths, dtypes, bits, strategies, seeds)
@some
def test_levels_equal_those_of_the_cpu(
    m: int, k: int, dtype: torch.dtype, num_bits: int, strategy: str, seed: int
) -> None:
    x = random(seed, m, k, dtype=dtype)
    if m > 2:
        x[1] = 0
    scale, index = scales(seed, m, strategy)
    if scale is None:
        levels, row_scale = triton_elementwise.quantize_token(x, num_bits)
        expected, expected_scale = expected_of("quantize_token", x, num_bits)
        assert torch.equal(row_scale.cpu(), expected_scale)
    else:
        levels = triton_elementwise.quantize_static(x, scale, index, num_bits)
        expected = expected_of("quantize_static", x, scale, index, num_bits)
    assert torch.equal(levels.cpu(), expected)


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=30),
    st.floats(2.0**-149, 2.0**127, width=32),
    bits,
)
@settings(max_examples=80)
def test_any_float_over_any_scale(values: list[float], scale: float, num_bits: int) -> None:
    """The quotient of five operations rounds as a division does: subnormals, infinities and NaN included."""
    x = torch.tensor([values], device=DEVICE)
    table = torch.tensor([scale], device=DEVICE)
    levels = triton_elementwise.quantize_static(x, table, None, num_bits)
    assert torch.equal(levels.cpu(), reference.quantize_static(x.cpu(), table.cpu(), None, num_bits))


@given(st.floats(2.0**-100, 2.0**60, width=32), st.integers(-129, 128))
@settings(max_examples=80)
def test_ties_and_their_neighbours(scale: float, level: int) -> None:
    """Where one unit in the last place decides the level."""
    table = torch.tensor([scale])
    tie = (level + 0.5) * table
    x = torch.stack((tie, tie.nextafter(torch.tensor(torch.inf)), tie.nextafter(torch.tensor(-torch.inf)))).T
    levels = triton_elementwise.quantize_static(x.to(DEVICE).contiguous(), table.to(DEVICE), None, 8)
    assert torch.equal(levels.cpu(), reference.quantize_static(x, table, None, 8))


def test_halves_round_to_even_and_ends_are_clamped() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 100.0, -100.0, torch.inf, -torch.inf, torch.nan]], device=DEVICE)
    levels = triton_elementwise.quantize_static(x, torch.ones(1, device=DEVICE), None, 4)
    assert levels.tolist() == [[0, 2, 2, 0, -2, 7, 7, -8, 7, -8, 0]]


@pytest.mark.parametrize("width", [2, 200])
def test_a_nan_shows_in_the_row_scale(width: int) -> None:
    """A maximum of floats would lose it."""
    x = torch.ones(3, width, device=DEVICE)
    x[0] = 0
    x[1, width // 2] = torch.nan
    scale = triton_elementwise.quantize_token(x, 8)[1].cpu()
    assert scale[0] == 1 and scale[1].isnan() and scale[2] == 1 / torch.tensor(127.0)


# --- fused


@given(rows, widths, dtypes, bits, strategies, st.booleans(), st.booleans(), seeds)
@some
def test_rms_norm(
    m: int, k: int, dtype: torch.dtype, num_bits: int, strategy: str, has_weight: bool, has_residual: bool, seed: int
) -> None:
    x = random(seed, m, k, dtype=dtype)
    weight = random(seed + 1, k, dtype=dtype) if has_weight else None
    residual = random(seed + 2, m, k, dtype=dtype) if has_residual else None
    args = (x, weight, 1e-6, *scales(seed, m, strategy), residual, num_bits)
    levels, row_scale, total = triton_elementwise.rms_norm_quantize(*args)
    expected, expected_scale, expected_total = expected_of("rms_norm_quantize", *args)
    assert torch.equal(total.cpu(), expected_total)
    check_quantized(levels, row_scale, expected, expected_scale, torch.finfo(dtype).eps)


@given(rows, widths, dtypes, bits, strategies, seeds)
@some
def test_silu_mul(m: int, k: int, dtype: torch.dtype, num_bits: int, strategy: str, seed: int) -> None:
    gate, up = random(seed, m, k, dtype=dtype), random(seed + 1, m, k, dtype=dtype)
    args = (gate, up, *scales(seed, m, strategy), num_bits)
    found = triton_elementwise.silu_mul_quantize(*args)
    check_quantized(*found, *expected_of("silu_mul_quantize", *args), torch.finfo(dtype).eps)


@given(rows, widths, st.sampled_from(api.GELU_KINDS), dtypes, bits, strategies, seeds)
@some
def test_gelu(m: int, k: int, kind: str, dtype: torch.dtype, num_bits: int, strategy: str, seed: int) -> None:
    args = (random(seed, m, k, dtype=dtype), kind, *scales(seed, m, strategy), num_bits)
    found = triton_elementwise.gelu_quantize(*args)
    expected = args[0].cpu(), kind, *(None if a is None else a.cpu() for a in args[2:4]), num_bits
    # the reference rounds once, at the end, as the kernel does; torch's quick GELU has an operation more
    check_quantized(*found, *reference.gelu_quantize(*expected), torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", api.GELU_KINDS)
def test_gelu_of_large_inputs(kind: str) -> None:
    """Far out GELU is x or 0: no overflow on the way, infinities included."""
    x = torch.tensor([[-1e30, -3e4, -200.0, 100.0, 127.0, 3e4, 1e30, torch.inf]], device=DEVICE)
    levels, _ = triton_elementwise.gelu_quantize(x, kind, torch.ones(1, device=DEVICE), None, 8)
    assert levels.tolist() == [[0, 0, 0, 100, 127, 127, 127, 127]]


def test_silu_of_large_inputs() -> None:
    gate = torch.tensor([[-1e30, -200.0, 100.0, 3e4]], device=DEVICE)
    ones = torch.ones_like(gate)
    levels, _ = triton_elementwise.silu_mul_quantize(gate, ones, torch.ones(1, device=DEVICE), None, 8)
    assert levels.tolist() == [[0, 0, 100, 127]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["tensor", "token"])
def test_no_columns(dtype: torch.dtype, strategy: str) -> None:
    x = torch.zeros(3, 0, dtype=dtype, device=DEVICE)
    levels, row_scale = triton_elementwise.silu_mul_quantize(x, x, *scales(0, 3, strategy), 8)
    assert levels.shape == (3, 0)
    assert row_scale.tolist() == ([1.0] * 3 if strategy == "token" else [])


def test_blocks_cover_rows_of_models() -> None:
    """Real block sizes: one block up to the limit, a loop beyond; 16 values or more per thread."""
    assert triton_elementwise.row_block(100) == 128
    assert triton_elementwise.row_block(129) == 64
    assert triton_elementwise.num_warps(2048) == 4
    assert triton_elementwise.num_warps(1 << 20) == triton_elementwise.MAX_WARPS
