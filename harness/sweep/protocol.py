"""Inputs of a latency measurement, as numbers: image sizes, visual tokens, text around images, batches, turns.

Everything here is arithmetic; ``inputs`` makes tensors of it. A sequence is ``text-image-text(-image-text...)``. The
two markers around an image are text tokens, so that a sequence has ``visual + text`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from mqbench.harness.errors import RequestError
from mqbench.harness.models.pixels import PixelLimits, fit_size

TEMPORAL_PATCH = 2
"""An image is given twice: the patch embedding reads pairs of video frames."""

CHANNELS = 3
MARKERS_BETWEEN = 2
"""End of one image and start of the next."""


@dataclass(frozen=True)
class ImageRules:
    """A Qwen2-VL style preprocessor.

    Attributes:
        patch_px: Side of a patch.
        merge: Patches per side that become one visual token.
        min_px: Smallest area after resizing, in pixels.
        max_px: Largest one.
    """

    patch_px: int
    merge: int
    min_px: int
    max_px: int

    @property
    def token_px(self) -> int:
        """Side of a visual token in pixels."""
        return self.patch_px * self.merge

    @property
    def patch_elements(self) -> int:
        """Numbers per row of ``pixel_values``."""
        return CHANNELS * TEMPORAL_PATCH * self.patch_px**2


@dataclass(frozen=True)
class ImageSize:
    """What a square image becomes.

    Attributes:
        side_px: As given.
        resized_px: Side after resizing.
        visual_tokens: Rows in the LLM.
        grid: (frames, rows, columns) in patches: a row of ``image_grid_thw``.
        clamped: The preprocessor shrank it to its largest area.
    """

    side_px: int
    resized_px: int
    visual_tokens: int
    grid: tuple[int, int, int]
    clamped: bool

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def image_size(side_px: int, rules: ImageRules) -> ImageSize:
    """Follows the preprocessor's rule for a square image.

    Raises:
        RequestError: the side is not positive.
    """
    if side_px < 1:
        raise RequestError(f"an image needs a positive side, got {side_px} px")
    token_px = rules.token_px
    resized, _ = fit_size(side_px, side_px, token_px, PixelLimits(rules.min_px, rules.max_px))
    wanted = max(1, round(side_px / token_px)) * token_px
    patches = resized // rules.patch_px
    return ImageSize(side_px, resized, (resized // token_px) ** 2, (1, patches, patches), wanted**2 > rules.max_px)


@dataclass(frozen=True)
class Shape:
    """The input of one point. Later rows of a batch may have longer texts; all turns are alike.

    Attributes:
        image_px: Side of every image.
        images: Per row and turn.
        text_tokens: Of the first row, per turn, markers included.
        text_before: Of these, before the first image.
        text_step: Each row has this many more than the row before it, at its end.
        batch: Rows.
        turns: Prefills, each followed by decoding, over one growing KV cache.
        decode_tokens: Decoding steps per turn.
    """

    image_px: int
    images: int = 1
    text_tokens: int = 15
    text_before: int = 7
    text_step: int = 0
    batch: int = 1
    turns: int = 1
    decode_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("image_px", "images", "batch", "turns"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decode_tokens", "text_step"):
            if getattr(self, name) < 0:
                raise RequestError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.text_before < 1:
            raise RequestError(f"text_before must be at least 1, the marker of the first image; got {self.text_before}")
        needed = self.text_before + MARKERS_BETWEEN * (self.images - 1) + 1
        if self.text_tokens < needed:
            raise RequestError(
                f"text_tokens must be at least {needed} with {self.images} image(s) and {self.text_before} before the "
                f"first, since the markers around images count; got {self.text_tokens}"
            )

    @property
    def label(self) -> str:
        """For progress lines."""
        parts = [f"{self.images} x {self.image_px} px" if self.images > 1 else f"{self.image_px} px"]
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        parts += [f"{self.turns} turns"] if self.turns > 1 else []
        parts += [f"{self.decode_tokens} decoded"] if self.decode_tokens else []
        return ", ".join(parts)


def text_segments(shape: Shape, row: int = 0) -> tuple[int, ...]:
    """Text tokens before the first image and after each one; what is behind the first image is spread evenly.

    The last segments take what does not divide; those of later rows end ``row * text_step`` tokens later.
    """
    rest = shape.text_tokens - shape.text_before
    least = [MARKERS_BETWEEN] * (shape.images - 1) + [1]
    spread, remainder = divmod(rest - sum(least), shape.images)
    behind = [low + spread + (index >= shape.images - remainder) for index, low in enumerate(least)]
    behind[-1] += row * shape.text_step
    return (shape.text_before, *behind)


def row_tokens(shape: Shape, rules: ImageRules, row: int = 0) -> int:
    """Tokens of one row in one turn, without padding."""
    visual = shape.images * image_size(shape.image_px, rules).visual_tokens
    return visual + sum(text_segments(shape, row))


def prefill_length(shape: Shape, rules: ImageRules) -> int:
    """Columns of one turn's prefill: the longest row; shorter ones are padded on the left."""
    return row_tokens(shape, rules, shape.batch - 1)


def cache_length(shape: Shape, rules: ImageRules) -> int:
    """Columns of the KV cache behind the last step of the last turn."""
    return shape.turns * (prefill_length(shape, rules) + shape.decode_tokens)


def past_length(shape: Shape, rules: ImageRules, turn: int) -> int:
    """Columns of the KV cache before turn ``turn`` (the first is 0)."""
    return turn * (prefill_length(shape, rules) + shape.decode_tokens)


def pad_tokens(shape: Shape, rules: ImageRules, row: int) -> int:
    """Padding on the left of a row."""
    return prefill_length(shape, rules) - row_tokens(shape, rules, row)


def figures(shape: Shape, rules: ImageRules) -> dict[str, float]:
    """What a record says of the input: per row and turn, of the first row."""
    size = image_size(shape.image_px, rules)
    return {
        "tokens_per_image": float(size.visual_tokens),
        "visual_tokens": float(shape.images * size.visual_tokens),
        "llm_tokens": float(row_tokens(shape, rules)),
        "resized_px": float(size.resized_px),
        "clamped": float(size.clamped),
    }
