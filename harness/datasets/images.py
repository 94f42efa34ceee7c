"""Images of benchmark rows: files beside the TSV, or base64 text inside it that is unpacked into the cache once."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
from PIL import Image

from mqbench.harness.errors import DatasetError, OutputError

MAX_REFERENCE_LENGTH = 64
"""VLMEvalKit: an ``image`` field no longer than this is the index of the row whose image is meant."""

_CONVERTED_MODES = ("RGBA", "P", "LA")
"""VLMEvalKit turns these into RGB when it unpacks base64."""

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif", "TIFF": ".tif"}
_CHUNK_ROWS = 256


def cache_dir() -> Path:
    """Where mqbench may keep files: ``$MQBENCH_CACHE``, else ``mqbench`` in the user's cache folder. Not created."""
    if chosen := os.environ.get("MQBENCH_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mqbench"


def cache_folder(name: str) -> Path:
    """A folder in the cache, created when needed.

    Raises:
        OutputError: it cannot be created.
    """
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot create cache folder '{folder}': {reason}; set MQBENCH_CACHE to a writable one"
        ) from None
    return folder


def image_error(path: Path) -> str | None:
    """Why an image file cannot be used, or None when it can."""
    if not path.is_file():
        return f"image '{path}' does not exist"
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.verify()  # reads every chunk: finds truncation without decoding
            else:
                image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"image '{path}' is broken ({error})"
    return None


def image_sha256(path: Path) -> str:
    """SHA-256 of an image file's bytes."""
    status = path.stat()
    return _file_sha256(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=65536)
def _file_sha256(path: str, size_bytes: int, modified_ns: int) -> str:
    del size_bytes, modified_ns  # parts of the cache key only
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_images(tsv: Path, sources: Mapping[int, str]) -> dict[str, Path]:
    """Writes base64 images of a TSV into the cache, reading the file in pieces (official ones have gigabytes).

    Args:
        tsv: File with columns ``index`` and ``image``.
        sources: Row number -> index of each row whose own image is wanted.

    Returns:
        Index -> image file. Pixels are what VLMEvalKit would unpack.

    Raises:
        DatasetError: an image is no base64 or cannot be decoded.
        OutputError: the cache cannot be written.
    """
    status = tsv.stat()
    mark = hashlib.sha256(f"{tsv.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder(f"images/{tsv.stem}-{mark}")
    unpacked = {path.stem: path for path in folder.iterdir() if not path.name.startswith(".")}
    missing = {row for row in sources if f"{row:07d}" not in unpacked}
    if missing:
        for row, text in _base64_fields(tsv, missing):
            path = _write_image(folder, row, text, f"{tsv}, row {row + 2} (index {sources[row]})")
            unpacked[path.stem] = path
    return {index: unpacked[f"{row:07d}"] for row, index in sources.items()}


def _base64_fields(tsv: Path, rows: set[int]) -> Iterator[tuple[int, str]]:
    start = 0
    chunks = pd.read_csv(
        tsv, sep="\t", usecols=["image"], dtype=str, keep_default_na=False, na_filter=False, chunksize=_CHUNK_ROWS
    )
    with chunks:
        for chunk in chunks:
            for offset, text in enumerate(chunk["image"]):
                if start + offset in rows:
                    yield start + offset, text
            start += len(chunk)


def _write_image(folder: Path, row: int, text: str, where: str) -> Path:
    try:
        data = base64.b64decode(text, validate=False)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            suffix = _SUFFIXES.get(image.format or "")
            if suffix is None or image.mode in _CONVERTED_MODES:
                converted = image.convert("RGB") if image.mode in _CONVERTED_MODES else image
                data, suffix = _as_png(converted), ".png"
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"{where}: the 'image' field is no readable base64 image ({error}); get the file again"
        ) from None
    return _write_atomically(folder / f"{row:07d}{suffix}", data)


def _as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _write_atomically(path: Path, data: bytes) -> Path:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        raise OutputError(
            f"cannot write '{path}': {error.strerror or error}; free space or set MQBENCH_CACHE"
        ) from None
    return path
