"""Timings of what quantization spends its time on: ``nox -s bench``. Each checks its result before it is timed."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fakes.tiny_qwen2_vl import tiny_batch, tiny_layout, tiny_model
from mqbench.baselines.gptq import gptq_round
from mqbench.harness.discover import all_methods
from mqbench.harness.quant.activation import fake_quantize
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Strategy
from mqbench.harness.quant.weight import round_to_nearest
from mqbench.kernels.hadamard import hadamard_matrix, hadamard_transform

NUM_TOKENS = 256


@pytest.mark.parametrize("width", [1280, 3584, 5120, 18944])
def test_hadamard_transform(benchmark: BenchmarkFixture, width: int) -> None:
    """Widths of Qwen2-VL-7B, whose orders are no powers of two."""
    x = torch.randn(NUM_TOKENS, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x), inverse=True), x, rtol=1e-4, atol=1e-4)
    benchmark(hadamard_transform, x)


def test_hadamard_by_dense_product(benchmark: BenchmarkFixture) -> None:
    """What the fast transform has to beat."""
    x = torch.randn(NUM_TOKENS, 3584, generator=torch.Generator().manual_seed(0))
    matrix = hadamard_matrix(3584, torch.float32)
    torch.testing.assert_close(x @ matrix.T, hadamard_transform(x), rtol=1e-4, atol=1e-4)
    benchmark(torch.matmul, x, matrix.T)


def test_fake_quantize(benchmark: BenchmarkFixture) -> None:
    x = torch.randn(NUM_TOKENS, 3584, generator=torch.Generator().manual_seed(0))
    args, scale = QuantArgs(8), x.abs().max() / 127
    assert (fake_quantize(x, scale, args) - x).abs().max() <= scale / 2 * 1.001
    benchmark(fake_quantize, x, scale, args)


def test_gptq(benchmark: BenchmarkFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(256, 512, generator=generator), torch.randn(2048, 512, generator=generator)
    rows = rows @ torch.randn(512, 512, generator=generator)
    hessian, args = rows.T @ rows, QuantArgs(4, strategy=Strategy.CHANNEL)

    def output_error(rounded: torch.Tensor) -> float:
        return (rows @ (rounded - weight).T).norm().item()

    gptq = output_error(gptq_round(weight, hessian, args).weight)
    assert gptq < output_error(round_to_nearest(weight, args, "minmax", "weight").weight)
    benchmark(gptq_round, weight, hessian, args)


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "quarot", "mquant"])
def test_quantize_tiny_model(benchmark: BenchmarkFixture, method: str) -> None:
    """A whole method on a model of a few thousand parameters: the share that does not shrink with the model."""
    quantizer, batch = all_methods().found[method], tiny_batch(tiny_model())
    recipe = Recipe(method, "w4a8", "w4a8")

    def quantize() -> int:
        model = tiny_model()
        return len(quantizer.quantize(model, tiny_layout(model), recipe, [batch]).layers)

    assert quantize() == len(tiny_layout(tiny_model()).quantized_linears())
    benchmark.pedantic(quantize, rounds=3)
