"""The architecture that a sweep measures: a registered name or a configuration file, with entries changed at will.

No weights are read: times and memory do not depend on them. The real models' sizes stand in ``harness/blueprints``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mqbench.harness.blueprint import Blueprint, load_blueprint, load_blueprints
from mqbench.harness.errors import RequestError, UnknownNameError
from mqbench.harness.models import standin
from mqbench.harness.record import canonical_json
from mqbench.harness.runtime.family import family_of
from mqbench.harness.sweep.protocol import ImageRules

MODEL_TYPE = "qwen2_vl"
STANDIN = "standin-qwen2-vl"
STANDIN_FOLDER = Path(next(iter(standin.__path__))) / "weights" / STANDIN
CONFIG_FILE = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
MAX_CONFIG_BYTES = 1 << 20

TEXT_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
        "use_sliding_window": False,
    }
)
TOKEN_IDS: Mapping[str, int] = MappingProxyType(
    {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }
)
"""What blueprints leave out: the config.json of every Qwen2-VL says the same."""

DEFAULT_AREA = (56 * 56, 16384 * 28 * 28)
"""Smallest and largest area of an image in pixels, as the released checkpoints' preprocessors have them."""


@dataclass(frozen=True)
class SweepModel:
    """An architecture.

    Attributes:
        name: As records name it; entries that a user changed stand in brackets behind it.
        config: The configuration as JSON text.
        rules: Its image preprocessor.
    """

    name: str
    config: str
    rules: ImageRules

    @property
    def sha256(self) -> str:
        """Hash of configuration and image rules."""
        return hashlib.sha256(f"{self.config}\n{self.rules}".encode()).hexdigest()

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.config)

    def check(self) -> None:
        """Makes the model without memory for its weights.

        Raises:
            RequestError: sizes that do not fit together.
        """
        config = self.build_config()
        text = config.text_config
        width, sections = text.hidden_size // text.num_attention_heads, text.rope_parameters.get("mrope_section", ())
        if 2 * sum(sections) != width:
            raise RequestError(f"heads of '{self.name}' are {width} wide, its mrope_section needs {2 * sum(sections)}")
        try:
            family_of(config).empty_model(config)
        except Exception as error:  # modules refuse sizes in many ways
            reason = " ".join(str(error).split())
            raise RequestError(f"no model can be made of the configuration of '{self.name}': {reason}") from error

    def build_config(self) -> Any:
        """The configuration as transformers' class.

        Raises:
            RequestError: transformers refuses it.
        """
        from transformers import Qwen2VLConfig

        try:
            return Qwen2VLConfig.from_dict(self.data)
        except Exception as error:  # validation of transformers and huggingface_hub raises many kinds
            reason = " ".join(str(error).split())
            raise RequestError(f"transformers refuses the configuration of '{self.name}': {reason}") from error


def known_models() -> tuple[str, ...]:
    """Names that need no configuration file."""
    return (STANDIN, *(one.name for one in load_blueprints() if one.vision.kind == MODEL_TYPE))


def find_sweep_model(
    name: str | None, file: Path | None, settings: Mapping[str, Any], max_px: int | None = None
) -> SweepModel:
    """The architecture that a user asks for.

    Args:
        name: A registered name, or None with a file.
        file: A config.json; the preprocessor's file beside it is read when there is one.
        settings: Entries to change, ``text_config.num_hidden_layers`` -> 2.
        max_px: Largest area of an image in pixels, in place of the preprocessor's.

    Raises:
        RequestError: both or none of name and file; the file cannot be used; a value of the wrong type.
        UnknownNameError: no such model or entry.
    """
    if (name is None) == (file is None):
        raise RequestError("give either --model or --config, not both")
    if file is not None:
        label, data, area = file.stem if file.stem != "config" else file.resolve().parent.name, _read(file), _area(file)
    elif name == STANDIN:
        path = STANDIN_FOLDER / CONFIG_FILE
        label, data, area = STANDIN, _read(path), _area(path)
    else:
        assert name is not None
        if name not in known_models():
            raise UnknownNameError("model of sweeps", name, known_models())
        blueprint = load_blueprint(name)
        label, data = name, config_of(blueprint)
        area = (blueprint.image["min_pixels"], blueprint.image["max_pixels"])
    for key, value in settings.items():
        _set(data, key, value)
    changes = dict(settings) if max_px is None else {**settings, "max_pixels": max_px}
    label += "[" + ",".join(f"{key}={value}" for key, value in sorted(changes.items())) + "]" if changes else ""
    return SweepModel(label, canonical_json(data), _rules(data, area[0], max_px or area[1], label))


