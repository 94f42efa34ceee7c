"""The quantized operations on the CPU against naive references, and what they say about wrong arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mqbench.kernels import api, cpu, ops, reference
from mqbench.kernels.hadamard import padded_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MEANS = 1e-6
"""What half a rounding of the double-precision comparison itself may add."""

rows = st.sampled_from([0, 1, 2, 7, 33])
widths = st.sampled_from([1, 3, 10, 28, 37, 64, 148])
bits = st.integers(2, 8)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 1000)
some = settings(max_examples=25, deadline=None)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, gain: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * gain).to(dtype)


def random_levels(seed: int, *shape: int, num_bits: int = 8) -> Tensor:
    """Both ends of the grid come up, so that the largest products do."""
    largest = 2 ** (num_bits - 1)
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-largest, largest, shape, generator=generator, dtype=torch.int8)
    ends = torch.randint(0, 4, shape, generator=generator)
    return levels.masked_fill(ends == 0, -largest).masked_fill(ends == 1, largest - 1)


def scales(seed: int, num_rows: int, strategy: str) -> tuple[Tensor | None, Tensor | None]:
    """Static scale and row index; (None, None) per token."""
    generator = torch.Generator().manual_seed(seed)
    if strategy == "token":
        return None, None
    if strategy == "tensor":
        return torch.rand(1, generator=generator) + 0.01, None
    index = torch.randint(0, 3, (num_rows,), generator=generator, dtype=torch.uint8)
    return torch.rand(3, generator=generator) + 0.01, index


strategies = st.sampled_from(["tensor", "index", "token"])


# --- quantization is exact


@given(rows, widths, dtypes, bits, strategies, seeds)
@some
def test_levels_equal_those_of_numpy(
    m: int, k: int, dtype: torch.dtype, num_bits: int, strategy: str, seed: int
) -> None:
    x = random(seed, m, k, dtype=dtype)
    x[: m // 2, 0] = 0
    if m > 2:
        x[1] = 0
    scale, index = scales(seed, m, strategy)
    if scale is None:
        found, expected = api.quantize_token(x, num_bits), reference.quantize_token(x, num_bits)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])
    else:
        found, expected = (module.quantize_static(x, scale, index, num_bits) for module in (api, reference))
        assert torch.equal(found, expected)


def test_halves_round_to_even_and_ends_are_clamped() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 100.0, -100.0, torch.inf, -torch.inf, torch.nan]])
    levels = api.quantize_static(x, torch.ones(1), num_bits=4)
    assert levels.tolist() == [[0, 2, 2, 0, -2, 7, 7, -8, 7, -8, 0]]


def test_a_row_of_zeros_has_scale_one_and_a_nan_shows_in_the_scale() -> None:
    levels, scale = api.quantize_token(torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [1.0, -2.0]]))
    assert levels[0].tolist() == [0, 0]
    assert scale[0] == 1
    assert scale[1].isnan()
    assert scale[2] == 2 / torch.tensor(127.0)


# --- fused quantization: as close to the truth as the dtype allows


def assert_fused(
    levels: Tensor,
    row_scale: Tensor,
    truth: Tensor,
    same_dtype: Tensor,
    scale: Tensor | None,
    index: Tensor | None,
    b: int,
) -> None:
    """Levels stand for values within half a level of the truth, but for twice the reference's own error."""
    assert levels.dtype == torch.int8
    assert len(row_scale) == (len(levels) if scale is None else 0)
    used = row_scale if scale is None else scale.expand(len(levels)) if index is None else scale[index.long()]
    used = used.double()[:, None]
    own_error = (same_dtype.double() - truth).abs().amax() if truth.numel() else torch.zeros(())
    largest = 2 ** (b - 1)
    clamped = truth.clamp(-largest * used, (largest - 1) * used)
    assert ((levels * used - clamped).abs() <= 0.5 * used * (1 + MEANS) + 2 * own_error + 1e-12).all()


