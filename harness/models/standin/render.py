"""Draws the stand-in's images: text, shapes, textures and icons on a small canvas.

Everything is drawn with Pillow and the DejaVu fonts that matplotlib ships. ``difficulty`` in [0, 1] widens fonts,
sizes, jitter, colours and distortions: the training curriculum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import matplotlib
from PIL import Image, ImageDraw, ImageFont

WIDTH_PX, HEIGHT_PX = 168, 112
FONTS = ("DejaVuSansMono-Bold", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSans", "DejaVuSerif-Bold", "DejaVuSerif")
OBLIQUE_FONTS = ("DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic")
COLORS = {
    "red": (215, 30, 30),
    "green": (25, 150, 45),
    "blue": (35, 70, 215),
    "yellow": (235, 205, 30),
    "purple": (135, 40, 165),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("stripes", "dots", "checks", "bricks", "waves", "hills")
LANDMARKS = ("tower", "arch", "bridge", "castle", "temple", "dome")
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class TextStyle:
    """How one string is drawn; ``kind`` is plain, irregular, artistic or handwritten."""

    kind: str = "plain"
    size_px: int = 34
    color: Rgb = BLACK


@lru_cache(maxsize=256)
def font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """A DejaVu face of matplotlib's at a pixel size."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size_px)


def canvas(color: Rgb = WHITE) -> Image.Image:
    return Image.new("RGB", (WIDTH_PX, HEIGHT_PX), color)


def light_color(rng: Random, difficulty: float) -> Rgb:
    """A background: white first, then pale tints."""
    low = round(255 - 60 * difficulty)
    return (rng.randint(low, 255), rng.randint(low, 255), rng.randint(low, 255))


def dark_color(rng: Random, difficulty: float) -> Rgb:
    """A foreground: black first, then dark tints."""
    high = round(110 * difficulty)
    return (rng.randint(0, high), rng.randint(0, high), rng.randint(0, high))


def draw_text(
    image: Image.Image, text: str, box: tuple[int, int, int, int], style: TextStyle, rng: Random, difficulty: float
) -> None:
    """Draws ``text`` inside ``box`` (left, top, right, bottom), shrunk until it fits.

    At difficulty 0 it stands at the left edge, so that every character has a fixed cell; then it moves about.
    """
    layer = _text_layer(text, style, rng, difficulty)
    left, top, right, bottom = box
    ratio = min(1.0, (right - left) / layer.width, (bottom - top) / layer.height)
    if ratio < 1:
        size = (max(1, int(layer.width * ratio)), max(1, int(layer.height * ratio)))
        layer = layer.resize(size, Image.Resampling.BICUBIC)
    slack_x, slack_y = right - left - layer.width, bottom - top - layer.height
    x = left + round(slack_x * difficulty * rng.random())
    y = top + round(slack_y * (0.5 + 0.5 * difficulty * rng.uniform(-1, 1)))
    image.paste(layer, (x, y), layer)


def _text_layer(text: str, style: TextStyle, rng: Random, difficulty: float) -> Image.Image:
    """The string on a transparent layer cut to its ink."""
    handwritten = style.kind == "handwritten"
    faces = OBLIQUE_FONTS if handwritten else FONTS[: 1 + round((len(FONTS) - 1) * difficulty)]
    size = round(style.size_px * (1 + 0.15 * difficulty * rng.uniform(-1, 1)))
    face = font(rng.choice(faces), size)
    width = round(face.getlength(text)) + 2 * size
    layer = Image.new("RGBA", (width, 3 * size), (*style.color, 0))
    pen = ImageDraw.Draw(layer)
    wobble = 0.08 * size * difficulty if handwritten else 0.0
    if style.kind == "artistic":
        shadow = rng.choice([(200, 200, 200), (235, 180, 180), (180, 190, 240)])
        pen.text((size + 3, size + 3), text, font=face, fill=(*shadow, 255))
    x = float(size)
    for char in text:
        pen.text((x, size + rng.uniform(-wobble, wobble)), char, font=face, fill=(*style.color, 255))
        x += face.getlength(char)
    if style.kind == "irregular":
        angle = rng.choice((-1, 1)) * rng.uniform(4, 6 + 6 * difficulty)
        layer = layer.rotate(angle, Image.Resampling.BICUBIC)
    return layer.crop(layer.getbbox())


