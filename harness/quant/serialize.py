"""Writes a quantized model to a folder and puts it back onto the float model, to the last bit.

``quantized.safetensors`` holds every parameter and persistent buffer, rounded weights as packed integer levels with
their scales. ``quantized.json`` says what the modules are. The float model supplies code, config and everything that
is derived from the config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mqbench.harness.errors import LayoutError, MissingWeightsError, MQBenchError, OutputError
from mqbench.harness.quant.activation import InputQuantizer
from mqbench.harness.quant.integer import quant_linears, simulated_weights
from mqbench.harness.quant.kv_cache import activate_kv_quantizers
from mqbench.harness.quant.linear import QuantLinear, wrap_linears
from mqbench.harness.quant.method import Restore
from mqbench.harness.quant.modality import ModalityContext, RowContext, row_context, track_modality
from mqbench.harness.quant.scheme import QuantArgs, Recipe, Strategy, Tokens
from mqbench.harness.quant.session import LayerReport, QuantReport
from mqbench.harness.quant.transforms import MODULES, build_module
from mqbench.harness.quant.weight import WeightGrid, dequantize, exact_levels

if TYPE_CHECKING:
    from mqbench.harness.models.adapter import LoadedModel

FORMAT_VERSION = 2
TENSORS_FILE = "quantized.safetensors"
STRUCTURE_FILE = "quantized.json"
LEVELS_SUFFIX = ".weight_levels"


@dataclass(frozen=True)
class SavedModel:
    """What a folder holds, without its tensors.

    Attributes:
        base_model: Registered name of the float model that it is put onto.
        recipe: How it was quantized.
        report: What that did.
    """

    base_model: str
    recipe: Recipe
    report: QuantReport


def save_quantized(model: nn.Module, report: QuantReport, recipe: Recipe, directory: Path, base_model: str) -> None:
    """Writes a quantized model. The structure file comes last, so a folder that has it is complete.

    What it writes does not depend on the backend that the model runs on.

    Raises:
        OutputError: the folder cannot be written.
    """
    with simulated_weights(model):
        tensors, tied = _model_tensors(model)
        linears = {name: _describe(linear, tensors) for name, linear in quant_linears(model).items()}
    structure = {
        "format_version": FORMAT_VERSION,
        "base_model": base_model,
        "recipe": asdict(recipe) | {"options": dict(recipe.options)},
        "report": asdict(report),
        "modules": _replaced_modules(model),
        "linears": linears,
        "tied": tied,
    }
    text = json.dumps(structure, indent=1, sort_keys=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / STRUCTURE_FILE).unlink(missing_ok=True)
        save_file(tensors, directory / (TENSORS_FILE + ".part"))
        os.replace(directory / (TENSORS_FILE + ".part"), directory / TENSORS_FILE)
        (directory / (STRUCTURE_FILE + ".part")).write_text(text)
        os.replace(directory / (STRUCTURE_FILE + ".part"), directory / STRUCTURE_FILE)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write a quantized model to '{directory}': {error}; choose another folder") from None


def read_saved(directory: Path) -> SavedModel:
    """Reads what a folder holds; tells which float model to load.

    Raises:
        MissingWeightsError: the folder holds no quantized model of this format.
    """
    structure = _read_structure(directory)
    recipe = Recipe(**structure["recipe"])
    report = structure["report"]
    layers = {name: LayerReport(**layer) for name, layer in report["layers"].items()}
    return SavedModel(structure["base_model"], recipe, QuantReport(layers, report["step_s"], report.get("kv_bits")))


def load_quantized(directory: Path, loaded: LoadedModel, restore: Restore | None = None) -> SavedModel:
    """Turns a freshly loaded float model, in place, into the quantized model that was saved. Logits are identical.

    Args:
        directory: Written by ``save_quantized``.
        loaded: The float model named by ``read_saved(directory).base_model``.
        restore: ``StepMethod.restore`` of the method named by ``read_saved(directory).recipe.method``.

    Raises:
        MissingWeightsError: the folder holds no quantized model of this format.
        LayoutError: the float model is another one than the saved model was made from.
    """
    saved = read_saved(directory)
    if saved.base_model != loaded.name:
        raise LayoutError(f"'{directory}' was made from '{saved.base_model}', not from '{loaded.name}'; load that one")
    structure, tensors = _read_structure(directory), _read_tensors(directory, loaded.model)
    model, layout = loaded.model, loaded.layout
    model.eval()
    model.requires_grad_(False)
    for name, config in structure["modules"].items():
        _set_submodule(model, name, build_module(config))
    context = ModalityContext()
    linears = wrap_linears(model, list(layout.quantized_linears()))
    if linears.keys() != structure["linears"].keys():
        raise LayoutError(f"'{directory}' holds other linears than '{loaded.name}' has; quantize the model again")
    for name, linear in linears.items():
        _rebuild_linear(linear, structure["linears"][name], tensors, row_context(layout, context, name))
    _assign_all(model, tensors, structure["tied"])
    track_modality(model, layout, context)
    activate_kv_quantizers(model, layout)
    if restore is not None:
        restore(model, layout, saved.recipe, context)
    return saved


def pack_levels(levels: Tensor, args: QuantArgs) -> Tensor:
    """Levels as bytes: two per byte up to 4 bits (low half first), one up to 8 bits, int32 above. Shape: 1-d."""
    offset = (levels - args.quant_min).flatten()
    if args.num_bits > 8:
        return offset.to(torch.int32)
    offset = offset.to(torch.uint8)
    if args.num_bits > 4:
        return offset
    pairs = nn.functional.pad(offset, (0, len(offset) % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_levels(packed: Tensor, args: QuantArgs, shape: tuple[int, int]) -> Tensor:
    """Inverse of ``pack_levels``: int32 levels of the given shape."""
    if args.num_bits <= 4:
        packed = torch.stack([packed & 15, packed >> 4], dim=1).flatten()[: shape[0] * shape[1]]
    return packed.to(torch.int32).view(shape) + args.quant_min


def _replaced_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Configs of the modules that a method put in place of others (online transforms belong to their linear)."""
    kinds = tuple(MODULES.values())
    inside = {id(part) for linear in quant_linears(model).values() for part in linear.modules()}
    named = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module.config() for name, module in named.items() if id(module) not in inside}  # type: ignore[operator]


