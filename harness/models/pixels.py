"""Images on their way into a model: colour mode, size and shape as the models' own preprocessing makes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mqbench.harness.errors import DatasetError

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class PixelLimits:
    """Bounds of an image's area after resizing, in pixels."""

    min_px: int
    max_px: int


def fit_size(height: int, width: int, factor: int, limits: PixelLimits) -> tuple[int, int]:
    """The height and width to which an image is resized.

    Both become multiples of ``factor`` and the area falls into ``limits``, with as little change of the aspect ratio
    as that allows.

    Args:
        height: In pixels.
        width: In pixels.
        factor: Side of one visual token in pixels (patch size times merge size).
        limits: Bounds of the area.

    Raises:
        DatasetError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DatasetError(f"an image of {width} x {height} pixels is too narrow for Qwen2-VL; leave its row out")
    rows, columns = (max(1, round(side / factor)) for side in (height, width))
    area_px = rows * columns * factor**2
    if area_px > limits.max_px:
        shrink = math.sqrt(height * width / limits.max_px)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif area_px < limits.min_px:
        grow = math.sqrt(limits.min_px / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def load_image(path: str | Path, factor: int, limits: PixelLimits) -> Image.Image:
    """An image file as RGB, on white where it is transparent, resized (bicubic) to ``fit_size``.

    Raises:
        DatasetError: the file is missing or no image.
    """
    image = open_rgb(path, on_white=True)
    height, width = fit_size(image.height, image.width, factor, limits)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def open_rgb(path: str | Path, on_white: bool = False) -> Image.Image:
    """An image file as RGB.

    Args:
        path: The file.
        on_white: Transparent pixels become white; otherwise they keep the colour under their transparency.

    Raises:
        DatasetError: the file is missing or no image.
    """
    try:
        with Image.open(path) as file:
            return _on_white(file) if on_white and file.mode == "RGBA" else file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise DatasetError(f"cannot read image '{path}' ({error}); repair the file or leave its row out") from None


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square as wide as its longer side."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _on_white(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas
