"""What differs between the stand-ins' families, and how a batch reaches any of them.

Tasks, objective, ingredients of hardness and training are the same for all. A family says here what its tokenizer and
config are and how its files are written; how its blocks are built it has said in its layout, and how prompts and
pictures become inputs in its adapter, so a stand-in is trained on what ``mqbench eval`` will feed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mqbench.harness.errors import UnknownNameError
from mqbench.harness.models.standin.architecture import DEFAULT_SIZE, Size, initialize
from mqbench.harness.models.standin.grid import VisualGrid
from mqbench.harness.models.standin.objective import TrainBatch
from mqbench.harness.models.standin.prompts import PromptStyle
from mqbench.harness.models.standin.tasks import Example
from mqbench.harness.models.standin.tokenizer import Dialect, build_tokenizer
from mqbench.harness.quant.layout import Layout
from mqbench.harness.quant.session import Batch

DEFAULT_FAMILY = "qwen2-vl"
MODULES: Mapping[str, str] = MappingProxyType(
    {
        DEFAULT_FAMILY: "qwen2_vl",
        "glm-4v": "glm_4v",
        "internvl": "internvl",
        "llava": "llava",
        "minicpm-v": "minicpm_v",
        "qwen-vl": "qwen_vl",
    }
)
"""Modules of this package that hold a ``STANDIN``, by the family's name for users."""


class Feed(Protocol):
    """How examples reach a model of one family."""

    def collate(self, examples: Sequence[Example], device: str = "cpu") -> TrainBatch:
        """Examples that all have an image, or all have none, as one right-padded batch."""
        ...

    def logits_and_activations(self, model: Any, batch: TrainBatch) -> tuple[Tensor, list[Tensor]]:
        """(B, T, vocabulary) logits, and the input of each LLM block's last linear (B, T, intermediate)."""
        ...

    def model_inputs(self, batch: TrainBatch) -> Batch:
        """The batch as arguments of the model's ``forward``."""
        ...


@dataclass(frozen=True)
class StandIn:
    """A family's stand-in.

    Attributes:
        name: The family as users type it; the model is ``standin-NAME``.
        dialect: What its tokenizer has beside bytes and words.
        config: Makes a config of a size.
        model_class: The class of the model.
        layout: The layout of a model.
        save_processor: Writes into a folder what the adapter reads beside config, weights and tokenizer.
        feed: Makes the family's way to feed a model, given the model and its tokenizer.
        style: How VLMEvalKit's wrapper of the family asks; None: as examples say (``Example.prompt``).
        grid: Where in a picture its visual tokens stand, to start from another family's stand-in; None for the one
            that starts from nothing.
        align_steps: How many steps its visual tokens need to learn the donor's features.
    """

    name: str
    dialect: Dialect
    config: Callable[[PreTrainedTokenizerFast, Size], Any]
    model_class: Callable[[], Any]
    layout: Callable[[Any], Layout]
    save_processor: Callable[[PreTrainedTokenizerFast, Path], None]
    feed: Callable[[Any, PreTrainedTokenizerFast], Feed]
    style: PromptStyle | None = None
    grid: VisualGrid | None = None
    align_steps: int = 600

    @property
    def model_name(self) -> str:
        """As users type it."""
        return f"standin-{self.name}"

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        pieces = () if self.style is None else self.style.pieces()
        return build_tokenizer(replace(self.dialect, phrases=(*self.dialect.phrases, *pieces)))

    def build_config(self, tokenizer: PreTrainedTokenizerFast, size: Size = DEFAULT_SIZE) -> Any:
        """A config with the tokenizer's special ids."""
        return self.config(tokenizer, size)

    def build_model(self, config: Any, seed: int, fc2_mean: float = 0.25) -> Any:
        """A float32 model with initial weights (``architecture.initialize``)."""
        torch.manual_seed(seed)
        model = self.model_class()._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        initialize(model, self.layout(model), fc2_mean)
        return model


def find_standin(name: str) -> StandIn:
    """A family's stand-in.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in MODULES:
        raise UnknownNameError("family of stand-ins", name, MODULES)
    return import_module(f"{__package__}.{MODULES[name]}").STANDIN


def text_channels_of(model: nn.Module, layout: Layout) -> int:
    """How many input channels of an LLM block's last linear training gives to text."""
    weight = model.get_submodule(layout.text.blocks[0].mlp_out).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1] // 3
