"""Integer products in Triton, interpreted where there is no GPU, against the naive references."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mqbench.kernels import dispatch, packing, reference, triton_epilogue, triton_gemm, triton_gemv
from mqbench.kernels.dispatch import Choice, Kernel, choose, choose_weight_only
from mqbench.kernels.gemm_configs import FAMILIES, GemmConfig, GemvConfig, family_of
from mqbench.kernels.triton_unpack import dequantize_int4, unpack_int4_x16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SUM_ORDER = 4
"""Roundings of the largest result."""
Terms = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, or the lowest integer: what a kernel forgets to write shows."""
    plain = torch.empty

    def empty(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        return plain(*size, dtype=dtype, device=device).fill_(poison)

    monkeypatch.setattr(torch, "empty", empty)
    yield


def _levels(generator: torch.Generator, num_bits: int, *shape: int) -> Tensor:
    largest = 2 ** (num_bits - 1)
    return torch.randint(-largest, largest, shape, dtype=torch.int8, generator=generator).to(DEVICE)


def _terms(generator: torch.Generator, num_rows: int, num_out: int, scale_kind: str, full: bool) -> Terms:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    num_scales = {"one": 1, "row": num_rows, "table": 3}[scale_kind]
    index = torch.randint(0, 3, (num_rows,), dtype=torch.uint8, generator=generator).to(DEVICE)
    extra = (normal(num_out).half(), normal(num_rows).bfloat16(), normal(num_out)) if full else (None, None, None)
    scales = normal(num_scales).abs() * 0.02, normal(num_out).abs() * 0.02
    return *scales, index if scale_kind == "table" else None, *extra


def _check_rounding(out: Tensor, truth: Tensor, own: Tensor) -> None:
    """Within twice the error of the reference in the same dtype, which is never less than rounding the truth, and what
    another order of a sum in float32 may add."""
    assert out.isfinite().all()
    own_error = torch.maximum((own.double() - truth).abs(), (truth.to(out.dtype).double() - truth).abs())
    order = SUM_ORDER * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (out.double() - truth).abs().max() <= 2 * own_error.max() + order


def _run(choice: Choice, num_bits: int, x_q: Tensor, w_q: Tensor, terms: Terms, dtype: torch.dtype) -> Tensor:
    if num_bits == 8:
        return dispatch.linear_int8(x_q, w_q, *terms, dtype, choice=choice)
    return dispatch.linear_int4(x_q, packing.pack_int4(w_q), *terms, dtype, choice=choice)


TILE = GemmConfig(16, 32, 32, group_m=2)
CHOICES = (
    (8, Choice(Kernel.GEMM, TILE)),
    (8, Choice(Kernel.GEMM, GemmConfig(16, 16, 32, split_k=2))),
    (8, Choice(Kernel.GEMV, GemvConfig(4, 16))),
    (8, Choice(Kernel.GEMV, GemvConfig(2, 16, split_k=2))),
    (4, Choice(Kernel.FUSED, TILE)),
    (4, Choice(Kernel.FUSED, GemmConfig(16, 16, 32, split_k=2))),
    (4, Choice(Kernel.UNPACK, TILE)),
    (4, Choice(Kernel.GEMV, GemvConfig(4, 16))),
    (4, Choice(Kernel.GEMV, GemvConfig(2, 16, split_k=3))),
)


@pytest.mark.parametrize(("num_bits", "choice"), CHOICES, ids=lambda value: str(getattr(value, "kernel", value)))
@settings(max_examples=12)
@given(data=st.data())
def test_integer_products(num_bits: int, choice: Choice, data: st.DataObject) -> None:
    """The accumulator exactly, and the whole epilogue to rounding, at any shape that the kernel takes."""
    is_gemv = choice.kernel is Kernel.GEMV
    num_rows = data.draw(st.integers(1, 8 if is_gemv else 40), "M")
    num_out = data.draw(st.integers(1, 40), "N")
    step = {8: 4, 4: 8}[num_bits] if is_gemv else {8: 1, 4: 2}[num_bits]
    width = step * data.draw(st.integers(1, 150 // step), "K / step")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    x_q, w_q = _levels(generator, 8, num_rows, width), _levels(generator, num_bits, num_out, width)

    ones = torch.ones(1, device=DEVICE), torch.ones(num_out, device=DEVICE), None, None, None, None
    exact = _run(choice, num_bits, x_q, w_q, ones, torch.float32)  # below 2^24: float32 holds every sum
    assert torch.equal(exact.long(), reference.int_matmul(x_q, w_q))

    terms = _terms(
        generator, num_rows, num_out, data.draw(st.sampled_from(("one", "row", "table"))), data.draw(st.booleans())
    )
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    out = _run(choice, num_bits, x_q, w_q, terms, dtype)
    own = reference.linear_int8(x_q, w_q, *terms, dtype=torch.float32).to(dtype)
    _check_rounding(out, reference.linear_int8(x_q, w_q, *terms), own)


@settings(max_examples=25)
@given(
    num_rows=st.integers(1, 8),
    num_out=st.integers(1, 20),
    words=st.integers(1, 20),
    group_size=st.sampled_from((4, 12, 32, 64, 1000)),
    dtype=st.sampled_from(DTYPES),
    has_zero=st.booleans(),
    words_first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_weight_only(
    num_rows: int,
    num_out: int,
    words: int,
    group_size: int,
    dtype: torch.dtype,
    has_zero: bool,
    words_first: bool,
    seed: int,
) -> None:
    """Matrix-vector kernel and unpacked product; groups that straddle the halves or end early included."""
    generator, width = torch.Generator().manual_seed(seed), 8 * words
    x = torch.randn(num_rows, width, generator=generator).to(DEVICE, dtype)
    packed = packing.pack_int4(_levels(generator, 4, num_out, width))
    scale = torch.rand(num_out, -(-width // group_size), generator=generator).to(DEVICE)
    zero = torch.randint(-8, 8, scale.shape, generator=generator).float().to(DEVICE) if has_zero else None
    bias = torch.randn(num_out, generator=generator).to(DEVICE) if seed % 2 else None
    truth = reference.weight_only_int4(x, packed, scale, zero, group_size, None if bias is None else bias.to(dtype))
    own = reference.weight_only_int4(x, packed, scale, zero, group_size, bias, dtype=torch.float32).to(dtype)
    for choice in (Choice(Kernel.GEMV, GemvConfig(4, 16)), Choice(Kernel.UNPACK)):
        with patch.object(triton_gemv, "WORDS_FIRST", words_first):
            out = dispatch.weight_only_int4(x, packed, scale, zero, group_size, bias, choice)
        _check_rounding(out, truth, own)


@settings(max_examples=20)
@given(num_out=st.integers(1, 9), half=st.integers(1, 40), seed=st.integers(0, 9))
def test_unpacking(num_out: int, half: int, seed: int) -> None:
    """Both the word and the byte path; and the dequantized weight, bit by bit."""
    generator = torch.Generator().manual_seed(seed)
    levels = _levels(generator, 4, num_out, 2 * half)
    packed = packing.pack_int4(levels)
    assert torch.equal(unpack_int4_x16(packed), 16 * levels)
    scale = torch.rand(num_out, 2, generator=generator).to(DEVICE)
    zero = torch.full_like(scale, -3)
    expected = ((levels.float() + 3) * scale[:, torch.arange(2 * half) // half]).half()
    assert torch.equal(dequantize_int4(packed, scale, zero, half, torch.float16), expected)


@pytest.mark.parametrize("kernel", ["int8_gemm", "int4_gemm", "int8_gemv", "int4_gemv"])
def test_largest_sums_do_not_overflow(kernel: str) -> None:
    """-128 * -128, or 16 * -8 * -128, along all of K = 18944 stays in int32."""
    width, is_int4 = 18944, kernel.startswith("int4")
    x_q = torch.full((2, width), -128, dtype=torch.int8, device=DEVICE)
    w_q = torch.full((3, width), -8 if is_int4 else -128, dtype=torch.int8, device=DEVICE)
    out = torch.full((2, 3), float("nan"), device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    epilogue = triton_epilogue.Epilogue(one, torch.ones(3, device=DEVICE), None, None, None, None)
    module, config = (
        (triton_gemm, GemmConfig(16, 16, 512)) if kernel.endswith("gemm") else (triton_gemv, GemvConfig(4, 512))
    )
    getattr(module, kernel)(x_q, packing.pack_int4(w_q) if is_int4 else w_q, epilogue, out, config)
    assert torch.equal(out, torch.full_like(out, 128 * (8 if is_int4 else 128) * width))


def test_weight_that_starts_amid_a_word() -> None:
    generator = torch.Generator().manual_seed(0)
    x_q, storage = _levels(generator, 8, 2, 16), _levels(generator, 8, 1, 3 * 16 + 1)[0]
    w_q = storage[1:].view(3, 16)
    ones = torch.ones(1, device=DEVICE), torch.ones(3, device=DEVICE), None, None, None, None
    out = _run(Choice(Kernel.GEMV, GemvConfig(4, 16)), 8, x_q, w_q, ones, torch.float32)
    assert torch.equal(out.long(), reference.int_matmul(x_q, w_q))


@pytest.mark.parametrize(("num_rows", "num_out"), [(0, 5), (3, 0)])
def test_nothing_to_multiply(num_rows: int, num_out: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_q, w_q = _levels(generator, 8, num_rows, 8), _levels(generator, 4, num_out, 8)
    terms = _terms(generator, num_rows, num_out, "one", full=False)
    assert dispatch.linear_int8(x_q, w_q, *terms, torch.float16).shape == (num_rows, num_out)
    packed = torch.zeros(num_out, 4, dtype=torch.uint8, device=DEVICE)
    assert dispatch.linear_int4(x_q, packed, *terms, torch.float16).shape == (num_rows, num_out)
    scale = torch.ones(num_out, 1, device=DEVICE)
    assert dispatch.weight_only_int4(x_q.half(), packed, scale, None, 8, None).shape == (num_rows, num_out)


def test_no_columns_is_bias_alone() -> None:
    """K = 0: an empty sum, on the kernel that the table chooses."""
    x_q, w_q = torch.zeros(2, 0, dtype=torch.int8, device=DEVICE), torch.zeros(3, 0, dtype=torch.int8, device=DEVICE)
    terms = (
        torch.ones(1, device=DEVICE),
        torch.ones(3, device=DEVICE),
        None,
        torch.arange(3.0, device=DEVICE),
        None,
        None,
    )
    out = dispatch.linear_int8(x_q, w_q, *terms, torch.float32, choice=choose(2, 3, 0, 8, (9, 0)))
    assert out.tolist() == [[0.0, 1.0, 2.0]] * 2


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@given(
    num_rows=st.integers(0, 20000),
    num_out=st.integers(1, 160000),
    width=st.integers(0, 15000).map(lambda half: 2 * half),
)
def test_choice_fits_its_kernel(capability: tuple[int, int], num_rows: int, num_out: int, width: int) -> None:
    for num_bits in (4, 8):
        choice = choose(num_rows, num_out, width, num_bits, capability)
        assert choice == choose(num_rows, num_out, width, num_bits, capability)
        assert choice.config is not None and choice.config.split_k in (1, 2, 4, 8, 16)
        if choice.kernel is Kernel.GEMV:
            assert num_rows <= triton_gemv.MAX_ROWS and (width * num_bits // 8) % triton_gemv.WORD_BYTES == 0
        else:
            assert isinstance(choice.config, GemmConfig)
            assert (num_bits == 4) == (choice.kernel in (Kernel.FUSED, Kernel.UNPACK))
    weight_only = choose_weight_only(num_rows, num_out, width, 128, capability)
    assert (weight_only.kernel is Kernel.GEMV) == (num_rows <= 8 and width > 0 and width % 8 == 0)


def test_choice_at_real_shapes() -> None:
    """Qwen2-VL-7B's down_proj on an H100: which path each M takes."""
    kernels = [choose(m, 3584, 18944, 4, (9, 0)).kernel for m in (1, 4, 5, 64, 1023, 1024, 16384)]
    assert kernels == ["gemv", "gemv", "fused", "fused", "fused", "unpack", "unpack"]
    few_tiles = choose(16, 3584, 18944, 4, (9, 0)).config
    assert few_tiles is not None and few_tiles.split_k == 2  # 56 tiles of 132 SMs


def test_capabilities() -> None:
    assert [family_of(c) for c in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        80,
        89,
        80,
        89,
        90,
        80,
        89,
    ]
    with pytest.raises(ValueError, match=r"capability must be at least 8.0 \(Ampere\), got 7.5"):
        choose(1, 8, 8, 8, (7, 5))
    with pytest.raises(ValueError, match="num_bits must be 4 or 8, got 3"):
        choose(1, 8, 8, 3, (9, 0))
    assert all(table[-1][0] > 1 << 60 for f in FAMILIES.values() for table in (f.int8, f.int4))
