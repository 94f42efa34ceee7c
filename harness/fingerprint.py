"""Content hashes of model folders, so that results of other weights are never mistaken for these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

FULL_HASH_BYTES = 256 * 2**20
"""Files up to this size are hashed whole; of larger ones, evenly spaced pieces."""

PIECE_BYTES = 2**20
NUM_PIECES = 64
IGNORED_SUFFIXES = (".md", ".lock", ".part", ".png", ".csv")
"""Files beside a model that cannot change its answers."""


def folder_hash(folder: Path) -> str:
    """SHA-256 over names, sizes and contents of the files that a model is loaded from.

    Of files above 256 MiB, 64 evenly spaced pieces of 1 MiB are read, so that tens of gigabytes take seconds: two
    checkpoints that differ in those pieces nowhere but elsewhere would pass for equal, which retraining, rounding or
    another revision does not do.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in model_files(folder):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Size of the files that a model is loaded from."""
    return sum(path.stat().st_size for path in model_files(folder))


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder in a fixed order, hidden ones and documents left out."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix not in IGNORED_SUFFIXES
    )


def combined_hash(*hashes: str) -> str:
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= FULL_HASH_BYTES:
            while piece := stream.read(PIECE_BYTES):
                yield piece
            return
        for number in range(NUM_PIECES):
            stream.seek((size - PIECE_BYTES) * number // (NUM_PIECES - 1))
            yield stream.read(PIECE_BYTES)
