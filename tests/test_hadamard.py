"""Hadamard construction and transform: exact integer orthogonality, dense oracles, dtypes, padding and messages."""

from __future__ import annotations

import sys
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard

from mqbench.kernels import hadamard, hadamard_search
from mqbench.kernels.hadamard import hadamard_factors, hadamard_matrix, hadamard_transform, is_supported, padded_size
from mqbench.kernels.hadamard_construct import base_matrix, base_orders, goethals_seidel, is_power_of_two

MODEL_WIDTHS = (18944, 3584, 14336, 1280, 5120, 13824, 29568, 11008, 8960, 15360, 1664, 1152, 4320)
OTHER_WIDTHS = (8192, 4096, 1024, 768, 512, 192, 128, 80, 64, 32, 3200, 4864, 12800)
WIDTHS = MODEL_WIDTHS + OTHER_WIDTHS
SMALL_WIDTHS = [n for n in range(1, 700) if is_supported(n)]


def seeded(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_walsh_hadamard(x: list[float]) -> list[float]:
    """Unnormalized transform by its recursive definition."""
    if len(x) == 1:
        return x
    half = len(x) // 2
    low, high = naive_walsh_hadamard(x[:half]), naive_walsh_hadamard(x[half:])
    return [a + b for a, b in zip(low, high, strict=True)] + [a - b for a, b in zip(low, high, strict=True)]


def assert_hadamard(matrix: np.ndarray) -> None:
    order = len(matrix)
    wide = matrix.astype(np.float64)  # exact: every partial sum is an integer below 2^53
    assert np.array_equal(np.abs(matrix), np.ones((order, order)))
    assert np.array_equal(wide @ wide.T, order * np.eye(order))


def hadamard_row(n: int, index: int) -> torch.Tensor:
    """Row `index` of H_n from the digits of its index in the mixed radix of the factors, without building H_n."""
    digits = np.unravel_index(index, hadamard_factors(n))
    row = np.ones(1)
    for order, digit in zip(hadamard_factors(n), digits, strict=True):
        row = np.kron(row, base_matrix(order)[digit])
    return torch.from_numpy(row * n**-0.5)


# --- integer matrices


@pytest.mark.parametrize("order", base_orders())
def test_every_base_matrix_is_orthogonal_with_a_first_row_of_ones(order: int) -> None:
    assert_hadamard(base_matrix(order))
    assert np.array_equal(base_matrix(order)[0], np.ones(order))


@pytest.mark.parametrize("order", [1, 2, 8, 64, 256])
def test_powers_of_two_are_scipys_sylvester_matrices(order: int) -> None:
    assert np.array_equal(base_matrix(order), scipy_hadamard(order))


def test_base_orders_cover_paley_over_prime_powers_and_the_searched_ones() -> None:
    paley_one_gf27, paley_two_gf25, paley_two_gf9, paley_two_73 = 28, 52, 20, 148
    assert {paley_one_gf27, paley_two_gf25, paley_two_gf9, paley_two_73} <= set(base_orders())
    assert {4 * length for length in hadamard_search.MULTIPLIERS} <= set(base_orders())
    known_gaps = {188, 236, 268, 428}
    assert not known_gaps & set(base_orders())


def test_a_base_matrix_cannot_be_modified_through_the_cache() -> None:
    with pytest.raises(ValueError, match="read-only"):
        base_matrix(12)[0, 0] = -1


def test_an_order_without_construction_is_refused() -> None:
    with pytest.raises(ValueError, match="order 428"):
        base_matrix(428)


@pytest.mark.parametrize("length", [39, 43, 73])
def test_the_search_finds_rows_that_make_a_hadamard_matrix(length: int) -> None:
    rows = hadamard_search.find_rows(length, hadamard_search.MULTIPLIERS[length])
    assert_hadamard(goethals_seidel(rows))


def test_the_search_says_when_a_multiplier_group_has_no_solution() -> None:
    with pytest.raises(ValueError, match="length 43"):
        hadamard_search.find_rows(43, (3,))


def test_the_search_refuses_multipliers_that_are_no_units() -> None:
    with pytest.raises(ValueError, match="coprime to 39"):
        hadamard_search.find_rows(39, (3,))


# --- factorizations


@pytest.mark.parametrize("n", WIDTHS)
def test_factors_multiply_to_the_width(n: int) -> None:
    *dense, power = hadamard_factors(n)
    assert prod(dense) * power == n
    assert is_power_of_two(power)
    assert all(order in base_orders() for order in dense)
    assert padded_size(n) == n


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (18944, (148, 128)),
        (11008, (172, 64)),
        (3584, (28, 128)),
        (1280, (20, 64)),
        (29568, (44, 28, 12, 2)),
        (4320, (60, 36, 2)),
        (13824, (12, 12, 12, 8)),
        (1664, (52, 32)),
        (4096, (4096,)),
        (12, (12, 1)),
        (1, (1,)),
    ],
)
def test_the_cheapest_factorization_is_chosen(n: int, factors: tuple[int, ...]) -> None:
    assert hadamard_factors(n) == factors


