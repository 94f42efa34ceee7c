"""Hadamard transforms in Triton, interpreted where there is no GPU, against the CPU operations and float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakes.poison import poison_fresh_memory
from mqbench.kernels import cpu, hadamard_plan, reference, triton_hadamard
from mqbench.kernels.hadamard import padded_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHARE = 0.02
"""Of the levels may differ by one, where two sums of floats round to different sides; one level always may."""

rows = st.sampled_from([0, 1, 2, 3, 5])
# one and two tiles, with and without additions, padded; no program (1 to 144); rows and then a pass (320, 640)
widths = st.sampled_from([1, 2, 8, 12, 29, 37, 64, 144, 148, 256, 300, 320, 512, 560, 640, 1024, 1280, 1776])
dtypes = st.sampled_from(DTYPES)
bits = st.sampled_from([4, 8])
strategies = st.sampled_from(["tensor", "index", "token"])
seeds = st.integers(0, 999)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_fresh_memory(monkeypatch)
    yield


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(DEVICE, dtype)


def scales(seed: int, num_rows: int, strategy: str) -> tuple[Tensor | None, Tensor | None]:
    """Static scale and row index; (None, None) per token."""
    generator = torch.Generator().manual_seed(seed)
    if strategy == "token":
        return None, None
    if strategy == "tensor":
        return (torch.rand(1, generator=generator) + 0.05).to(DEVICE), None
    index = torch.randint(0, 3, (num_rows,), generator=generator, dtype=torch.uint8)
    return (torch.rand(3, generator=generator) + 0.05).to(DEVICE), index.to(DEVICE)


def check_transform(found: Tensor, x: Tensor) -> None:
    """Within twice the error of the CPU operation in the same dtype, which is never less than rounding the truth."""
    assert found.dtype == x.dtype and found.shape == (len(x), padded_size(x.shape[1]))
    if not x.numel():
        return
    truth, own = reference.hadamard(x.cpu()), cpu.hadamard(x.cpu())
    own_error = torch.maximum((own.double() - truth).abs(), (truth.to(x.dtype).double() - truth).abs())
    assert (found.cpu().double() - truth).abs().max() <= 2 * own_error.max()


def check_quantized(args: tuple[Any, ...]) -> None:
    """Exactly what the CPU makes of the kernel's own transform; beside the CPU's, `SHARE` of levels are one off."""
    x, scale, row_index, take_x0, num_bits = (a.cpu() if isinstance(a, Tensor) else a for a in args)
    levels, row_scale, x0 = (t.cpu() for t in triton_hadamard.hadamard_quantize(*args))
    y = triton_hadamard.hadamard(args[0]).cpu()
    assert torch.equal(x0, y[:, 0] if take_x0 else y.new_empty(0).to(x.dtype))
    y[:, 0] *= not take_x0
    same = cpu.quantize_token(y, num_bits) if scale is None else (cpu.quantize_static(y, scale, row_index, num_bits),)
    assert torch.equal(levels, same[0])
    assert torch.equal(row_scale, same[1] if scale is None else torch.empty(0))
    expected = cpu.hadamard_quantize(x, scale, row_index, take_x0, num_bits)[0]
    off = (levels.int() - expected.int()).abs()
    assert off.numel() == 0 or int(off.max()) <= 1
    assert int(off.sum()) <= max(1, SHARE * off.numel())


@given(rows, widths, dtypes, seeds)
@settings(max_examples=50)
def test_transform(m: int, k: int, dtype: torch.dtype, seed: int) -> None:
    x = random(seed, m, k, dtype=dtype)
    check_transform(triton_hadamard.hadamard(x), x)


@given(rows, widths, dtypes, bits, strategies, st.booleans(), seeds)
@settings(max_examples=40)
def test_quantized(m: int, k: int, dtype: torch.dtype, num_bits: int, strategy: str, take_x0: bool, seed: int) -> None:
    check_quantized((random(seed, m, k, dtype=dtype), *scales(seed, m, strategy), take_x0, num_bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [256, 300, 1280])
def test_passes_where_shared_memory_is_small(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results through memory as in one program."""
    monkeypatch.setattr(triton_hadamard, "SHARED_BYTES", 0)
    x = random(0, 3, width, dtype=dtype)
    assert not triton_hadamard._plan(x).fused
    check_transform(triton_hadamard.hadamard(x), x)
    check_quantized((x, None, None, True, 8))


def test_integers_are_exact() -> None:
    """Sums of small integers fit float32, and a power of four divides exactly: no rounding anywhere."""
    for dtype in (torch.float16, torch.float32):
        x = torch.randint(-8, 9, (3, 1024), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        truth = reference.hadamard(x.cpu())
        assert torch.equal(triton_hadamard.hadamard(x).cpu(), truth.to(dtype))


@pytest.mark.parametrize(("width", "num_rows"), [(3584, 3), (4304, 1), (13696, 1), (14336, 2), (18944, 3)])
def test_widths_of_models(width: int, num_rows: int) -> None:
    x = random(width, num_rows, width, dtype=torch.float16)
    y, own = triton_hadamard.hadamard(x).cpu(), cpu.hadamard(x.cpu())
    torch.testing.assert_close(y, own, rtol=torch.finfo(x.dtype).eps, atol=1e-4)  # another last bit where sums differ
    check_quantized((x, *scales(0, num_rows, "index"), True, 8))


def test_a_nan_reaches_every_channel_and_the_row_scale() -> None:
    x = random(0, 2, 256)
    x[1, 7] = torch.nan
    levels, scale, _ = triton_hadamard.hadamard_quantize(x, None, None, False, 8)
    assert scale[0].isfinite() and scale[1].isnan()
    assert levels[0].any()
    levels, _, x0 = triton_hadamard.hadamard_quantize(x, torch.ones(1, device=DEVICE), None, True, 8)
    assert not levels[1].any() and x0[1].isnan()


def test_zero_rows_have_scale_one() -> None:
    levels, scale, x0 = triton_hadamard.hadamard_quantize(torch.zeros(2, 300, device=DEVICE), None, None, True, 8)
    assert scale.tolist() == [1, 1] and x0.tolist() == [0, 0] and not levels.any()


def test_channel_0_does_not_count_for_its_row_scale() -> None:
    """Equal inputs: all of the row is in channel 0, and nothing is left to scale."""
    x = torch.full((1, 256), 3.0, device=DEVICE)
    levels, scale, x0 = triton_hadamard.hadamard_quantize(x, None, None, True, 8)
    assert x0.tolist() == [48] and scale.tolist() == [1] and not levels.any()
    levels, scale, _ = triton_hadamard.hadamard_quantize(x, None, None, False, 8)
    assert levels[0, 0] == 127 and not levels[0, 1:].any()


def test_signs_are_cached_per_device_and_padded() -> None:
    signs = triton_hadamard._signs((12, 2), 32, True, torch.device(DEVICE))
    assert torch.equal(signs[:24, :24].cpu(), torch.from_numpy(hadamard_plan.signs((12, 2)).T.copy()))
    assert not signs[24:].any() and not signs[:, 24:].any()
    assert triton_hadamard._signs((12, 2), 32, True, torch.device(DEVICE)) is signs
