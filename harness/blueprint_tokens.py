"""How many visual tokens an image becomes: the rules of the models' image preprocessors (Figures 1a and 9).

Separators that some models put between or around slices are text tokens and not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from mqbench.harness.blueprint import Blueprint
from mqbench.harness.errors import RequestError, UnknownNameError

MAX_ASPECT_RATIO = 200
"""Longer images are refused by Qwen2-VL's preprocessor."""


def visual_tokens(blueprint: Blueprint, height_px: int, width_px: int) -> int:
    """Visual tokens in the LLM's prompt for one image.

    Raises:
        RequestError: a side is not positive, or the model's preprocessor refuses so long an image.
        UnknownNameError: the blueprint names an unknown rule.
    """
    if min(height_px, width_px) < 1:
        raise RequestError(f"an image needs positive sides, got {height_px} x {width_px} px")
    constants = dict(blueprint.image)
    rule = constants.pop("rule")
    if rule not in RULES:
        raise UnknownNameError("rule of image sizes", rule, RULES)
    return RULES[rule](height_px, width_px, **constants)


def fixed(height_px: int, width_px: int, *, tokens: int) -> int:
    """Any image is resized to one size (Qwen-VL, GLM-4V, LLaVA-1.5)."""
    return tokens


def smart_resize(height_px: int, width_px: int, *, factor_px: int, min_pixels: int, max_pixels: int) -> int:
    """Sides become multiples of ``factor_px``, the area stays within bounds; one token a square (Qwen2-VL).

    Raises:
        RequestError: one side is more than 200 times the other.
    """
    if max(height_px, width_px) > MAX_ASPECT_RATIO * min(height_px, width_px):
        raise RequestError(f"{height_px} x {width_px} px is too long: at most {MAX_ASPECT_RATIO} to 1")
    rows, columns = round(height_px / factor_px), round(width_px / factor_px)
    pixels = rows * columns * factor_px**2
    if pixels > max_pixels:
        shrink = math.sqrt(height_px * width_px / max_pixels)
        rows = max(1, math.floor(height_px / shrink / factor_px))
        columns = max(1, math.floor(width_px / shrink / factor_px))
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (height_px * width_px))
        rows = math.ceil(height_px * grow / factor_px)
        columns = math.ceil(width_px * grow / factor_px)
    return rows * columns


def tiles(height_px: int, width_px: int, *, tile_px: int, max_tiles: int, tokens_per_tile: int) -> int:
    """A grid of tiles, and a thumbnail beside more than one of them (InternVL2)."""
    columns, rows = tile_grid(height_px, width_px, tile_px, max_tiles)
    return tokens_per_tile * (columns * rows + (columns * rows > 1))


def tile_grid(height_px: int, width_px: int, tile_px: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of the grid of at most ``max_tiles`` tiles that is nearest in aspect ratio.

    Of grids equally near, more tiles win as long as the image has more than half of their pixels.
    """
    best, best_distance = (1, 1), math.inf
    for columns, rows in _grids(max_tiles):
        distance = abs(width_px / height_px - columns / rows)
        enlarges = 2 * height_px * width_px > tile_px**2 * columns * rows
        if distance < best_distance or (distance == best_distance and enlarges):
            best, best_distance = (columns, rows), distance
    return best


def slices(height_px: int, width_px: int, *, slice_px: int, max_slices: int, tokens_per_slice: int) -> int:
    """The image as a whole, and slices beside it unless it is small (MiniCPM-V)."""
    columns, rows = slice_grid(height_px, width_px, slice_px, max_slices)
    return tokens_per_slice * (columns * rows + (columns * rows > 1))


def slice_grid(height_px: int, width_px: int, slice_px: int, max_slices: int) -> tuple[int, int]:
    """Columns and rows of slices; (1, 1) for an image that is not cut.

    As many slices as the image has times ``slice_px`` squared, one more or less, in the grid nearest in aspect ratio.
    """
    wanted = min(math.ceil(height_px * width_px / slice_px**2), max_slices)
    if wanted <= 1:
        return 1, 1
    ratio = math.log(width_px / height_px)
    best, best_distance = (1, 1), math.inf
    for number in (wanted - 1, wanted, wanted + 1):
        if number == 1 or number > max_slices:
            continue
        for columns in _divisors(number):
            distance = abs(ratio - math.log(columns / (number // columns)))
            if distance < best_distance:
                best, best_distance = (columns, number // columns), distance
    return best


RULES: Mapping[str, Callable[..., int]] = MappingProxyType(
    {"fixed": fixed, "smart_resize": smart_resize, "tiles": tiles, "slices": slices}
)


def _grids(max_tiles: int) -> list[tuple[int, int]]:
    """(columns, rows) of every grid of at most ``max_tiles``, by number of tiles, then by columns."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if columns * rows <= max_tiles]
    return sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
