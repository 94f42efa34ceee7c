"""Images as MiniCPM-V reads them: an overview, and up to nine slices of about the same size, cut into patches.

The rules are those of the released image processor and of VLMEvalKit's wrapper, which enlarges images of some
benchmarks at random; here the chance depends on the image alone, so that every run sees the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mqbench.harness.blueprint_tokens import slice_grid
from mqbench.harness.errors import DatasetError
from mqbench.harness.models.adapter import Message
from mqbench.harness.models.pixels import open_rgb

MAX_SIDE = 1024
"""Longest side of an overview or slice in patches. The released code has no limit; most are about 32 x 32."""

ENLARGED_DATASETS = ("MMVet", "MMBench", "MMStar", "AI2D", "OCRBench")
ENLARGED_PX = 1344
"""VLMEvalKit enlarges images of these benchmarks up to this side squared."""


PROCESSOR_FILE = "preprocessor_config.json"
RULE_FIELDS = {"slice_px": "scale_resolution", "max_slices": "max_slice_nums", "patch_px": "patch_size"}
COLOUR_FIELDS = {"mean": "norm_mean", "std": "norm_std"}
VISUAL_TOKEN = "<unk>"
TERMINATORS = ("<|im_end|>", "<|endoftext|>")
MAX_PROMPT_TOKENS = 8192
"""VLMEvalKit's limit; longer prompts lose their end."""


@dataclass(frozen=True)
class SliceRule:
    """The released preprocessor_config.json.

    Attributes:
        slice_px: Side of a square with the area of a slice.
        max_slices: Most slices beside the overview.
        patch_px: Side of a patch.
        mean: Of the three colours, 0 to 1.
        std: Likewise.
    """

    slice_px: int = 448
    max_slices: int = 9
    patch_px: int = 14
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SlicedImage:
    """What becomes of one image.

    Attributes:
        pictures: The overview, then the slices row by row.
        columns: Slices in a row; 0 without slices.
    """

    pictures: tuple[Image.Image, ...]
    columns: int

    @property
    def rows(self) -> int:
        """Rows of slices."""
        return (len(self.pictures) - 1) // self.columns if self.columns else 0


def cut_slices(image: Image.Image, rule: SliceRule) -> SlicedImage:
    """Overview and slices of an image, each with sides that are multiples of a patch; resized bicubically.

    Raises:
        DatasetError: the image is so narrow that a side becomes longer than 1024 patches.
    """
    columns, rows = slice_grid(image.height, image.width, rule.slice_px, rule.max_slices)
    if columns * rows == 1:
        return SlicedImage((_resized(image, fit_area(*image.size, rule, enlarge=True), rule),), 0)
    overview = _resized(image, fit_area(*image.size, rule, enlarge=False), rule)
    wide, high = _divisible(image.width, columns) / columns, _divisible(image.height, rows) / rows
    width, height = fit_area(wide, high, rule, enlarge=True)
    whole = image.resize((width * columns, height * rows), Image.Resampling.BICUBIC)
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    return SlicedImage((overview, *(whole.crop((x, y, x + width, y + height)) for x, y in corners)), columns)


def fit_area(width: float, height: float, rule: SliceRule, enlarge: bool) -> tuple[int, int]:
    """Width and height with the area of a slice, in whole patches; smaller images are only made larger if asked."""
    if enlarge or width * height > rule.slice_px**2:
        ratio = width / height
        height = int(rule.slice_px / math.sqrt(ratio))
        width = int(height * ratio)
    return _divisible(width, rule.patch_px), _divisible(height, rule.patch_px)