def _model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every parameter and persistent buffer once, and the other names of shared parameters."""
    names: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = model.named_parameters(remove_duplicate=False)
    tied = {name: names[id(parameter)] for name, parameter in shared if names[id(parameter)] != name}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tensor.detach().contiguous().clone().cpu() for name, tensor in state.items()}, tied


def _describe(linear: QuantLinear, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The structure of a linear; swaps its rounded weight in ``tensors`` for packed levels."""
    transform, quantizer, args = linear.input_transform, linear.input_quantizer, linear.weight_args
    if transform is not None and not isinstance(transform, tuple(MODULES.values())):
        raise MQBenchError(f"the input transform of '{linear.name}' cannot be saved; add it to transforms.MODULES")
    levels = exact_levels(linear)
    if levels is not None and args is not None:
        del tensors[f"{linear.name}.weight"]
        tensors[linear.name + LEVELS_SUFFIX] = pack_levels(levels.cpu(), args)
    return {
        "shape": list(linear.weight.shape),
        "dtype": str(linear.weight.dtype).removeprefix("torch."),
        "transform": None if transform is None else transform.config(),  # type: ignore[attr-defined]
        "weights": None if args is None else asdict(args),
        "activations": None if quantizer is None else asdict(quantizer.args) | {"tokens": quantizer.tokens},
        "x0_bypass": linear.x0_bypass,
    }


def _rebuild_linear(
    linear: QuantLinear, entry: Mapping[str, Any], tensors: dict[str, Tensor], context: RowContext | None
) -> None:
    """Takes the linear's tensors out of ``tensors``."""
    prefix = f"{linear.name}."
    own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    if entry["transform"] is not None:
        linear.input_transform = build_module(entry["transform"])
    if entry["weights"] is not None:
        linear.weight_args = _args(entry["weights"])
        linear.weight_scale, linear.weight_zero_point = own["weight_scale"], own.get("weight_zero_point")
    linear.weight = nn.Parameter(_weight(linear, entry, own), requires_grad=False)
    linear.bias = nn.Parameter(own["bias"], requires_grad=False) if "bias" in own else None
    linear.x0_weight, linear.x0_bypass = own.get("x0_weight"), entry["x0_bypass"]
    if entry["activations"] is not None:
        activations = dict(entry["activations"])
        tokens = Tokens(activations.pop("tokens"))
        quantizer = InputQuantizer(linear.name, _args(activations), context, tokens=tokens)
        quantizer.scale = own["input_quantizer.scale"]
        linear.input_quantizer = quantizer


def _weight(linear: QuantLinear, entry: Mapping[str, Any], own: Mapping[str, Tensor]) -> Tensor:
    if "weight" in own:
        return own["weight"]
    assert linear.weight_args is not None
    out_features, in_features = entry["shape"]
    levels = unpack_levels(own[LEVELS_SUFFIX.removeprefix(".")], linear.weight_args, (out_features, in_features))
    grid = _grid(linear)
    return dequantize(levels, grid, linear.weight_args, getattr(torch, entry["dtype"]))


def _grid(linear: QuantLinear) -> WeightGrid:
    assert linear.weight_scale is not None
    return WeightGrid(linear.weight_scale, linear.weight_zero_point)


def _args(entry: Mapping[str, Any]) -> QuantArgs:
    return QuantArgs(**dict(entry) | {"strategy": Strategy(entry["strategy"])})


def _assign_all(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Sets parameters and buffers whatever shape they had, then ties what was tied and only that."""
    for key, tensor in tensors.items():
        parent, _, attribute = key.rpartition(".")
        module = model.get_submodule(parent)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
        else:
            module.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
    for alias, key in tied.items():
        parent, _, attribute = alias.rpartition(".")
        model.get_submodule(parent).register_parameter(attribute, model.get_parameter(key))


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _read_structure(directory: Path) -> dict[str, Any]:
    path = directory / STRUCTURE_FILE
    if not path.is_file():
        raise MissingWeightsError(f"'{directory}' holds no {STRUCTURE_FILE}; make it with 'mqbench quantize'")
    try:
        structure = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise MissingWeightsError(f"'{path}' cannot be read ({error}); make it again with 'mqbench quantize'") from None
    if structure.get("format_version") != FORMAT_VERSION:
        raise MissingWeightsError(f"'{path}' is of another format version; make it again with 'mqbench quantize'")
    return structure


def _read_tensors(directory: Path, model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    try:
        with safe_open(directory / TENSORS_FILE, framework="pt", device=str(device)) as file:
            # Copies: tensors in the file's memory are less aligned, and matrix products then differ in the last bit.
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (a file is no dict)
    except (OSError, SafetensorError) as error:
        raise MissingWeightsError(f"'{directory / TENSORS_FILE}' cannot be read: {error}; make it again") from None
