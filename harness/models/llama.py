"""Text-only causal LMs: the layout of LLaMA and its relatives, their inputs, and the registered models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mqbench.harness.errors import DatasetError
from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.decoding import greedy_answers, left_padded
from mqbench.harness.models.family import Family, prompts
from mqbench.harness.models.towers import HEAD, llm_tower
from mqbench.harness.models.weights import (
    TEXT_FILES,
    check_complete,
    check_finite_weights,
    find_folder,
    from_pretrained,
)
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.session import Batch

FAMILY_NAME = "llama"
TEXT = "model"
ATTENTION = "sdpa"
SHIPPED_WEIGHTS = Path(__file__).parent / "standin_text" / "weights"


def llama_layout(model_or_config: nn.Module | Any) -> Layout:
    """The layout of a ``LlamaForCausalLM`` or of its config.

    Mistral and Qwen2 have the same modules; biases (Qwen2's q, k and v) need no word here.
    """
    config: Any = getattr(model_or_config, "config", model_or_config)
    return Layout(
        family=FAMILY_NAME,
        text=llm_tower(config, TEXT),
        vision=None,
        patch_embed=None,
        projector=(),
        unquantized=(HEAD,),
        image_token_id=None,
        vision_root=None,
        text_root=TEXT,
    )


@dataclass(frozen=True)
class LlamaAdapter:
    """One registered text-only model.

    Attributes:
        name: As users type it.
        paper_name: Its row in the paper's tables, or None.
        how_to_get: One line for users who lack the weights.
        repo_id: Its Hugging Face repository; None when it ships with the project.
        context_length: Tokens per window of the perplexity task.
        modality: What tasks it fits.
        max_new_tokens: None: the benchmarks' own limit.
    """

    name: str
    paper_name: str | None
    how_to_get: str
    repo_id: str | None
    context_length: int
    modality: str = "text"
    max_new_tokens: int | None = None

    def find_weights(self, models_dir: Path | None) -> Path | None:
        """The shipped folder; or ``models_dir/NAME``; or the snapshot in the Hugging Face cache; or None."""
        return find_folder(self.name, self.repo_id, SHIPPED_WEIGHTS, models_dir, TEXT_FILES)

    def load(self, path: Path, device: str, dtype: torch.dtype) -> LoadedModel:
        """Loads weights and tokenizer (``LoadedModel.processor``) from local files.

        Raises:
            LayoutError: the folder holds a model of another family.
            MissingWeightsError: the folder lacks a file or a weight, or a file cannot be read.
            NonFiniteError: a weight is NaN or Inf.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        check_complete(path, self.how_to_get, TEXT_FILES)
        model = from_pretrained(AutoModelForCausalLM, path, dtype, ATTENTION, self.how_to_get)
        check_finite_weights(model)
        layout = llama_layout(model)
        layout.check(model)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return LoadedModel(self.name, model.to(device).eval().requires_grad_(False), tokenizer, layout)

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; texts of a message follow one another.

        There is no chat template: these are base models, which continue a text. Answers are tokens behind the prompt's.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T).

        Raises:
            DatasetError: a message has an image.
        """
        tokenizer = loaded.processor
        rows = [tokenizer(_text(self.name, message))["input_ids"] for message in messages]
        if answers is not None:
            tails = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
            rows = [row + tail for row, tail in zip(rows, tails, strict=True)]
        device = next(loaded.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in left_padded(rows, _pad_id(tokenizer)).items()}

    def generate(self, loaded: LoadedModel, batch: Batch, max_new_tokens: int) -> list[str]:
        """Greedy continuations of one encoded batch, without special tokens."""
        return greedy_answers(loaded.model, loaded.processor, batch, max_new_tokens, _pad_id(loaded.processor))


def _released(size: str) -> LlamaAdapter:
    name, repo_id = f"llama-2-{size}", f"meta-llama/Llama-2-{size}-hf"
    how_to_get = f"put {repo_id} (config, tokenizer, safetensors) into MODELS_DIR/{name} and pass --models-dir"
    return LlamaAdapter(name, f"llama2-{size}", how_to_get, repo_id, context_length=2048)


ADAPTERS: tuple[LlamaAdapter, ...] = (
    LlamaAdapter(
        "standin-llama",
        None,
        "ships with mqbench: reinstall it, or run 'mqbench standin-text train'",
        repo_id=None,
        context_length=256,
    ),
    _released("7b"),
    _released("13b"),
    _released("70b"),
)


def _text(name: str, message: Message) -> str:
    if any(item["type"] != "text" for item in message):
        raise DatasetError(f"model '{name}' reads text only; choose a multimodal model, or rows without images")
    return "".join(item["value"] for item in message)


def _pad_id(tokenizer: Any) -> int:
    """LLaMA-2's tokenizer has no padding token; what stands at masked places does not matter."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
TINY = (48, 96, 2, 6, 2, 64)
RELEASED: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
        "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
        "llama-2-70b": (8192, 28672, 80, 64, 8, 32000),
    }
)


def _build(config: Any) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config)


def _config(sizes: Sequence[int]) -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(**dict(zip(SIZES, sizes, strict=True)), pad_token_id=0)
    config._attn_implementation = ATTENTION
    return config


def _tiny_inputs(model: Any, generator: torch.Generator) -> Batch:
    return prompts((0, 0, 0), 0, model.config.vocab_size, generator)


FAMILY = Family(
    name=FAMILY_NAME,
    build=_build,
    layout=llama_layout,
    tiny_config=partial(_config, TINY),
    tiny_inputs=_tiny_inputs,
    configs={name: partial(_config, sizes) for name, sizes in RELEASED.items()},
)