def config_of(blueprint: Blueprint) -> dict[str, Any]:
    """The configuration of a Qwen2-VL blueprint, as in its config.json."""
    vision, llm = blueprint.vision, blueprint.llm
    return {
        "model_type": MODEL_TYPE,
        "vision_config": {
            "depth": vision.num_layers,
            "embed_dim": vision.hidden_size,
            "hidden_size": llm.hidden_size,
            "hidden_act": vision.hidden_act,
            "mlp_ratio": vision.intermediate_size // vision.hidden_size,
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "spatial_merge_size": blueprint.image["factor_px"] // vision.patch_size,
            "temporal_patch_size": 2,
        },
        "text_config": {
            "hidden_size": llm.hidden_size,
            "intermediate_size": llm.intermediate_size,
            "num_hidden_layers": llm.num_layers,
            "num_attention_heads": llm.num_heads,
            "num_key_value_heads": llm.num_key_value_heads,
            "vocab_size": llm.vocab_size,
            "tie_word_embeddings": llm.tied,
            **TEXT_SETTINGS,
        },
        "tie_word_embeddings": llm.tied,
        **TOKEN_IDS,
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise RequestError(f"'{file.name}' is too large for a config.json; give the model's config.json")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read --config '{file}': {error.strerror}") from error
    except ValueError as error:
        raise RequestError(f"--config '{file.name}' is no JSON: {error}") from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind != MODEL_TYPE:
        raise RequestError(f"--config '{file.name}' is of model_type {kind!r}; sweeps know '{MODEL_TYPE}' only")
    if "text_config" not in data:  # the released checkpoints' files have the LLM's entries at the top
        data = _nested(data)
    for part in ("text_config", "vision_config"):
        if not isinstance(data.get(part), dict):
            raise RequestError(f"--config '{file.name}' lacks '{part}'; give a complete config.json")
    data["text_config"].pop("layer_types", None)  # follows from the number of layers, which --set may change
    return data


def _nested(data: dict[str, Any]) -> dict[str, Any]:
    top = {"model_type", "vision_config", "tie_word_embeddings", *TOKEN_IDS}
    text = {key: value for key, value in data.items() if key not in top | {"architectures", "torch_dtype", "dtype"}}
    return {key: value for key, value in data.items() if key in top} | {"text_config": text}


def _area(file: Path) -> tuple[int, int]:
    for name in PROCESSOR_FILES:
        path = file.parent / name
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            data = data.get("image_processor", data)
            size = data.get("size") or {}
            low = data.get("min_pixels", size.get("shortest_edge", DEFAULT_AREA[0]))
            high = data.get("max_pixels", size.get("longest_edge", DEFAULT_AREA[1]))
            return int(low), int(high)
    return DEFAULT_AREA


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        if not isinstance(data.get(parent), dict):
            raise UnknownNameError("part of the configuration", ".".join(parents[: depth + 1]), _parts(data))
        data = data[parent]
    if last not in data:
        raise UnknownNameError("entry of the configuration", last, data)
    if isinstance(value, bool) != isinstance(data[last], bool) or not isinstance(value, type(data[last])):
        kind = type(data[last]).__name__
        raise RequestError(f"--set {key} must be of type {kind}, as {data[last]!r} is; got {value!r}")
    data[last] = value


def _parts(data: Mapping[str, Any]) -> list[str]:
    return [key for key, value in data.items() if isinstance(value, dict)]


def _rules(data: Mapping[str, Any], min_px: int, max_px: int, label: str) -> ImageRules:
    vision = data["vision_config"]
    try:
        rules = ImageRules(int(vision["patch_size"]), int(vision.get("spatial_merge_size", 2)), min_px, max_px)
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"the vision_config of '{label}' has no usable patch_size ({error})") from None
    if rules.patch_px < 1 or rules.merge < 1:
        raise RequestError(f"patch_size and spatial_merge_size of '{label}' must be at least 1")
    if max_px < max(min_px, rules.token_px**2):
        raise RequestError(f"--max-pixels must be at least {max(min_px, rules.token_px**2)}, got {max_px}")
    return rules
