"""The runtime's modules from a calibrated quantized model: its integer weights are taken over, not copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mqbench.harness.errors import RequestError
from mqbench.harness.quant.integer import quant_linears, use_integer_backend
from mqbench.harness.quant.kv_cache import QUANTIZER
from mqbench.harness.quant.layout import Layout, Part
from mqbench.harness.quant.linear import QuantLinear
from mqbench.harness.quant.scheme import QuantArgs, Scheme, Strategy
from mqbench.harness.quant.transforms import OnlineHadamard
from mqbench.harness.quant.weight import round_to_nearest
from mqbench.harness.runtime.linears import FloatLinear, IntegerLinear, RuntimeLinear, WeightOnlyLinear
from mqbench.harness.runtime.parts import GEMM_PARTS, LLM_GEMM
from mqbench.harness.runtime.pointwise import RowNorm
from mqbench.harness.runtime.projection import Projection
from mqbench.harness.runtime.rows import Rows
from mqbench.harness.runtime.site import FloatSite, IntegerSite, OnlineHadamardRows, Site
from mqbench.harness.runtime.systems import Order, System
from mqbench.kernels import api

HEAD_ACTIVATION_BITS = 8
PACKED_BITS = 4


class QuantizedSource:
    """``fuse.Source`` over a model whose quantized linears run in integers.

    Args:
        model: Its linears are ``QuantLinear``, or those of torch where nothing is quantized.
        layout: Its layout.
        system: How to run it.
        rows: What the LLM's sites read.

    Raises:
        RequestError: something cannot run in integers, or is not what the system says.
    """

    def __init__(self, model: nn.Module, layout: Layout, system: System, rows: Rows) -> None:
        _check_kv_cache(model)
        report = use_integer_backend(model)
        for name, reason in report.simulated.items():
            raise RequestError(f"'{name}' cannot run in integers: {reason}; choose other bits or activations")
        check_system(model, layout, system)
        self.model, self.layout, self.system, self.rows = model, layout, system, rows

    def projection(self, names: tuple[str, ...], part: Part) -> Projection:
        modules = [self.model.get_submodule(name) for name in names]
        linears = [
            module if isinstance(module, QuantLinear) else QuantLinear.from_module(module, name)
            for name, module in zip(names, modules, strict=True)
        ]
        sites = [self._site(linear, part) for linear in linears]
        return Projection(sites, [_linear(linear) for linear in linears], GEMM_PARTS[part], self.system.fused)

    def norm(self, name: str) -> RowNorm:
        return RowNorm.from_module(self.model.get_submodule(name), name)

    def head(self, name: str) -> Projection:
        module: Any = self.model.get_submodule(name)
        weight: Tensor = module.weight.detach()
        bias: Tensor | None = module.bias
        if self.system.head_bits is None:
            return Projection([FloatSite()], [FloatLinear(weight, bias)], LLM_GEMM)
        rounded = round_to_nearest(weight, QuantArgs(self.system.head_bits, strategy=Strategy.CHANNEL), name=name)
        levels = rounded.levels.to(weight.device).char().contiguous()
        levels = api.pack_int4(levels) if self.system.head_bits <= PACKED_BITS else levels
        linear = IntegerLinear(levels, rounded.grid.scale[:, 0].contiguous(), weight.dtype, bias)
        return Projection([IntegerSite(HEAD_ACTIVATION_BITS)], [linear], LLM_GEMM)

    def _site(self, linear: QuantLinear, part: Part) -> Site:
        transform: Any = linear.input_transform
        quantizer, is_hadamard = linear.input_quantizer, isinstance(transform, OnlineHadamard)
        if quantizer is None:
            return FloatSite(OnlineHadamardRows() if is_hadamard else transform)
        return IntegerSite(
            quantizer.args.num_bits,
            None if quantizer.args.dynamic else quantizer.scale,
            self.rows if part is Part.TEXT else None,
            hadamard=is_hadamard,
            transform=None if is_hadamard else transform,
            takes_x0=linear.x0_bypass,
            sliced=self.system.order is Order.SLICED,
        )


def system_of(model: nn.Module, layout: Layout) -> System:
    """The system that a quantized model already is: AIFS when it has scales per modality."""
    found = {part: _grids(model.get_submodule(name)) for name, part in reversed(layout.quantized_linears().items())}
    text_weights, text_inputs = found[Part.TEXT]
    strategy = None if text_inputs is None else str(text_inputs.strategy)
    bits = "/".join(_bits(*found.get(part, (None, None))) for part in (Part.VISION, Part.TEXT))
    order = Order.AIFS if strategy == Strategy.MODALITY else Order.ORIGINAL
    zero_point = text_weights is not None and not text_weights.symmetric
    return System("as-loaded", "as loaded", bits, strategy, order=order, zero_point=zero_point)


def check_system(model: nn.Module, layout: Layout, system: System) -> None:
    """Every linear has the grids that the system's name promises.

    Raises:
        RequestError: names the first that has not, and both grids.
    """
    for name, part in layout.quantized_linears().items():
        scheme = system.text_scheme if part is Part.TEXT else system.vision_scheme
        expected = _described(scheme.weights, _inputs_of(scheme, system, part is Part.TEXT and layout.is_multimodal))
        found = _described(*_grids(model.get_submodule(name)))
        if found != expected:
            raise RequestError(
                f"system '{system.name}' runs '{name}' as {expected}, but the model has {found}; "
                "quantize it for that system, or leave the system out"
            )


def _inputs_of(scheme: Scheme, system: System, is_mixed: bool) -> QuantArgs | None:
    if scheme.activations is None or system.activations is None:
        return None
    strategy = Strategy(system.activations)
    if strategy is Strategy.MODALITY and not is_mixed:
        strategy = Strategy.TENSOR
    return QuantArgs(scheme.activations.num_bits, strategy=strategy, dynamic=strategy is Strategy.TOKEN)


def _described(weights: QuantArgs | None, inputs: QuantArgs | None) -> str:
    if inputs is None:
        return _bits(weights, inputs)
    return f"{_bits(weights, inputs)} per {inputs.strategy}"


def _bits(weights: QuantArgs | None, inputs: QuantArgs | None) -> str:
    """A bit setting of ``scheme.scheme_named``."""
    if weights is None and inputs is None:
        return "float"
    group = "" if weights is None or weights.group_size is None else f"-g{weights.group_size}"
    return f"w{16 if weights is None else weights.num_bits}a{16 if inputs is None else inputs.num_bits}{group}"


def _grids(module: nn.Module) -> tuple[QuantArgs | None, QuantArgs | None]:
    """Grids of a linear's weight and input."""
    if not isinstance(module, QuantLinear):
        return None, None
    return module.weight_args, None if module.input_quantizer is None else module.input_quantizer.args


