"""The operations as torch knows them: ``torch.ops.mqbench.*``, which torch.compile and CUDA graphs can pass through.

``api`` checks arguments and calls these; nobody else should. On CUDA each one calls the function of its own name, with
the arguments of its schema in the same order, in the module that ``CUDA_MODULES`` names. That module is imported on
first use, so that Triton is needed by those alone who have a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mqbench.kernels import cpu, packing
from mqbench.kernels.hadamard import padded_size

NAMESPACE = "mqbench"

_QUANTIZED = "Tensor? scale, Tensor? row_index"
_EPILOGUE = (
    "Tensor row_scale, Tensor w_scale, Tensor? row_index, Tensor? bias, Tensor? x0, Tensor? w0, ScalarType out_dtype"
)

SCHEMAS: Mapping[str, str] = MappingProxyType(
    {
        "quantize_static": "(Tensor x, Tensor scale, Tensor? row_index, int num_bits) -> Tensor",
        "quantize_token": "(Tensor x, int num_bits) -> (Tensor, Tensor)",
        "rms_norm_quantize": f"(Tensor x, Tensor? weight, float eps, {_QUANTIZED}, Tensor? residual, int num_bits)"
        " -> (Tensor, Tensor, Tensor)",
        "silu_mul_quantize": f"(Tensor gate, Tensor up, {_QUANTIZED}, int num_bits) -> (Tensor, Tensor)",
        "gelu_quantize": f"(Tensor x, str kind, {_QUANTIZED}, int num_bits) -> (Tensor, Tensor)",
        "hadamard": "(Tensor x) -> Tensor",
        "hadamard_quantize": f"(Tensor x, {_QUANTIZED}, bool take_x0, int num_bits) -> (Tensor, Tensor, Tensor)",
        "pack_int4": "(Tensor levels) -> Tensor",
        "unpack_int4": "(Tensor packed) -> Tensor",
        "linear_int8": f"(Tensor x_q, Tensor w_q, {_EPILOGUE}) -> Tensor",
        "linear_int4": f"(Tensor x_q, Tensor w_packed, {_EPILOGUE}) -> Tensor",
        "weight_only_int4": "(Tensor x, Tensor w_packed, Tensor w_scale, Tensor? zero_point, int group_size,"
        " Tensor? bias) -> Tensor",
    }
)
"""Arguments and results; a result that was not asked for is an empty tensor."""

CUDA_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "quantize_static": "mqbench.kernels.triton_elementwise",
        "quantize_token": "mqbench.kernels.triton_elementwise",
        "rms_norm_quantize": "mqbench.kernels.triton_elementwise",
        "silu_mul_quantize": "mqbench.kernels.triton_elementwise",
        "gelu_quantize": "mqbench.kernels.triton_elementwise",
        "hadamard": "mqbench.kernels.triton_hadamard",
        "hadamard_quantize": "mqbench.kernels.triton_hadamard",
        "pack_int4": "mqbench.kernels.packing",
        "unpack_int4": "mqbench.kernels.packing",
        "linear_int8": "mqbench.kernels.dispatch",
        "linear_int4": "mqbench.kernels.dispatch",
        "weight_only_int4": "mqbench.kernels.dispatch",
    }
)
"""Where the CUDA implementation of each operation stands, under the operation's name."""


def _int8_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


def _row_scale(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0] if scale is None else 0, dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_rms_norm_quantize(
    x: Tensor, weight: Any, eps: float, scale: Tensor | None, row_index: Any, residual: Tensor | None, num_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _int8_like(x), _row_scale(x, scale), x.new_empty(0) if residual is None else torch.empty_like(x)


def _fake_hadamard(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], padded_size(int(x.shape[1])))  # a width is never symbolic: it picks the matrix


def _fake_hadamard_quantize(
    x: Tensor, scale: Tensor | None, row_index: Any, take_x0: bool, num_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _int8_like(_fake_hadamard(x)), _row_scale(x, scale), x.new_empty(x.shape[0] if take_x0 else 0)


def _fake_linear(
    x_q: Tensor, w: Tensor, row_scale: Any, w_scale: Any, row_index: Any, bias: Any, x0: Any, w0: Any, out_dtype: Any
) -> Tensor:
    return x_q.new_empty(x_q.shape[0], w.shape[0], dtype=out_dtype)


FAKES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "quantize_static": lambda x, scale, row_index, num_bits: _int8_like(x),
        "quantize_token": lambda x, num_bits: (_int8_like(x), _row_scale(x, None)),
        "rms_norm_quantize": _fake_rms_norm_quantize,
        "silu_mul_quantize": lambda gate, up, scale, row_index, num_bits: (_int8_like(gate), _row_scale(gate, scale)),
        "gelu_quantize": lambda x, kind, scale, row_index, num_bits: (_int8_like(x), _row_scale(x, scale)),
        "hadamard": _fake_hadamard,
        "hadamard_quantize": _fake_hadamard_quantize,
        "pack_int4": lambda levels: levels.new_empty(levels.shape[0], levels.shape[1] // 2, dtype=torch.uint8),
        "unpack_int4": lambda packed: packed.new_empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int8),
        "linear_int8": _fake_linear,
        "linear_int4": _fake_linear,
        "weight_only_int4": lambda x, w_packed, w_scale, zero_point, group_size, bias: x.new_empty(
            x.shape[0], w_packed.shape[0]
        ),
    }
)
"""Shapes and dtypes of the results, for fake tensors."""


@cache
def _cuda_implementation(name: str) -> Callable[..., Any]:
    try:
        return getattr(import_module(CUDA_MODULES[name]), name)
    except ImportError as error:
        raise ImportError(f"operation '{name}' needs Triton on a GPU ({error}); install triton") from error


def _run_on_cuda(name: str, *args: Any) -> Any:
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device, wherever the tensors are
        return _cuda_implementation(name)(*args)


def _register(name: str) -> Callable[..., Any]:
    implementation = getattr(packing if name.endswith("pack_int4") else cpu, name)

    operation = torch.library.custom_op(
        f"{NAMESPACE}::{name}", implementation, mutates_args=(), device_types="cpu", schema=SCHEMAS[name]
    )
    operation.register_kernel("cuda", partial(_run_on_cuda, name))
    operation.register_fake(FAKES[name])
    return operation


OPS: Mapping[str, Callable[..., Any]] = MappingProxyType({name: _register(name) for name in SCHEMAS})
"""Every operation by name."""