def draw_shape(image: Image.Image, shape: str, center: tuple[float, float], radius: float, color: Rgb) -> None:
    """One filled shape of ``SHAPES``."""
    pen = ImageDraw.Draw(image)
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "ring":
        pen.ellipse(box, outline=color, width=max(3, round(radius / 2.5)))
    elif shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)
    elif shape == "cross":
        third = radius / 3
        pen.rectangle((x - third, y - radius, x + third, y + radius), fill=color)
        pen.rectangle((x - radius, y - third, x + radius, y + third), fill=color)
    else:
        pen.polygon(_star(x, y, radius), fill=color)


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        reach = radius if corner % 2 == 0 else radius * 0.42
        angle = math.pi * corner / 5 - math.pi / 2
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return points


def draw_texture(image: Image.Image, texture: str, color: Rgb, rng: Random) -> None:
    """Fills the canvas with one of ``TEXTURES``."""
    pen = ImageDraw.Draw(image)
    step = rng.choice((20, 24, 28))
    shift = rng.randrange(step)
    columns, rows = range(-shift, WIDTH_PX, step), range(-shift, HEIGHT_PX, step)
    if texture == "stripes":
        for x in columns:
            pen.rectangle((x, 0, x + step // 2, HEIGHT_PX), fill=color)
    elif texture == "dots":
        for x in columns:
            for y in rows:
                pen.ellipse((x, y, x + step // 2, y + step // 2), fill=color)
    elif texture == "checks":
        for i, x in enumerate(columns):
            for j, y in enumerate(rows):
                if (i + j) % 2:
                    pen.rectangle((x, y, x + step - 1, y + step - 1), fill=color)
    elif texture == "bricks":
        for j, y in enumerate(rows):
            pen.line((0, y, WIDTH_PX, y), fill=color, width=3)
            for x in columns:
                left = x + (step // 2 if j % 2 else 0)
                pen.line((left, y, left, y + step), fill=color, width=3)
    elif texture == "waves":
        for y in rows:
            line = [(x, y + step / 4 * math.sin(x / 7)) for x in range(0, WIDTH_PX + 2, 2)]
            pen.line(line, fill=color, width=4)
    else:
        for x in range(-step, WIDTH_PX, 2 * step):
            pen.pieslice((x, HEIGHT_PX - 60 - shift, x + 2 * step, HEIGHT_PX + 60), 180, 360, fill=color)


def draw_landmark(image: Image.Image, landmark: str, color: Rgb, rng: Random) -> None:
    """A simple building of ``LANDMARKS`` standing on the ground."""
    pen = ImageDraw.Draw(image)
    left = rng.randint(30, 60)
    right, ground = left + 80, rng.randint(94, 108)
    middle = (left + right) // 2
    if landmark == "tower":
        pen.polygon([(middle, 8), (middle - 20, ground), (middle + 20, ground)], fill=color)
    elif landmark == "arch":
        pen.rectangle((left, 30, right, ground), fill=color)
        pen.pieslice((left + 18, 46, right - 18, ground + 40), 180, 360, fill=WHITE)
    elif landmark == "bridge":
        pen.rectangle((4, 62, WIDTH_PX - 4, 74), fill=color)
        pen.arc((left - 20, 24, right + 20, 110), 180, 360, fill=color, width=6)
    elif landmark == "castle":
        pen.rectangle((left, 52, right, ground), fill=color)
        for x in (left, middle - 8, right - 16):
            pen.rectangle((x, 26, x + 16, 52), fill=color)
    elif landmark == "temple":
        pen.polygon([(middle, 14), (left - 8, 44), (right + 8, 44)], fill=color)
        for x in range(left, right, 22):
            pen.rectangle((x, 44, x + 10, ground), fill=color)
    else:
        pen.pieslice((left, 16, right, 16 + 2 * (ground - 30)), 180, 360, fill=color)
        pen.rectangle((left + 8, ground - 20, right - 8, ground), fill=color)
