"""Proofs that a layout says the truth about its family, on tiny random models and on meta tensors: no weights needed.

* ``names``: every linear of the model is quantized or a written exception, every declared name exists.
* ``shapes``: the released sizes, on the meta device, agree with every name and width of the layout.
* ``exact METHOD``: a method with all its bits left out (transforms alone) leaves the float64 outputs as they are.
* ``runs METHOD BITS``: the method quantizes the family and its outputs are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mqbench.harness import discover
from mqbench.harness.errors import LayoutError, MQBenchError
from mqbench.harness.models.family import Family, tiny_model
from mqbench.harness.quant.layout import Attention, Layout, Tower
from mqbench.harness.quant.scheme import Recipe, parse_bits
from mqbench.harness.quant.session import Batch
from mqbench.kernels.hadamard import is_supported

TOLERANCE = 1e-9
"""Largest relative change of float64 outputs."""

FLOAT = ("float", "float")
SWITCHES: Sequence[Mapping[str, Any]] = ({}, {"ln2rms": False}, {"rotation": False}, {"online_hadamard": False})
"""Recipe options that leave a transform out; a method is only given those that it knows."""

BITS = ("w8a8/w4a8", "w4a8/w4a8", "w4a16-g16/w4a16-g16")
SEEDS = MappingProxyType({"weights": 0, "inputs": 1, "calibration": 2})


@dataclass(frozen=True)
class Proof:
    """One statement about a family and how to test it.

    Attributes:
        name: What is proved.
        run: Returns what was seen.

    ``run`` raises an ``MQBenchError`` that says what is wrong.
    """

    name: str
    run: Callable[[], str]


@dataclass(frozen=True)
class Outcome:
    """What came of a proof: ``detail`` says what was seen, or what is wrong."""

    name: str
    ok: bool
    detail: str


def proofs(family: Family) -> Iterator[Proof]:
    """Every proof for a family, cheap ones first."""
    yield Proof("names", partial(_names, family))
    for size, config in family.configs.items():
        yield Proof(f"shapes {size}", partial(_released, family, config))
    for method in discover.all_methods().found.values():
        known = {option.name for option in getattr(method, "options", ())}
        for switches in SWITCHES:
            if set(switches) <= known:
                label = " ".join(["exact", method.name, *(f"{key}=false" for key in switches)])
                yield Proof(label, partial(_exact, family, method, switches))
        for bits in BITS:
            if method.name != "none":
                yield Proof(f"runs {method.name} {bits}", partial(_runs, family, method, bits))


def outcome_of(proof: Proof) -> Outcome:
    """Runs a proof; an error of ours is its outcome, any other comes out."""
    try:
        return Outcome(proof.name, True, proof.run())
    except MQBenchError as error:
        return Outcome(proof.name, False, str(error))


def check_layout(layout: Layout, model: nn.Module) -> None:
    """Every name, every linear and every width.

    Raises:
        LayoutError: names what is wrong.
    """
    layout.check(model)
    check_shapes(layout, model)


def check_shapes(layout: Layout, model: nn.Module) -> None:
    """Widths of everything that the layout names fit together.

    Raises:
        LayoutError: names the module whose shape differs from what the layout says.
    """
    for tower in layout.towers:
        for reader in tower.readers:
            _expect(reader.name, "input", _weight(model, reader.name)[0].numel(), reader.chunks * tower.hidden_size)
        for name in tower.writers:
            _expect(name, "output", _written_width(model, name), tower.hidden_size)
        if not is_supported(tower.hidden_size):
            raise LayoutError(
                f"no Hadamard matrix of width {tower.hidden_size} is known, so the {tower.part} stays unrotated"
            )
        _check_branches(tower, model)
    for attention in layout.attentions:
        _check_attention(attention, model)


def _check_branches(tower: Tower, model: nn.Module) -> None:
    for path in (path for block in tower.blocks for path in block.paths):
        for name in (path.attention.out, path.mlp_out):
            _expect(name, "output", _weight(model, name).shape[0], tower.hidden_size)
        if path.mlp_up is not None:
            widths = _weight(model, path.mlp_up).shape[0], _weight(model, path.mlp_out).shape[1]
            _expect(path.mlp_up, "output", *widths)
    for name, _ in (scale for block in tower.blocks for scale in block.scales):
        _expect(name, "length", model.get_parameter(name).numel(), tower.hidden_size)


def _check_attention(attention: Attention, model: nn.Module) -> None:
    rows = torch.arange(_weight(model, attention.value).shape[0])[attention.value_index]
    _expect(attention.value, "number of value rows", len(rows), attention.num_kv_heads * attention.head_dim)
    width = attention.num_heads * attention.head_dim
    _expect(attention.out, "input", _weight(model, attention.out).shape[1], width)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = getattr(model.get_submodule(name), "weight", None)
    if not isinstance(weight, Tensor):
        raise LayoutError(f"'{name}' has no weight; name a linear, convolution or embedding")
    return weight


def _written_width(model: nn.Module, name: str) -> int:
    parent, _, attribute = name.rpartition(".")
    own = getattr(model.get_submodule(parent), attribute)
    if isinstance(own, nn.Embedding):
        return own.embedding_dim
    return own.shape[-1] if isinstance(own, Tensor) else own.weight.shape[0]


def _expect(name: str, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise LayoutError(f"the {what} of '{name}' is {found}, but the layout makes it {wanted}")


def _names(family: Family) -> str:
    model = tiny_model(family, torch.float32)
    layout = family.layout(model)
    check_layout(layout, model)
    if layout != family.layout(family.tiny_config()):
        raise LayoutError("the layout of the model differs from that of its config")
    return f"{len(layout.quantized_linears())} linears to quantize, {len(layout.unquantized)} exceptions"


def _released(family: Family, config: Callable[[], Any]) -> str:
    with torch.device("meta"):
        model = family.build(config())
    layout = family.layout(model)
    check_layout(layout, model)
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e9:.2f} billion parameters"


def _exact(family: Family, method: Any, switches: Mapping[str, Any]) -> str:
    model, batch = _tiny(family, torch.float64)
    expected = outputs(model, batch)
    calibration = [_inputs(family, model, SEEDS["calibration"])]
    method.quantize(model, family.layout(model), Recipe(method.name, *FLOAT, 0, dict(switches)), calibration)
    error = ((outputs(model, batch) - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise LayoutError(f"float64 outputs move by {error:.1e} of their size, more than {TOLERANCE:.0e}")
    return f"float64 outputs move by {error:.1e}"


def _runs(family: Family, method: Any, bits: str) -> str:
    model, batch = _tiny(family, torch.float32)
    expected = outputs(model, batch)
    calibration = [_inputs(family, model, SEEDS["calibration"])]
    method.quantize(model, family.layout(model), Recipe(method.name, *parse_bits(bits), 0, {}), calibration)
    found = outputs(model, batch)
    if not torch.isfinite(found).all():
        raise LayoutError("outputs are NaN or Inf")
    if torch.equal(found, expected):
        raise LayoutError("outputs are those of the float model: nothing was quantized")
    signal_db = 20 * torch.log10(expected.norm() / (found - expected).norm())
    return f"{signal_db:.0f} dB over the noise"


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the tokens that are not padding, (tokens, vocabulary)."""
    is_float64 = next(model.parameters()).dtype == torch.float64
    with KeepFloat64() if is_float64 else nullcontext():
        return model(**batch).logits[batch["attention_mask"].bool()]


class KeepFloat64(TorchFunctionMode):
    """Whoever asks for float32 gets float64.

    Transformers rotates queries and keys of vision towers in float32, whatever the dtype, which turns a difference of
    1e-16 into one of 1e-7: no invariance could be checked to 1e-9.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        named = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _tiny(family: Family, dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    model = tiny_model(family, dtype, SEEDS["weights"])
    return model, _inputs(family, model, SEEDS["inputs"])


def _inputs(family: Family, model: nn.Module, seed: int) -> Batch:
    return family.tiny_inputs(model, torch.Generator().manual_seed(seed))
