"""Tiny models of native families on disk, with tokenizer and processor, as their adapters load them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mqbench.harness.models.family import Family, tiny_model


def byte_tokenizer(special: Sequence[str], bos: str | None = None, **roles: Any) -> PreTrainedTokenizerFast:
    """Bytes as tokens, special tokens behind them; with ``bos`` in front of every text where it is given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
        roles["bos_token"] = bos
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def write_folder(folder: Path, family: Family, change: Callable[[Any], None], processor: Any) -> Path:
    """Saves a random tiny model of a family, its config changed to fit the processor, and the processor."""
    config = family.tiny_config()
    config.text_config.vocab_size = len(processor.tokenizer)
    config.text_config.pad_token_id = processor.tokenizer.pad_token_id
    config.text_config.bos_token_id = None
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    change(config)
    model: Any = tiny_model(replace(family, tiny_config=lambda: config), torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
