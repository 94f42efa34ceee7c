"""Stand-ins of further families; in place of the shipped weights a folder that somebody trained is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mqbench.harness.models.glm_4v import TOKEN_CONFIG, GLM4VAdapter
from mqbench.harness.models.internvl import InternVLAdapter
from mqbench.harness.models.llava import LlavaAdapter
from mqbench.harness.models.minicpm_v import MiniCPMVAdapter
from mqbench.harness.models.one_image import TextProcessor
from mqbench.harness.models.qwen_vl import QwenVLAdapter
from mqbench.harness.models.slices import PROCESSOR_FILE, SliceProcessor, load_slice_processor
from mqbench.harness.models.weights import CONFIG_FILE, find_folder

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
MAX_NEW_TOKENS = 16
"""The longest reference answer has 5; a broken model never ends one."""


TOKENIZER_FILE = "tokenizer.json"


class TrainedHere:
    """Where a stand-in's weights are."""

    name: str

    def find_weights(self, models_dir: Path | None) -> Path | None:
        """``models_dir/NAME``; or the shipped folder; or None."""
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


class StandinGLM4V(TrainedHere, GLM4VAdapter):
    """``standin-glm-4v``: its tokenizer is a ``tokenizer.json``, not a tiktoken file."""

    needed = ((CONFIG_FILE,), (TOKENIZER_FILE,), (TOKEN_CONFIG,))

    def load_tokenizer(self, path: Path) -> Any:
        return _fast_tokenizer(path)


class StandinMiniCPMV(TrainedHere, MiniCPMVAdapter):
    """``standin-minicpm-v``: its tokenizer is not of Qwen2's class."""

    needed = ((CONFIG_FILE,), (TOKENIZER_FILE,), (PROCESSOR_FILE,))

    def load_processor(self, path: Path) -> SliceProcessor:
        return replace(load_slice_processor(path), tokenizer=_fast_tokenizer(path))


class StandinQwenVL(TrainedHere, QwenVLAdapter):
    """``standin-qwen-vl``: its tokenizer is a ``tokenizer.json``, not a tiktoken file."""

    needed = ((CONFIG_FILE,), (TOKENIZER_FILE,))

    def load_processor(self, path: Path) -> TextProcessor:
        visual = self.model_class().config_class.from_pretrained(path, local_files_only=True).visual
        return TextProcessor(_fast_tokenizer(path), visual["image_size"], visual["n_queries"])


def _fast_tokenizer(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)


def _how_to_get(family: str) -> str:
    return (
        f"run 'mqbench standin train --family {family}' and 'mqbench standin harden --family {family}', then pass "
        "--models-dir runs"
    )


def _arguments(family: str) -> dict[str, Any]:
    return {
        "name": f"standin-{family}",
        "paper_name": None,
        "how_to_get": _how_to_get(family),
        "repo_id": "",
        "max_new_tokens": MAX_NEW_TOKENS,
    }


GLM_4V = StandinGLM4V(**_arguments("glm-4v"))
INTERNVL = StandinInternVL(**_arguments("internvl"))
LLAVA = StandinLlava(**_arguments("llava"))
MINICPM_V = StandinMiniCPMV(**_arguments("minicpm-v"))
QWEN_VL = StandinQwenVL(**_arguments("qwen-vl"))
ADAPTERS = (GLM_4V, INTERNVL, LLAVA, MINICPM_V, QWEN_VL)
