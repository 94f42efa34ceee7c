"""Images as InternVL reads them: a grid of square tiles nearest in aspect ratio, and a thumbnail beside several."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mqbench.harness.blueprint_tokens import tile_grid
from mqbench.harness.models.pixels import open_rgb


def load_tiles(path: str | Path, tile_px: int, max_tiles: int) -> list[Image.Image]:
    """An image file as tiles of ``tile_px`` squared, row by row, and the thumbnail last.

    Raises:
        DatasetError: the file is missing or no image.
    """
    return cut_tiles(open_rgb(path), tile_px, max_tiles)


def cut_tiles(image: Image.Image, tile_px: int, max_tiles: int) -> list[Image.Image]:
    """As ``load_tiles``, of an image in memory; resized with bicubic interpolation."""
    columns, rows = tile_grid(image.height, image.width, tile_px, max_tiles)
    whole = image.resize((columns * tile_px, rows * tile_px), Image.Resampling.BICUBIC)
    corners = [(column * tile_px, row * tile_px) for row in range(rows) for column in range(columns)]
    tiles = [whole.crop((left, top, left + tile_px, top + tile_px)) for left, top in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((tile_px, tile_px), Image.Resampling.BICUBIC))
    return tiles


def num_tiles(height_px: int, width_px: int, tile_px: int, max_tiles: int) -> int:
    """How many images ``cut_tiles`` gives."""
    columns, rows = tile_grid(height_px, width_px, tile_px, max_tiles)
    return columns * rows + (columns * rows > 1)
