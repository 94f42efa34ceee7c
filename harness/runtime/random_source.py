"""The runtime's modules with random values, in packed form from the start: no weight exists in 16 bits first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mqbench.harness.quant.layout import Layout, NormKind, Part
from mqbench.harness.quant.scheme import QuantArgs, Scheme, Strategy
from mqbench.harness.runtime.coverage import final_norm
from mqbench.harness.runtime.linears import Float8Linear, FloatLinear, IntegerLinear, RuntimeLinear, WeightOnlyLinear
from mqbench.harness.runtime.parts import GEMM_PARTS, LLM_GEMM
from mqbench.harness.runtime.pointwise import RowNorm
from mqbench.harness.runtime.projection import Projection
from mqbench.harness.runtime.rows import Rows
from mqbench.harness.runtime.site import FLOAT8_DTYPE, Float8Site, FloatSite, IntegerSite, OnlineHadamardRows, Site
from mqbench.harness.runtime.systems import FLOAT8, Order, System
from mqbench.kernels.hadamard import padded_size

PACKED_BITS, HEAD_ACTIVATION_BITS = 4, 8
INPUT_SCALES = (0.05, 0.04)
"""Static scales of text and visual rows: inputs of unit size then use most of the 8-bit grid."""
FLOAT8_SPREAD = 150.0
"""Standard deviation of finite E4M3 numbers with random bits, roughly."""
FLOAT8_NAN = 0x7F


class RandomValues:
    """Random tensors, reproducible from a seed on each device; on the meta device only their shapes."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator | None] = {}

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, std: float = 1.0) -> Tensor:
        """Normally distributed."""
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=self._generator(device))

    def whole(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, low: int, high: int) -> Tensor:
        """Whole numbers in [low, high]."""
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty.random_(low, high + 1, generator=self._generator(device))

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if device.type == "cpu":
            device = torch.device("cpu")  # which may be called cpu:0, too
        if device not in self._generators:
            known = None if device.type == "meta" else torch.Generator(device).manual_seed(self.seed)
            self._generators[device] = known
        return self._generators[device]