@given(rows, widths, dtypes, bits, strategies, st.booleans(), st.booleans(), seeds)
@some
def test_rms_norm(
    m: int, k: int, dtype: torch.dtype, b: int, strategy: str, has_weight: bool, has_residual: bool, seed: int
) -> None:
    x, eps = random(seed, m, k, dtype=dtype), 1e-6
    weight = random(seed + 1, k, dtype=dtype) if has_weight else None
    residual = random(seed + 2, m, k, dtype=dtype) if has_residual else None
    scale, index = scales(seed, m, strategy)
    levels, row_scale, total = api.rms_norm_quantize(x, weight, eps, scale, index, residual, b)
    expected = x if residual is None else x + residual
    assert torch.equal(total, expected if has_residual else x.new_empty(0))
    truth = reference.rms_norm(expected, weight, eps)
    same = reference.rms_norm(expected, None, eps, dtype=torch.float32).to(dtype)
    assert_fused(levels, row_scale, truth, same if weight is None else same * weight, scale, index, b)


@given(rows, widths, dtypes, bits, strategies, seeds)
@some
def test_silu_mul(m: int, k: int, dtype: torch.dtype, b: int, strategy: str, seed: int) -> None:
    gate, up = random(seed, m, k, dtype=dtype), random(seed + 1, m, k, dtype=dtype)
    scale, index = scales(seed, m, strategy)
    levels, row_scale = api.silu_mul_quantize(gate, up, scale, index, b)
    same = reference.silu_mul(gate, torch.ones_like(up), torch.float32).to(dtype) * up
    assert_fused(levels, row_scale, reference.silu_mul(gate, up), same, scale, index, b)


@given(rows, widths, dtypes, bits, strategies, st.sampled_from(api.GELU_KINDS), seeds)
@some
def test_gelu(m: int, k: int, dtype: torch.dtype, b: int, strategy: str, kind: str, seed: int) -> None:
    x = random(seed, m, k, dtype=dtype)
    scale, index = scales(seed, m, strategy)
    levels, row_scale = api.gelu_quantize(x, kind, scale, index, b)
    same = reference.gelu(x, kind, torch.float32).to(dtype)
    assert_fused(levels, row_scale, reference.gelu(x, kind), same, scale, index, b)


@given(rows, widths, dtypes, bits, strategies, st.booleans(), seeds)
@some
def test_hadamard(m: int, k: int, dtype: torch.dtype, b: int, strategy: str, take_x0: bool, seed: int) -> None:
    x = random(seed, m, k, dtype=dtype)
    scale, index = scales(seed, m, strategy)
    y = api.hadamard(x)
    truth, same = reference.hadamard(x), reference.hadamard(x, torch.float32).to(dtype)
    assert y.shape == (m, padded_size(k))
    assert y.dtype == dtype
    tolerance = 2 * (same - truth).abs().max().item() + 1e-6 if m else 0
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=tolerance)
    levels, row_scale, x0 = api.hadamard_quantize(x, scale, index, take_x0, b)
    assert torch.equal(x0, y[:, 0] if take_x0 else y.new_empty(0))
    if take_x0:
        truth[:, 0] = same[:, 0] = 0
        assert not levels[:, 0].any()
    assert_fused(levels, row_scale, truth, same, scale, index, b)


# --- packing and integer products


@given(st.integers(0, 9), st.integers(0, 20), seeds)
@some
def test_packing(n: int, half: int, seed: int) -> None:
    levels = random_levels(seed, n, 2 * half, num_bits=4)
    packed = api.pack_int4(levels)
    assert torch.equal(packed, reference.pack_int4(levels))
    assert torch.equal(api.unpack_int4(packed), levels)
    assert torch.equal(reference.unpack_int4(packed), levels)


@given(rows, st.sampled_from([1, 5, 16]), st.sampled_from([0, 1, 31, 1024, 1025, 3000]), seeds)
@some
def test_integer_products_are_exact(m: int, n: int, k: int, seed: int) -> None:
    x, w = random_levels(seed, m, k), random_levels(seed + 1, n, k)
    assert torch.equal(cpu.int_matmul(x, w, 128).long(), reference.int_matmul(x, w))
    w4 = random_levels(seed + 2, n, k, num_bits=4)
    assert torch.equal(cpu.int_matmul(x, w4, 8).long(), reference.int_matmul(x, w4))


@pytest.mark.parametrize(("largest", "width"), [(128, 18944), (8, 40000)])
def test_the_largest_sums_are_exact(largest: int, width: int) -> None:
    x = torch.full((2, width), -128, dtype=torch.int8)
    w = torch.full((1, width), -largest, dtype=torch.int8)
    x[1, 0] = -127  # an odd multiple, so that a sum in too few bits shows
    expected = [[128 * largest * width], [128 * largest * width - largest]]
    assert cpu.int_matmul(x, w, largest).tolist() == expected


