"""Where a model's files are on this machine, whether they are all there, and whether its numbers are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from mqbench.harness.errors import MissingWeightsError, NonFiniteError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def cached_snapshot(repo_id: str) -> Path | None:
    """The complete snapshot of a Hugging Face repository in the local cache, or None. Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, CONFIG_FILE)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if missing_file(folder) is None else None


def missing_file(folder: Path) -> str | None:
    """The first file that a model folder lacks: config, tokenizer, processor, weights or one of their shards."""
    for choices in ((CONFIG_FILE,), TOKENIZER_FILES, PROCESSOR_FILES, (WEIGHTS_FILE, INDEX_FILE)):
        if not any((folder / name).is_file() for name in choices):
            return choices[0]
    if (folder / WEIGHTS_FILE).is_file():
        return None
    shards = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
    return next((shard for shard in shards if not (folder / shard).is_file()), None)


def check_complete(folder: Path, how_to_get: str) -> None:
    """Raises MissingWeightsError when ``folder`` lacks a file that a model needs."""
    missing = missing_file(folder)
    if missing is not None:
        raise MissingWeightsError(f"'{folder}' lacks {missing}; {how_to_get}")


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