def patch_strips(images: Sequence[Image.Image], rule: SliceRule) -> tuple[Tensor, Tensor]:
    """Images of any size as one tensor.

    Behind the last patch of an image its first one is repeated: no value occurs that the image does not have.

    Returns:
        Strips (images, 3, patch, longest * patch) float32 of patches side by side, row after row; and rows and columns
        of patches (images, 2).
    """
    patch = rule.patch_px
    sizes = torch.tensor([[image.height // patch, image.width // patch] for image in images])
    longest = int(sizes.prod(1).max())
    return torch.stack([_filled(_strip(image, rule), longest * patch, patch) for image in images]), sizes


def enlarged(image: Image.Image, dataset: str | None) -> Image.Image:
    """The image as VLMEvalKit's wrapper passes it on: of some benchmarks enlarged by chance, up to 1344 px squared."""
    factor = math.sqrt(ENLARGED_PX**2 / (image.width * image.height))
    if factor <= 1 or not any(name in (dataset or "") for name in ENLARGED_DATASETS):
        return image
    chance = random.Random(hashlib.sha256(image.tobytes()).digest())
    width = chance.randint(image.width, int(image.width * factor))
    return image.resize((width, int(width / image.width * image.height)))


@dataclass(frozen=True)
class SliceProcessor:
    """What the released processor holds; its classes are remote code, its files are not.

    Attributes:
        tokenizer: Qwen2's with a few more tokens.
        rule: How images are cut.
        tokens_per_slice: Visual tokens.
    """

    tokenizer: Any
    rule: SliceRule = field(default_factory=SliceRule)
    tokens_per_slice: int = 64

    def images(self, message: Message) -> list[SlicedImage]:
        """The images of a prompt, cut.

        Raises:
            DatasetError: one cannot be read or is too narrow.
        """
        items = [item for item in message if _is_image(item)]
        return [cut_slices(enlarged(open_rgb(item["value"]), item.get("dataset")), self.rule) for item in items]

    def prompt_ids(self, message: Message, images: Sequence[SlicedImage]) -> list[int]:
        """A prompt's items in lines of their own, in the chat template.

        Raises:
            DatasetError: a text holds a placeholder, or the limit of tokens cuts through the images.
        """
        placeholders = iter([self.placeholders(image, index) for index, image in enumerate(images)])
        content = "\n".join(next(placeholders) if _is_image(item) else item["value"] for item in message)
        conversation = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_PROMPT_TOKENS]
        wanted = self.tokens_per_slice * sum(len(image.pictures) for image in images)
        if ids.count(self.tokenizer.convert_tokens_to_ids(VISUAL_TOKEN)) != wanted:
            raise DatasetError(
                f"a prompt holds {VISUAL_TOKEN} itself, or images beyond its first {MAX_PROMPT_TOKENS} tokens; "
                "leave its row out"
            )
        return ids

    def placeholders(self, image: SlicedImage, index: int) -> str:
        """What stands for the ``index``-th image of a prompt: its number, the overview, a line per row of slices."""
        tokens = VISUAL_TOKEN * self.tokens_per_slice
        overview = f"<image_id>{index}</image_id><image>{tokens}</image>"
        return overview + "\n".join([f"<slice>{tokens}</slice>" * image.columns] * image.rows)


def load_slice_processor(folder: Path) -> SliceProcessor:
    """Tokenizer and rule from the files of a released checkpoint, without its code."""
    from transformers import Qwen2TokenizerFast

    found = json.loads((folder / PROCESSOR_FILE).read_text(encoding="utf-8"))
    settings: dict[str, Any] = {own: found[theirs] for own, theirs in RULE_FIELDS.items() if theirs in found}
    settings |= {own: tuple(found[theirs]) for own, theirs in COLOUR_FIELDS.items() if theirs in found}
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
    return SliceProcessor(tokenizer, SliceRule(**settings), found.get("image_feature_size", 64))


def _divisible(length: float, parts: int) -> int:
    """The multiple of ``parts`` nearest to a length, at least ``parts``."""
    return max(round(length / parts) * parts, parts)


def _is_image(item: Mapping[str, str]) -> bool:
    return item["type"] == "image"


def _resized(image: Image.Image, size: tuple[int, int], rule: SliceRule) -> Image.Image:
    if max(size) > MAX_SIDE * rule.patch_px:
        raise DatasetError(
            f"an image of {image.width} x {image.height} pixels is too narrow for MiniCPM-V; leave its row out"
        )
    return image.resize(size, Image.Resampling.BICUBIC)


def _strip(image: Image.Image, rule: SliceRule) -> Tensor:
    """(3, patch, patches * patch) float32, normalized."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    pixels = (pixels - np.asarray(rule.mean, np.float32)) / np.asarray(rule.std, np.float32)
    rows = torch.from_numpy(pixels).permute(2, 0, 1).unflatten(1, (-1, rule.patch_px))
    return rows.transpose(1, 2).flatten(2)


def _filled(strip: Tensor, length: int, patch: int) -> Tensor:
    missing = (length - strip.shape[-1]) // patch
    return torch.cat([strip, strip[..., :patch].repeat(1, 1, missing)], dim=-1)