@given(
    rows,
    st.sampled_from([1, 5, 16]),
    st.sampled_from([2, 10, 130]),
    dtypes,
    strategies,
    st.tuples(*[st.booleans()] * 3),
    seeds,
)
@some
def test_linear(
    m: int, n: int, k: int, dtype: torch.dtype, strategy: str, has: tuple[bool, bool, bool], seed: int
) -> None:
    has_bias, has_x0, packed = has
    x, w = random_levels(seed, m, k), random_levels(seed + 1, n, k, num_bits=4 if packed else 8)
    scale, index = scales(seed, m, strategy)
    scale = random(seed + 2, m).abs() if scale is None else scale
    w_scale, bias = random(seed + 3, n).abs(), random(seed + 4, n, dtype=dtype) if has_bias else None
    x0, w0 = (random(seed + 5, m, dtype=dtype), random(seed + 6, n, dtype=dtype)) if has_x0 else (None, None)
    name, weight = ("linear_int4", api.pack_int4(w)) if packed else ("linear_int8", w)
    arguments = (x, weight, scale, w_scale, index, bias, x0, w0)
    found = getattr(api, name)(*arguments, out_dtype=dtype)
    truth = getattr(reference, name)(*arguments)
    same = getattr(reference, name)(*arguments, dtype=torch.float32).to(dtype)
    assert found.dtype == dtype
    assert found.shape == (m, n)
    assert ((found - truth).abs() <= 2 * (same - truth).abs() + 1e-6 * truth.abs().clamp_min(1)).all()


@given(
    rows,
    st.sampled_from([1, 5]),
    st.sampled_from([2, 10, 130]),
    dtypes,
    st.sampled_from([1, 7, 64, 128]),
    st.booleans(),
    seeds,
)
@some
def test_weight_only(m: int, n: int, k: int, dtype: torch.dtype, group_size: int, asymmetric: bool, seed: int) -> None:
    x, w = random(seed, m, k, dtype=dtype), random_levels(seed + 1, n, k, num_bits=4)
    groups = -(-k // group_size)
    scale = random(seed + 2, n, groups).abs()
    zero_point = random_levels(seed + 3, n, groups, num_bits=4).float() if asymmetric else None
    arguments = (x, api.pack_int4(w), scale, zero_point, group_size, random(seed + 4, n, dtype=dtype))
    found, truth = api.weight_only_int4(*arguments), reference.weight_only_int4(*arguments)
    magnitude = reference.weight_only_int4(x.abs(), *arguments[1:3], zero_point, group_size).abs().max() if m else 0
    same = reference.weight_only_int4(*arguments, dtype=torch.float32).to(dtype)
    own_error = (same - truth).abs().max() if m else 0
    assert ((found - truth).abs() <= 2 * own_error + 1e-6 * magnitude + 1e-6).all()


# --- torch.library


def arguments_of(name: str) -> tuple[Any, ...]:
    """One call of every operation, positional as in its schema."""
    x, y, scale = random(0, 5, 10), random(1, 5, 10), torch.rand(2) + 0.1
    index, levels = torch.tensor([0, 1, 1, 0, 1], dtype=torch.uint8), random_levels(2, 6, 10, num_bits=4)
    packed, x_q = api.pack_int4(levels), random_levels(3, 5, 10)
    epilogue = (scale, random(4, 6).abs(), index, random(5, 6), random(6, 5), random(7, 6), torch.bfloat16)
    return {
        "quantize_static": (x, scale, index, 8),
        "quantize_token": (x, 8),
        "rms_norm_quantize": (x, None, 1e-6, scale, index, y, 8),
        "silu_mul_quantize": (x, y, None, None, 4),
        "gelu_quantize": (x, "gelu", scale, index, 8),
        "hadamard": (x,),
        "hadamard_quantize": (x, None, None, True, 8),
        "pack_int4": (levels,),
        "unpack_int4": (packed,),
        "linear_int8": (x_q, levels, *epilogue),
        "linear_int4": (x_q, packed, *epilogue),
        "weight_only_int4": (x, packed, random(8, 6, 2).abs(), None, 7, None),
    }[name]


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mqbench, name).default, arguments_of(name))


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_fakes_have_the_shapes_of_real_results(name: str) -> None:
    """Also without rows, and with optional results left out; opcheck sees one case each."""
    for empty in (False, True):
        arguments = arguments_of(name)
        if empty and arguments[0].shape[0] == 5:
            arguments = tuple(a[:0] if isinstance(a, Tensor) and a.shape[0] == 5 else a for a in arguments)
        found = getattr(torch.ops.mqbench, name)(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            expected = getattr(torch.ops.mqbench, name)(*fake)
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for real, imagined in pairs:
            assert (real.shape, real.dtype) == (imagined.shape, imagined.dtype)


def test_they_pass_through_torch_compile() -> None:
    def layer(x: Tensor, w: Tensor) -> Tensor:
        levels, scale, x0 = api.hadamard_quantize(x, take_x0=True)
        return api.linear_int4(levels, w, scale, torch.ones(6), x0=x0, w0=torch.ones(6), out_dtype=torch.float32)

    x, w = random(0, 5, 12), api.pack_int4(random_levels(1, 6, 12, num_bits=4))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), layer(x, w))


