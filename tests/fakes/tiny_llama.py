"""A random LLaMA of a few thousand parameters in which every norm gain matters, its relatives, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

from fakes.tiny_qwen2_vl import randomize
from mqbench.harness.models.llama import llama_layout
from mqbench.harness.quant.layout import Layout

PAD_ID, BOS_ID, EOS_ID, FIRST_TEXT_ID = 0, 1, 2, 3
VOCABULARY = 64
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """2 x 48, MLP 96, 6 query heads on 2 key/value heads of width 8, vocabulary 64."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": False,
    }
    return FAMILIES[family][0](**sizes | changes)


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, family: str = "llama", **changes: Any) -> Any:
    """A random model in evaluation mode; in float64 it computes in float64 throughout (see ``_keep_float64``)."""
    config = tiny_config(family, **changes)
    config._attn_implementation = "sdpa"
    model = FAMILIES[family][1](config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            randomize(module, generator)
    model.tie_weights()
    model.generation_config.update(eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False)
    return model.to(dtype).eval()


def tiny_layout(model: nn.Module) -> Layout:
    """The layout of the real family, applied to the tiny model."""
    return llama_layout(model)


def tiny_batch(batch_size: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded rows of ``length`` down to ``length - batch_size + 1`` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(FIRST_TEXT_ID, VOCABULARY, (batch_size, length), generator=generator)
    attention_mask = (torch.arange(length) >= torch.arange(batch_size)[:, None]).long()
    return {"input_ids": torch.where(attention_mask.bool(), input_ids, PAD_ID), "attention_mask": attention_mask}


def _keep_float64() -> None:
    """Lets a float64 model stay in float64: transformers' RMSNorms compute in float32, whatever the dtype."""
    for owner in (modeling_llama.LlamaRMSNorm, modeling_mistral.MistralRMSNorm, modeling_qwen2.Qwen2RMSNorm):
        if not getattr(owner.forward, "keeps_float64", False):
            owner.forward = _float64_forward(owner.forward)


def _float64_forward(original: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float64:
            return original(self, hidden_states)
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    forward.keeps_float64 = True  # type: ignore[attr-defined]
    return forward


_keep_float64()
