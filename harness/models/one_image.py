"""Adapters of models that take one image of fixed size in front of the text: GLM-4V-9B and CogVLM2.

VLMEvalKit's wrappers join the texts of a prompt with line ends, take its first image, and ask for a short answer where
a letter or yes or no is wanted. The released code resizes every image to one square, whatever its aspect ratio.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mqbench.harness.models.adapter import LoadedModel, Message
from mqbench.harness.models.native import NativeAdapter, padded_batch
from mqbench.harness.models.pixels import open_rgb
from mqbench.harness.quant.session import Batch

if TYPE_CHECKING:
    from mqbench.harness.models.trees.eva_clip import EvaClipConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SHORT_ANSWER = "\nShort Answer."
SHORT_ANSWER_BENCHMARKS = ("MME", "ScienceQA_TEST")
"""Those whose answers VLMEvalKit types as yes or no, or as multiple choice."""


@dataclass(frozen=True)
class TextProcessor:
    """Stands in place of a transformers processor: these checkpoints have none.

    Attributes:
        tokenizer: Transformers'.
        image_px: Side of the square that every image becomes.
        num_patches: Visual tokens of an image without the vectors around them.
    """

    tokenizer: Any
    image_px: int
    num_patches: int


class OneImageAdapter(NativeAdapter):
    """One registered model of a family with one image in front of the text."""

    @abstractmethod
    def load_tokenizer(self, path: Path) -> Any:
        """The tokenizer from local files."""

    @abstractmethod
    def prompt_ids(self, loaded: LoadedModel, text: str, has_image: bool) -> list[int]:
        """Token ids of a prompt, with a placeholder for every visual token."""

    def load_processor(self, path: Path) -> TextProcessor:
        config = self.model_class().config_class.from_pretrained(path, local_files_only=True)
        vision: EvaClipConfig = config.vision_config
        return TextProcessor(self.load_tokenizer(path), vision.image_size, vision.num_patches)

    def answer_text(self, answer: str) -> str:
        """An answer as the model writes it behind the prompt."""
        return answer

    def encode(self, loaded: LoadedModel, messages: Sequence[Message], answers: Sequence[str] | None = None) -> Batch:
        """Left-padded inputs of a batch of prompts on the model's device; position ids are counted by the model.

        Args:
            loaded: From ``load``.
            messages: One per row. An item may name its benchmark under ``"dataset"``: some want a short answer.
            answers: One per row; their tokens follow the prompts, as in decoding.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, T); with images also ``pixel_values`` (images, 3, side, side).

        Raises:
            DatasetError: an image cannot be read.
        """
        read = [text_and_image(message) for message in messages]
        prompts = [self.prompt_ids(loaded, text, image is not None) for text, image in read]
        pixels = [square_pixels(open_rgb(image), loaded.processor.image_px) for _, image in read if image is not None]
        spelled = None if answers is None else [self.answer_text(answer) for answer in answers]
        return padded_batch(loaded, prompts, spelled, torch.stack(pixels) if pixels else None)

    def visual_tokens(self, processor: Any, height_px: int = 1, width_px: int = 1, dataset: str | None = None) -> int:
        """Visual tokens of one image: the same for every size."""
        return processor.num_patches


def text_and_image(message: Message) -> tuple[str, str | Path | None]:
    """The texts of a prompt in one, and its first image."""
    text = "\n".join(item["value"] for item in message if item["type"] == "text")
    if any(item.get("dataset") in SHORT_ANSWER_BENCHMARKS for item in message):
        text += SHORT_ANSWER
    return text, next((item["value"] for item in message if item["type"] == "image"), None)


def square_pixels(image: Image.Image, side_px: int) -> Tensor:
    """An RGB image resized (bicubic) to a square and normalized as CLIP's, (3, side_px, side_px) float32."""
    resized = np.array(image.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = torch.from_numpy(resized).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text in which the spelling of a special token is text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