def _linear(linear: QuantLinear) -> RuntimeLinear:
    integer, bias = linear.integer, linear.bias
    if integer is None:
        w0 = linear.x0_weight
        if w0 is None and linear.x0_bypass:
            w0 = linear.weight.detach()[:, 0].clone()
        return FloatLinear(linear.weight, bias, w0, linear.x0_bypass)
    if linear.input_quantizer is not None:
        return IntegerLinear(integer.levels, integer.scale[:, 0].contiguous(), linear.weight.dtype, bias, integer.w0)
    assert linear.weight_args is not None
    group_size = linear.weight_args.group_size or linear.in_features
    grid = integer.scale, integer.zero_point, group_size
    return WeightOnlyLinear(integer.levels, *grid, bias, integer.w0, linear.x0_bypass)


def _check_kv_cache(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, QUANTIZER):
            raise RequestError(f"'{name}' has a quantized KV cache, which the runtime does not have; leave kv_bits out")


def contexts(model: nn.Module) -> list[Any]:
    """Modality contexts that the model's quantizers hold: one, kept by hooks on the model, or none."""
    quantizers = (linear.input_quantizer for linear in quant_linears(model).values())
    found = {id(q.context): q.context for q in quantizers if q is not None and q.context is not None}
    return list(found.values())