def test_every_operation_has_its_reference_and_its_place_on_a_gpu() -> None:
    assert ops.FAKES.keys() == ops.CUDA_MODULES.keys() == ops.SCHEMAS.keys()
    for name in ops.SCHEMAS:
        assert callable(getattr(api, name))
        assert callable(getattr(reference, name))


# --- wrong arguments name themselves

X, W, INDEX = random(0, 4, 6), random_levels(0, 5, 6, num_bits=4), torch.zeros(4, dtype=torch.uint8)
ONE, Q = torch.ones(1), random_levels(1, 4, 6)
PACKED = api.pack_int4(W)
LINEAR: Mapping[str, Any] = {"x_q": Q, "w_q": W, "row_scale": ONE, "w_scale": torch.ones(5)}
WRONG: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (api.quantize_static, {"x": X.int(), "scale": ONE}, TypeError, r"^x must be float16 or bfloat16 or float32"),
    (api.quantize_static, {"x": [1.0], "scale": ONE}, TypeError, r"^x must be a .* tensor, got list"),
    (api.quantize_static, {"x": X[0], "scale": ONE}, ValueError, r"^x must have shape \(rows, columns\), got \(6,\)"),
    (api.quantize_static, {"x": X.T, "scale": ONE}, ValueError, r"^x must be contiguous"),
    (api.quantize_static, {"x": X, "scale": ONE.half()}, TypeError, r"^scale must be float32, got float16"),
    (api.quantize_static, {"x": X, "scale": None}, TypeError, r"^scale must be a float32 tensor"),
    (api.quantize_static, {"x": X, "scale": torch.ones(2)}, ValueError, r"^scale must have shape \(1,\)"),
    (api.quantize_static, {"x": X, "scale": ONE.to("meta")}, ValueError, r"^scale must be on cpu"),
    (api.quantize_static, {"x": X, "scale": ONE, "row_index": INDEX.int()}, TypeError, r"^row_index must be uint8"),
    (
        api.quantize_static,
        {"x": X, "scale": ONE, "row_index": INDEX[1:]},
        ValueError,
        r"^row_index must have shape \(4,",
    ),
    (api.quantize_static, {"x": X, "scale": ONE[:0], "row_index": INDEX}, ValueError, r"^scale must have 1 to 256"),
    (api.quantize_static, {"x": X, "scale": ONE, "num_bits": 9}, ValueError, r"^num_bits must be 2 to 8"),
    (api.quantize_token, {"x": X, "num_bits": 1}, ValueError, r"^num_bits must be 2 to 8, got 1"),
    (api.rms_norm_quantize, {"x": X, "weight": ONE, "eps": 0.0}, ValueError, r"^weight must have shape \(6,\)"),
    (
        api.rms_norm_quantize,
        {"x": X, "weight": None, "eps": 0.0, "residual": X.half()},
        TypeError,
        r"^residual must be",
    ),
    (api.rms_norm_quantize, {"x": X, "weight": None, "eps": 0.0, "row_index": INDEX}, ValueError, r"^row_index needs"),
    (api.silu_mul_quantize, {"gate": X, "up": X[:3]}, ValueError, r"^up must have shape \(4, 6\), got \(3, 6\)"),
    (api.gelu_quantize, {"x": X, "kind": "relu"}, ValueError, r"^kind must be gelu or gelu_tanh or quick_gelu"),
    (api.hadamard, {"x": X[:, :0]}, ValueError, r"^x must have at least one column"),
    (api.pack_int4, {"levels": W.int()}, TypeError, r"^levels must be int8"),
    (api.pack_int4, {"levels": W[:, :3].contiguous()}, ValueError, r"^levels must have an even number"),
    (api.unpack_int4, {"packed": W}, TypeError, r"^packed must be uint8"),
    (api.linear_int8, {**LINEAR, "w_q": W[:, :4].contiguous()}, ValueError, r"^w_q must have shape \(rows, 6\)"),
    (
        api.linear_int8,
        {**LINEAR, "row_scale": torch.ones(3)},
        ValueError,
        r"^row_scale must have shape \(4,\) or \(1,\)",
    ),
    (api.linear_int8, {**LINEAR, "w_scale": ONE}, ValueError, r"^w_scale must have shape \(5,\), got \(1,\)"),
    (api.linear_int8, {**LINEAR, "bias": ONE}, ValueError, r"^bias must have shape \(5,\)"),
    (api.linear_int8, {**LINEAR, "x0": torch.ones(4)}, ValueError, r"^w0 is missing"),
    (api.linear_int8, {**LINEAR, "w0": torch.ones(5)}, ValueError, r"^x0 is missing"),
    (api.linear_int8, {**LINEAR, "out_dtype": torch.int8}, TypeError, r"^out_dtype must be"),
    (api.linear_int8, {**LINEAR, "row_index": INDEX, "row_scale": ONE.int()}, TypeError, r"^row_scale must be float32"),
    (
        api.linear_int8,
        {**LINEAR, "x_q": Q.new_zeros(1, 1 << 17), "w_q": Q.new_zeros(5, 1 << 17)},
        ValueError,
        r"^x_q must have fewer than 131072 columns",
    ),
    (
        api.linear_int4,
        {"x_q": Q[:, :5].contiguous(), "w_packed": PACKED, "row_scale": ONE, "w_scale": torch.ones(5)},
        ValueError,
        r"^x_q must have an even",
    ),
    (
        api.linear_int4,
        {"x_q": Q, "w_packed": W, "row_scale": ONE, "w_scale": torch.ones(5)},
        TypeError,
        r"^w_packed must be uint8",
    ),
    (
        api.weight_only_int4,
        {"x": X, "w_packed": PACKED, "w_scale": torch.ones(5, 1), "group_size": 4},
        ValueError,
        r"^w_scale must have shape \(5, 2\)",
    ),
    (
        api.weight_only_int4,
        {"x": X, "w_packed": PACKED, "w_scale": torch.ones(5, 1), "group_size": 0},
        ValueError,
        r"^group_size must be at least 1",
    ),
    (
        api.weight_only_int4,
        {"x": X, "w_packed": PACKED, "w_scale": torch.ones(5, 1), "zero_point": torch.ones(5)},
        ValueError,
        r"^zero_point must have shape \(5, 1\)",
    ),
]


@pytest.mark.parametrize(("call", "arguments", "kind", "message"), WRONG)
def test_a_wrong_argument_names_itself(
    call: Callable[..., Any], arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(**arguments)


def test_without_triton_a_gpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CUDA_MODULES", {"hadamard": "mqbench.kernels.no_such_module"})
    ops._cuda_implementation.cache_clear()
    with pytest.raises(ImportError, match=r"operation 'hadamard' needs Triton on a GPU .* install triton"):
        ops._cuda_implementation("hadamard")


def test_a_gpu_kernel_starts_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which may be another one."""
    current: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.clear()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(ops, "_cuda_implementation", lambda name: lambda *args: (name, args, list(current)))
    x, scale = torch.ones(2, 3), torch.ones(1)
    name, args, seen = ops._run_on_cuda("quantize_static", x, scale, None, 8)
    assert (name, args) == ("quantize_static", (x, scale, None, 8))
    assert len(seen) == 1 and seen[0] is x and not current