@pytest.mark.parametrize("n", WIDTHS)
def test_stages_are_the_factors_regrouped(n: int) -> None:
    stages = hadamard._stages(n)
    assert prod(order for stage in stages for order in stage) == n
    assert max(prod(stage) for stage in stages) <= max(172, 8 * 60)


# --- padding and messages


@pytest.mark.parametrize(("n", "padded"), [(4304, 4320), (13696, 13824), (3, 4), (5, 8), (13, 16), (428, 432)])
def test_padding_goes_to_the_next_cheap_width(n: int, padded: int) -> None:
    assert padded_size(n) == padded


@given(st.integers(1, 40_000))
@settings(deadline=None, max_examples=60)
def test_a_padded_width_is_supported_and_adds_little(n: int) -> None:
    padded = padded_size(n)
    assert is_supported(padded)
    assert n <= padded <= n + max(4, n // 8)
    assert padded_size(padded) == padded


def test_an_unsupported_width_names_the_padded_one() -> None:
    with pytest.raises(ValueError, match=r"width 4304; zero-pad it to padded_size\(4304\) = 4320"):
        hadamard_transform(torch.zeros(2, 4304))
    with pytest.raises(ValueError, match=r"padded_size\(13696\) = 13824"):
        hadamard_matrix(13696)


@pytest.mark.parametrize("n", [0, -4])
def test_a_width_below_one_is_refused(n: int) -> None:
    assert not is_supported(n)
    with pytest.raises(ValueError, match="at least 1"):
        padded_size(n)
    with pytest.raises(ValueError, match="at least 1"):
        hadamard_factors(n)


def test_inputs_that_are_no_float_vectors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        hadamard_transform(torch.ones(8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"torch\.complex64"):
        hadamard_transform(torch.ones(8, dtype=torch.complex64))
    with pytest.raises(ValueError, match="scalar"):
        hadamard_transform(torch.tensor(1.0))
    with pytest.raises(ValueError, match="width 0"):
        hadamard_transform(torch.zeros(3, 0))


# --- the transform


@pytest.mark.parametrize("n", WIDTHS)
def test_output_zero_is_the_scaled_sum_and_the_inverse_restores(n: int) -> None:
    x = seeded(2, n)
    y = hadamard_transform(x)
    torch.testing.assert_close(y[:, 0], x.sum(dim=-1) / n**0.5, rtol=0, atol=1e-11)
    torch.testing.assert_close(y.square().sum(dim=-1), x.square().sum(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(hadamard_transform(y, inverse=True), x, rtol=0, atol=1e-11)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x, inverse=True)), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", WIDTHS)
def test_unit_vectors_go_to_rows_and_columns_of_the_matrix(n: int) -> None:
    indices = [0, 1, n // 3, n - 1]
    rows = torch.stack([hadamard_row(n, index) for index in indices])
    assert torch.equal(rows[0], torch.full((n,), n**-0.5, dtype=torch.float64))
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    units = torch.zeros(4, n, dtype=torch.float64)
    units[range(4), indices] = 1.0
    torch.testing.assert_close(hadamard_transform(units, inverse=True), rows, rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard_transform(units)[:, indices], rows[:, indices].T, rtol=0, atol=1e-13)


@given(
    st.sampled_from(SMALL_WIDTHS),
    st.lists(st.integers(0, 3), max_size=3),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=150)
def test_transform_equals_the_dense_product(n: int, leading: list[int], inverse: bool, seed: int) -> None:
    x = seeded(*leading, n, seed=seed)
    matrix = hadamard_matrix(n)
    expected = x @ (matrix if inverse else matrix.T)
    torch.testing.assert_close(hadamard_transform(x, inverse=inverse), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 36, 80, 148, 172, 192, 336, 432, 768, 1152, 1280, 1664])
def test_the_dense_matrix_is_orthonormal_with_a_first_row_of_ones(n: int) -> None:
    matrix = hadamard_matrix(n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 32, 128, 512, 4096])
def test_powers_of_two_match_the_recursive_definition(n: int) -> None:
    x = torch.arange(n, dtype=torch.float64) % 7 - 3
    assert torch.equal(hadamard_transform(x), torch.tensor(naive_walsh_hadamard(x.tolist()), dtype=x.dtype) * n**-0.5)


def test_integers_are_summed_exactly_in_float32() -> None:
    n = 18944
    x = (torch.arange(n) % 255 - 127).float()
    exact = hadamard_transform(x.double()) * n**0.5
    assert torch.equal(hadamard_transform(x), exact.round().float() * n**-0.5)


def test_matrices_of_paley_one_are_not_symmetric_and_the_inverse_differs() -> None:
    x = seeded(3, 12)
    matrix = hadamard_matrix(12)
    assert not torch.equal(matrix, matrix.T)
    assert (hadamard_transform(x) - hadamard_transform(x, inverse=True)).abs().max() > 0.1


def test_a_linear_layer_keeps_its_output_when_weight_and_input_are_transformed() -> None:
    x, weight = seeded(5, 1280), seeded(7, 1280, seed=1)
    torch.testing.assert_close(hadamard_transform(x) @ hadamard_transform(weight).T, x @ weight.T, rtol=0, atol=1e-10)


# --- dtypes, layouts and modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [128, 192, 1280, 3584])
def test_dtype_is_kept_and_half_precision_rounds_once(n: int, dtype: torch.dtype) -> None:
    x = seeded(4, n, dtype=dtype)
    y = hadamard_transform(x)
    assert y.dtype == dtype
    exact = hadamard_transform(x.double())
    accumulation = {torch.float64: 1e-13}.get(dtype, 1e-5)
    rounding = exact.abs() * torch.finfo(dtype).eps / 2
    assert ((y.double() - exact).abs() <= rounding + accumulation).all()


def test_float16_does_not_overflow_inside() -> None:
    x = torch.full((1, 18944), 400.0, dtype=torch.float16)
    assert hadamard_transform(x)[0, 0].item() == torch.tensor(400.0 * 18944**0.5).half().item()


def test_strided_inputs_and_the_input_itself_are_left_as_they_are() -> None:
    base = seeded(192, 6)
    kept = base.clone()
    x = base.T[::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(hadamard_transform(x), x.contiguous() @ hadamard_matrix(192).T, rtol=0, atol=1e-13)
    assert torch.equal(base, kept)


def test_a_first_call_in_inference_mode_does_not_spoil_later_gradients() -> None:
    hadamard._stage_matrix.cache_clear()
    with torch.inference_mode():
        hadamard_transform(seeded(2, 1280))
    x = seeded(2, 1280).requires_grad_()
    y = hadamard_transform(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient, hadamard_transform(torch.ones_like(y), inverse=True), rtol=0, atol=1e-12)


def test_changing_a_returned_matrix_changes_no_later_result() -> None:
    hadamard_matrix(12).zero_()
    assert hadamard_matrix(12)[0, 0] == pytest.approx(12**-0.5)


def test_matrix_takes_a_dtype() -> None:
    assert hadamard_matrix(20, dtype=torch.float32).dtype == torch.float32


def test_inputs_spread_evenly_over_all_outputs() -> None:
    for n in (1664, 11008, 18944, 29568):
        unit = torch.zeros(n, dtype=torch.float64)
        unit[n // 5] = 1.0
        spread = hadamard_transform(unit).abs()
        torch.testing.assert_close(spread, torch.full((n,), n**-0.5, dtype=torch.float64), rtol=1e-12, atol=0)


# --- optional backend


@pytest.fixture
def fake_backend(monkeypatch: pytest.MonkeyPatch):
    def transform(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x @ torch.tensor(scipy_hadamard(x.shape[-1]), dtype=x.dtype) * scale

    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", SimpleNamespace(hadamard_transform=transform))
    hadamard._imported_backend.cache_clear()
    yield transform
    hadamard._imported_backend.cache_clear()


def test_the_backend_is_used_only_where_it_applies(fake_backend) -> None:
    assert hadamard._fast_backend(4096, torch.float16, "cuda") is fake_backend
    assert hadamard._fast_backend(4096, torch.float16, "cpu") is None
    assert hadamard._fast_backend(4096, torch.float64, "cuda") is None
    assert hadamard._fast_backend(3584, torch.float16, "cuda") is None
    assert hadamard._fast_backend(65536, torch.float16, "cuda") is None


def test_the_backend_gives_the_same_transform(fake_backend, monkeypatch: pytest.MonkeyPatch) -> None:
    x = seeded(3, 256, dtype=torch.float32)
    own = hadamard_transform(x)
    monkeypatch.setattr(hadamard, "_fast_backend", lambda n, dtype, device_type: fake_backend)
    torch.testing.assert_close(hadamard_transform(x), own, rtol=0, atol=1e-5)


def test_without_the_package_there_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", None)
    hadamard._imported_backend.cache_clear()
    assert hadamard._fast_backend(4096, torch.float16, "cuda") is None
    hadamard._imported_backend.cache_clear()


def test_row_sums_below_the_first_vary_so_that_only_row_zero_carries_the_mean() -> None:
    n = 1152
    sums = hadamard_matrix(n).sum(dim=1)
    assert sums[0].item() == pytest.approx(n**0.5)
    torch.testing.assert_close(sums[1:], torch.zeros(n - 1, dtype=torch.float64), rtol=0, atol=1e-10)
