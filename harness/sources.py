"""Which models a request means, and where their weights are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqbench.harness import discover
from mqbench.harness.errors import MissingWeightsError, NonFiniteError, RequestError
from mqbench.harness.fingerprint import combined_hash, folder_bytes, folder_hash
from mqbench.harness.quant.scheme import Recipe
from mqbench.harness.record import CalibrationInfo

if TYPE_CHECKING:
    from mqbench.harness.models.adapter import ModelAdapter

ALL = "all"
FOLDER_MARK = "@"
"""Between a model's name and the folder of its quantized form."""

PROVENANCE_FILE = "provenance.json"
EARLY_CHECK_BYTES = 2**30
"""Weights up to this size are searched for NaN and Inf before anything runs; larger ones when they are loaded."""


@dataclass(frozen=True)
class Provenance:
    """What ``mqbench quantize`` leaves beside a quantized model for ``eval``.

    Attributes:
        method_version: Version of the method that made it.
        calibration: The samples it saw, or None.
        prompt_hashes: Content hashes of those samples, by which an overlap with evaluated rows is found.
    """

    method_version: str
    calibration: CalibrationInfo | None
    prompt_hashes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        (folder / PROVENANCE_FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        """Reads what ``write`` wrote.

        Raises:
            MissingWeightsError: the file is missing or damaged.
        """
        path = folder / PROVENANCE_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            calibration = data["calibration"] and CalibrationInfo(**data["calibration"])
            return cls(data["method_version"], calibration, tuple(data["prompt_hashes"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MissingWeightsError(f"'{path}' cannot be read ({error}); run 'mqbench quantize' again") from None


@dataclass(frozen=True)
class Source:
    """A model whose weights were found.

    Attributes:
        model: Registered name.
        weights: Folder of the float weights.
        weights_sha256: Fingerprint of the float weights, and of the quantized ones where there are any.
        quantized: Folder written by ``mqbench quantize``, or None.
        recipe: How that folder was quantized.
        provenance: What is known about it.
        only_baseline: Nobody asked for this model, but a quantized one is compared to it.
    """

    model: str
    weights: Path
    weights_sha256: str
    quantized: Path | None = None
    recipe: Recipe | None = None
    provenance: Provenance | None = None
    only_baseline: bool = False

    @property
    def label(self) -> str:
        """The model as records name it: ``standin-qwen2-vl``, or ``standin-qwen2-vl@FOLDER``."""
        return self.model if self.quantized is None else f"{self.model}{FOLDER_MARK}{self.quantized.resolve().name}"


@dataclass(frozen=True)
class Sources:
    """What can run, and for every other registered model, how to get its weights."""

    found: tuple[Source, ...]
    missing: dict[str, str]


def find_sources(names: Sequence[str], models_dir: Path | None, trust_remote_code: bool = False) -> Sources:
    """Resolves registered names, ``all`` and folders of quantized models.

    Args:
        names: What was asked for.
        models_dir: The user's folder of weights.
        trust_remote_code: Models that need code from their own files may run it.

    Raises:
        UnknownNameError: neither a registered model nor a folder.
        MissingWeightsError: a model asked for by name, or every one, lacks its weights.
        NonFiniteError: a weight is NaN or Inf.
        RequestError: a model asked for by name needs remote code, which is not trusted.
    """
    found: dict[tuple[str, Path | None], Source] = {}
    missing: dict[str, str] = {}
    for name in names:
        for source in (
            _all_sources(models_dir, trust_remote_code, missing)
            if name == ALL
            else _named_sources(name, models_dir, trust_remote_code)
        ):
            key = source.model, source.quantized
            if key not in found or found[key].only_baseline:
                found[key] = source
    if not found:
        hints = "; ".join(f"{name}: {how}" for name, how in missing.items())
        raise MissingWeightsError(
            f"no registered model has weights on this machine; {hints or 'install a model plug-in'}"
        )
    return Sources(tuple(found.values()), missing)


def _all_sources(models_dir: Path | None, trust_remote_code: bool, missing: dict[str, str]) -> list[Source]:
    found = []
    registry = discover.all_models()
    missing |= {f"broken plug-in {number}": str(error) for number, error in enumerate(registry.broken, start=1)}
    for name, adapter in registry.found.items():
        weights = adapter.find_weights(models_dir)
        if weights is None:
            missing[name] = adapter.how_to_get
        elif remote_code(adapter) and not trust_remote_code:
            missing[name] = _distrusted(adapter)
        else:
            found.append(_float_source(name, weights))
    return found


def _named_sources(name: str, models_dir: Path | None, trust_remote_code: bool) -> list[Source]:
    """The model, or the quantized model in a folder preceded by its float baseline."""
    if not is_quantized_folder(Path(name)):
        return [float_source(discover.find_model(name), models_dir, trust_remote_code)]
    from mqbench.harness.quant.serialize import read_saved

    folder = Path(name)
    saved = read_saved(folder)
    base = float_source(discover.find_model(saved.base_model), models_dir, trust_remote_code)
    _check_finite(folder)
    provenance = Provenance.read(folder)
    sha256 = current_hash(base.weights, folder)
    quantized = Source(base.model, base.weights, sha256, folder, saved.recipe, provenance)
    return [replace(base, only_baseline=True), quantized]


def is_quantized_folder(folder: Path) -> bool:
    return folder.is_dir() and (folder / PROVENANCE_FILE).is_file()


def float_source(adapter: ModelAdapter, models_dir: Path | None, trust_remote_code: bool = False) -> Source:
    """A registered model's weights.

    Raises:
        MissingWeightsError: they were not found.
        RequestError: the model needs remote code, which is not trusted.
        NonFiniteError: one is NaN or Inf.
    """
    weights = adapter.find_weights(models_dir)
    if weights is None:
        raise MissingWeightsError(f"weights of '{adapter.name}' were not found; {adapter.how_to_get}")
    if remote_code(adapter) and not trust_remote_code:
        raise RequestError(_distrusted(adapter))
    return _float_source(adapter.name, weights)


def remote_code(adapter: ModelAdapter) -> str | None:
    """What of a model is code among its own files (``tokenizer``) that a user must allow; None for most models."""
    return getattr(adapter, "needs_remote_code", None)


def _distrusted(adapter: ModelAdapter) -> str:
    return (
        f"the {remote_code(adapter)} of '{adapter.name}' is Python code among the model's files; read it, then pass "
        "--trust-remote-code to let it run"
    )


def current_hash(weights: Path, quantized: Path | None = None) -> str:
    """Fingerprint of the files as they are now."""
    sha256 = folder_hash(weights)
    return sha256 if quantized is None else combined_hash(sha256, folder_hash(quantized))


def _float_source(name: str, weights: Path) -> Source:
    _check_finite(weights)
    return Source(name, weights, current_hash(weights))


def _check_finite(folder: Path) -> None:
    """Looks for NaN and Inf in small models, so that a damaged file is an error at once and not a failed cell."""
    import torch
    from safetensors import SafetensorError, safe_open

    if folder_bytes(folder) > EARLY_CHECK_BYTES:
        return
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                bad = next((key for key in tensors.keys() if _is_broken(tensors.get_tensor(key), torch)), None)  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise MissingWeightsError(f"'{path}' cannot be read ({error}); get the file again") from None
        if bad is not None:
            raise NonFiniteError(f"weight '{bad}' of '{path}' holds NaN or Inf; get the file again")


def _is_broken(tensor: Any, torch: Any) -> bool:
    return bool(tensor.is_floating_point()) and not bool(torch.isfinite(tensor).all())