class RandomSource:
    """``fuse.Source`` of a model that never existed in floating point.

    Args:
        model: On the meta device still; gives the shapes.
        layout: Its layout.
        system: What to build.
        rows: What the LLM's sites read.
        device: Of everything that ``device_map`` does not place.
        dtype: Of everything in floating point.
        values: Where values come from.
        device_map: Device by name of an LLM block.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        system: System,
        rows: Rows,
        device: torch.device,
        dtype: torch.dtype,
        values: RandomValues,
        device_map: Mapping[str, torch.device],
    ) -> None:
        self.model, self.layout, self.system, self.rows = model, layout, system, rows
        self.device, self.dtype, self.values, self.device_map = device, dtype, values, device_map
        head: Any = model.get_submodule(final_norm(layout.text).readers[0])
        self._is_tied = self._embedding.weight is head.weight
        self.transformed = {block.mlp_out for tower in layout.towers for block in tower.blocks if system.hadamard}

    def projection(self, names: tuple[str, ...], part: Part) -> Projection:
        groups = [names] if self.system.fused else [(name,) for name in names]
        sites = [self._site(group[0], part) for group in groups]
        return Projection(sites, [self._linear(group, part) for group in groups], GEMM_PARTS[part], self.system.fused)

    def norm(self, name: str) -> RowNorm:
        module = self.model.get_submodule(name)
        norm, device = RowNorm.from_module(module, name), self._device_of(name)
        if self.system.hadamard:  # rotated models have no affine, and LayerNorms became RMSNorms
            return RowNorm(NormKind.RMSNORM, norm.eps)
        weight = None if norm.weight is None else torch.ones(norm.weight.shape, dtype=self.dtype, device=device)
        bias = None if norm.bias is None else torch.zeros(norm.bias.shape, dtype=self.dtype, device=device)
        return RowNorm(norm.kind, norm.eps, weight, bias)

    def head(self, name: str) -> Projection:
        module: Any = self.model.get_submodule(name)
        if self.system.head_bits is not None:
            args = QuantArgs(self.system.head_bits, strategy=Strategy.CHANNEL)
            num_out, num_in = module.weight.shape
            linear: RuntimeLinear = self._integer(num_out, num_in, args, self.device, None, None)
            return Projection([IntegerSite(HEAD_ACTIVATION_BITS)], [linear], LLM_GEMM)
        shape = tuple(module.weight.shape)
        weight = self._embedding.weight if self._is_tied else self._weight(shape, self.device)
        return Projection([FloatSite()], [FloatLinear(weight)], LLM_GEMM)

    @property
    def _embedding(self) -> Any:
        return self.model.get_submodule(self.layout.text.entry[0])

    def _scheme(self, part: Part) -> Scheme:
        return self.system.text_scheme if part is Part.TEXT else self.system.vision_scheme

    def _site(self, name: str, part: Part) -> Site:
        args, system, is_hadamard = self._scheme(part).activations, self.system, name in self.transformed
        if system.activations == FLOAT8 and self._fits_float8(name):
            return Float8Site()
        if args is None or system.activations is None:
            return FloatSite(OnlineHadamardRows() if is_hadamard else None)
        return IntegerSite(
            args.num_bits,
            self._scale(name, part),
            self.rows if part is Part.TEXT else None,
            hadamard=is_hadamard,
            takes_x0=self._splits(name),
            sliced=system.order is Order.SLICED,
        )

    def _fits_float8(self, name: str) -> bool:
        """``torch._scaled_mm`` wants both sizes divisible by 16; Qwen2-VL's patch embedding stays in 16 bits."""
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return len(weight) % 16 == 0 and weight[0].numel() % 16 == 0

    def _scale(self, name: str, part: Part) -> Tensor | None:
        if self.system.activations == Strategy.TOKEN:
            return None
        is_mixed = part is Part.TEXT and self.layout.is_multimodal
        count = 2 if self.system.activations == Strategy.MODALITY and is_mixed else 1
        return torch.tensor(INPUT_SCALES[:count], dtype=self._wide).to(self._device_of(name))

    def _splits(self, name: str) -> bool:
        return self.system.split and name in self.transformed

    def _linear(self, names: tuple[str, ...], part: Part) -> RuntimeLinear:
        modules: list[Any] = [self.model.get_submodule(name) for name in names]
        device, args = self._device_of(names[0]), self._scheme(part).weights
        num_in = modules[0].weight[0].numel()
        if names[0] in self.transformed:
            num_in = padded_size(num_in)
        num_out = sum(module.weight.shape[0] for module in modules)
        has_bias = any(module.bias is not None for module in modules)
        bias = self.values.normal((num_out,), self.dtype, device) if has_bias else None
        if self.system.activations == FLOAT8 and all(map(self._fits_float8, names)):
            return self._float8(num_out, num_in, device, bias)
        w0 = self._weight((num_out, 1), device)[:, 0] if self._splits(names[0]) else None
        if args is None:
            return FloatLinear(self._weight((num_out, num_in), device), bias, w0, w0 is not None)
        if self._scheme(part).activations is None:
            return self._weight_only(num_out, num_in, args, device, bias, w0)
        return self._integer(num_out, num_in, args, device, bias, w0)

    def _weight(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return self.values.normal(shape, self.dtype, device, 1 / math.sqrt(shape[1]))

    def _integer(
        self, num_out: int, num_in: int, args: QuantArgs, device: torch.device, bias: Tensor | None, w0: Tensor | None
    ) -> IntegerLinear:
        if args.num_bits <= PACKED_BITS and num_in % 2 == 0:
            levels = self.values.whole((num_out, num_in // 2), torch.uint8, device, 0, 255)
        else:
            levels = self.values.whole((num_out, num_in), torch.int8, device, -args.quant_max, args.quant_max)
        scale = torch.full((num_out,), self._level_scale(num_in, args), dtype=self._wide, device=device)
        return IntegerLinear(levels, scale, self.dtype, bias, w0)

    def _weight_only(
        self, num_out: int, num_in: int, args: QuantArgs, device: torch.device, bias: Tensor | None, w0: Tensor | None
    ) -> WeightOnlyLinear:
        group_size = args.group_size or num_in
        shape = num_out, -(-num_in // group_size)
        levels = self.values.whole((num_out, num_in // 2), torch.uint8, device, 0, 255)
        scale = torch.full(shape, self._level_scale(num_in, args), dtype=self._wide, device=device)
        zero_point = self.values.whole(shape, self._wide, device, -1, 0) if self.system.zero_point else None
        return WeightOnlyLinear(levels, scale, zero_point, group_size, bias, w0, w0 is not None)

    def _float8(self, num_out: int, num_in: int, device: torch.device, bias: Tensor | None) -> Float8Linear:
        bits = self.values.whole((num_out, num_in), torch.uint8, device, 0, 255)
        bits.masked_fill_((bits & FLOAT8_NAN) == FLOAT8_NAN, 0)
        scale = torch.full((num_out,), 1 / (FLOAT8_SPREAD * math.sqrt(num_in)), device=device)
        return Float8Linear(bits.view(FLOAT8_DTYPE), scale, self.dtype, bias)

    def _level_scale(self, num_in: int, args: QuantArgs) -> float:
        """Makes outputs as large as inputs: uniform levels have a standard deviation of 2^b / sqrt(12)."""
        return math.sqrt(12 / num_in) / 2**args.num_bits

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _device_of(self, name: str) -> torch.device:
        return place_of(name, self.device_map, self.device)


def place_of(name: str, places: Mapping[str, torch.device], device: torch.device) -> torch.device:
    """Where a module goes: where ``places`` sends it or one that it is in, else ``device``."""
    found = (place for block, place in places.items() if name == block or name.startswith(block + "."))
    return next(found, device)
