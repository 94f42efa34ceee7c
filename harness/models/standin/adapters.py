"""Stand-ins of families whose weights do not ship: registered, so that a folder that somebody trained is found."""

from __future__ import annotations

from pathlib import Path

from mqbench.harness.models.internvl import InternVLAdapter
from mqbench.harness.models.llava import LlavaAdapter
from mqbench.harness.models.weights import find_folder

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
MAX_NEW_TOKENS = 16
"""The longest reference answer has 5; a broken model never ends one."""


class TrainedHere:
    """Where a stand-in's weights are."""

    name: str

    def find_weights(self, models_dir: Path | None) -> Path | None:
        """The shipped folder; or ``models_dir/NAME``; or None."""
        own = None if models_dir is None else models_dir / self.name
        if own is not None and own.is_dir():
            return own
        return find_folder(self.name, None, SHIPPED_WEIGHTS, models_dir)


class StandinLlava(TrainedHere, LlavaAdapter):
    """``standin-llava``."""


class StandinInternVL(TrainedHere, InternVLAdapter):
    """``standin-internvl``: a picture is one tile, whatever the benchmark."""

    def max_tiles(self, dataset: str | None, num_images: int) -> int:
        return 1


def _how_to_get(family: str) -> str:
    return (
        f"run 'mqbench standin train --family {family}' and 'mqbench standin harden --family {family}', then pass "
        "--models-dir runs"
    )


LLAVA = StandinLlava("standin-llava", None, _how_to_get("llava"), "", max_new_tokens=MAX_NEW_TOKENS)
INTERNVL = StandinInternVL("standin-internvl", None, _how_to_get("internvl"), "", max_new_tokens=MAX_NEW_TOKENS)
ADAPTERS = (INTERNVL, LLAVA)
