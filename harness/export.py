"""``mqbench quantize``: a quantized model in a folder that ``mqbench eval --models FOLDER`` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mqbench.harness import discover
from mqbench.harness.errors import RequestError
from mqbench.harness.execute import Executor
from mqbench.harness.inputs import Inputs
from mqbench.harness.plan import Group, needs_data
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.quant.session import QuantReport
from mqbench.harness.request import Request, check_device, recipes_of, resolve_bits
from mqbench.harness.select import FLOAT_METHOD
from mqbench.harness.sources import PROVENANCE_FILE, Provenance, float_source, is_quantized_folder
from mqbench.harness.store import prepare_folder


@dataclass(frozen=True)
class Exported:
    """What was written where."""

    folder: Path
    recipe: Recipe
    report: QuantReport


def export(request: Request, folder: Path, say: Callable[[str], None]) -> Exported:
    """Quantizes one model and saves it.

    Args:
        request: With exactly one model, method and bit setting; its tasks are not used.
        folder: New, empty, or holding a quantized model that is replaced.
        say: Told what happens.

    Raises:
        MQBenchError: the request is wrong, or the folder cannot be written.
    """
    method = discover.find_method(request.methods[0])
    if method.name == FLOAT_METHOD:
        raise RequestError("method 'none' quantizes nothing; choose another --method, see 'mqbench methods'")
    recipe = recipes_of(request, [method], resolve_bits(request.bits))[0]
    check_device(request)
    _check_folder(folder)
    source = float_source(discover.find_model(request.models[0]), request.models_dir, request.trust_remote_code)
    inputs = Inputs(request)
    info = inputs.calibration(source) if needs_data(method, recipe) else None
    executor = Executor(request, request.device, notify=lambda _: None)
    group = Group(source, recipe, info)
    say(f"loading {source.model}")
    loaded = executor.load(group)
    say(f"quantizing with {recipe.label} {recipe.bits}")
    report = executor.quantize(loaded, group)
    assert report is not None
    _save(folder, loaded, report, recipe)
    hashes = () if info is None else inputs.calibration_hashes(source)
    Provenance(discover.method_version(method), info, hashes).write(folder)
    return Exported(folder, recipe, report)


def _save(folder: Path, loaded: object, report: QuantReport, recipe: Recipe) -> None:
    from mqbench.harness.quant.serialize import save_quantized

    (folder / PROVENANCE_FILE).unlink(missing_ok=True)
    save_quantized(loaded.model, report, recipe, folder, loaded.name)  # type: ignore[attr-defined]


def _check_folder(folder: Path) -> None:
    prepare_folder(folder)
    if any(folder.iterdir()) and not is_quantized_folder(folder):
        raise RequestError(f"'{folder}' holds other files; give --out an empty or new folder")
