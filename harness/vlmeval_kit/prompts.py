"""The prompts that VLMEvalKit sends to a model family, row by row."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mqbench.harness.datasets.calibration import Calibration
from mqbench.harness.datasets.catalog import Task
from mqbench.harness.datasets.files import TaskData, reference_answer
from mqbench.harness.models.adapter import Message
from mqbench.harness.vlmeval_kit.library import build_dataset, vlmeval_module


@dataclass(frozen=True)
class PromptWrapper:
    """The class with which VLMEvalKit's wrapper of a model family replaces a dataset's own prompt.

    Attributes:
        module: Where it is.
        name: Of the class.
        settings: What its constructor, which would load the model, sets beside fixed texts, and its prompts read.
    """

    module: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


INTERNVL = PromptWrapper(
    "vlmeval.vlm.internvl.internvl_chat",
    "InternVLChat",
    MappingProxyType({"_use_custom_prompt": True, "use_mpo_prompt": False, "use_cot": False}),
)
PROMPT_WRAPPERS: Mapping[str, PromptWrapper] = MappingProxyType(
    {
        "qwen2_vl": PromptWrapper(
            "vlmeval.vlm.qwen2_vl.prompt", "Qwen2VLPromptMixin", MappingProxyType({"_use_custom_prompt": True})
        ),
        "cogvlm2": PromptWrapper("vlmeval.vlm.cogvlm", "CogVlm"),
        "llava": PromptWrapper("vlmeval.vlm.llava.llava", "LLaVA"),
        "internvl": INTERNVL,
        "internvl2": INTERNVL,
        "minicpm_v": PromptWrapper("vlmeval.vlm.minicpm_v", "MiniCPM_V_2_6"),
    }
)
"""By family; one that is not listed gets the datasets' own prompts (VLMEvalKit's settings of Qwen2.5-VL)."""


def build_messages(task: Task, data: TaskData, family: str) -> list[Message]:
    """The prompt of every row, as VLMEvalKit's wrapper of a model family sends it; no image for text-only rows.

    Every item also names the benchmark under ``dataset``: VLMEvalKit's wrappers choose pixel limits by it.
    """
    dataset = build_dataset(task, data)
    build = dataset.build_prompt
    wrapper = _prompt_wrapper(family)
    if wrapper is not None and wrapper.use_custom_prompt(task.dataset):
        wrapper.set_dump_image(dataset.dump_image)
        build = functools.partial(wrapper.build_prompt, dataset=task.dataset)
    prompts = (build(dataset.data.iloc[row]) for row in range(len(data)))
    return [[{**item, "dataset": task.dataset} for item in prompt] for prompt in prompts]


def prompts_sha256(task: Task, data: TaskData, family: str) -> str:
    """Hash of every prompt's texts in order: a new template shows. The images are part of the data's own hash."""
    digest = hashlib.sha256()
    for message in build_messages(task, data, family):
        texts = [item["value"] if item["type"] == "text" else f"<{item['type']}>" for item in message]
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()


def calibration_prompts(calibration: Calibration, family: str) -> list[tuple[Message, str]]:
    """Every calibration sample as (prompt, reference answer), grouped by benchmark."""
    samples: list[tuple[Message, str]] = []
    for part in calibration.parts:
        answers = (reference_answer(part.task, row) for row in part.rows())
        samples.extend(zip(build_messages(part.task, part, family), answers, strict=True))
    return samples


def _prompt_wrapper(family: str) -> Any | None:
    wrapper = PROMPT_WRAPPERS.get(family)
    if wrapper is None:
        return None
    wrapper_class = getattr(vlmeval_module(wrapper.module), wrapper.name)
    made = object.__new__(wrapper_class)
    vars(made).update({**_texts_of_constructor(wrapper_class), **wrapper.settings})
    return made


def _texts_of_constructor(wrapper_class: type) -> dict[str, str]:
    """The fixed texts that a constructor sets, by attribute: instructions that ``build_prompt`` puts around questions.

    Read from its source, since running it would load the model.
    """
    source = textwrap.dedent(inspect.getsource(wrapper_class.__init__))  # type: ignore[misc]
    assignments = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign))
    return {
        node.targets[0].attr: node.value.value
        for node in assignments
        if isinstance(node.targets[0], ast.Attribute)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
