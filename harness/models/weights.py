"""Where a model's files are on this machine, whether they are all there, and whether its numbers are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mqbench.harness.errors import MissingWeightsError, NonFiniteError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
"""Older checkpoints (Qwen-VL-Chat); transformers reads tensors from them and nothing else."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
FileChoices = tuple[tuple[str, ...], ...]
"""Of each group of names a model folder needs one; errors name the first."""

MULTIMODAL_FILES: FileChoices = ((CONFIG_FILE,), TOKENIZER_FILES, PROCESSOR_FILES)
TEXT_FILES: FileChoices = ((CONFIG_FILE,), (*TOKENIZER_FILES, "tokenizer.model"))


def find_folder(
    name: str, repo_id: str | None, shipped: Path, models_dir: Path | None, needed: FileChoices = MULTIMODAL_FILES
) -> Path | None:
    """The folder of a model's weights, or None.

    Args:
        name: Of the model.
        repo_id: Its Hugging Face repository; None: it ships as ``shipped/NAME``.
        shipped: Where shipped weights are.
        models_dir: The user's; searched for ``NAME`` and the repository's name, before the Hugging Face cache.
        needed: What a snapshot in the cache must hold beside weights.
    """
    if repo_id is None:
        return shipped / name if (shipped / name).is_dir() else None
    if models_dir is not None:
        for folder in (models_dir / name, models_dir / repo_id.rpartition("/")[2]):
            if folder.is_dir():
                return folder
    return cached_snapshot(repo_id, needed)


def cached_snapshot(repo_id: str, needed: FileChoices = MULTIMODAL_FILES) -> Path | None:
    """The complete snapshot of a Hugging Face repository in the local cache, or None. Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, CONFIG_FILE)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if missing_file(folder, needed) is None else None


def missing_file(folder: Path, needed: FileChoices = MULTIMODAL_FILES) -> str | None:
    """The first file that a model folder lacks: one of ``needed``, weights or one of their shards."""
    for choices in (*needed, (WEIGHTS_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE)):
        if not any((folder / name).is_file() for name in choices):
            return choices[0]
    whole = {WEIGHTS_FILE: INDEX_FILE, PICKLED_FILE: PICKLED_INDEX_FILE}
    present = next(name for pair in whole.items() for name in pair if (folder / name).is_file())
    if present in whole:
        return None
    shards = sorted(set(json.loads((folder / present).read_text())["weight_map"].values()))
    return next((shard for shard in shards if not (folder / shard).is_file()), None)


def check_complete(folder: Path, how_to_get: str, needed: FileChoices = MULTIMODAL_FILES) -> None:
    """Raises MissingWeightsError when ``folder`` lacks a file that a model needs."""
    missing = missing_file(folder, needed)
    if missing is not None:
        raise MissingWeightsError(f"'{folder}' lacks {missing}; {how_to_get}")


def from_pretrained(model_class: Any, path: Path, dtype: torch.dtype, attention: str, how_to_get: str) -> nn.Module:
    """A transformers model from local files.

    Raises:
        MissingWeightsError: a file cannot be read, or a weight is missing.
    """
    from safetensors import SafetensorError

    options = {"dtype": dtype, "attn_implementation": attention, "local_files_only": True, "output_loading_info": True}
    try:
        with no_progress_bar():
            model, info = model_class.from_pretrained(path, **options)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a configuration of no causal LM
        reason = " ".join(str(error).split())
        raise MissingWeightsError(f"'{path}' cannot be loaded ({reason}); {how_to_get}") from None
    if info["missing_keys"]:
        raise MissingWeightsError(f"'{path}' lacks the weight '{min(info['missing_keys'])}'; {how_to_get}")
    return model


def check_finite_weights(model: nn.Module) -> None:
    """Raises NonFiniteError naming the first weight that holds NaN or Inf."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"weight '{name}' holds NaN or Inf; the file is damaged or overflowed, get it again")


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keeps transformers' own bars off the terminal, where ours stand."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
