"""VLMEvalKit in this process: its modules, imported without leaving a trace, and its dataset objects over our rows.

Only this package imports vlmeval, when a prompt or a score is first needed, once per process (15 to 60 s).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from mqbench.harness.datasets.catalog import OPTION_COLUMNS, Task
from mqbench.harness.datasets.files import TaskData
from mqbench.harness.datasets.headline import NO_GROUP
from mqbench.harness.datasets.images import cache_folder
from mqbench.harness.process_state import environment_kept, libraries_kept, logging_kept

_GROUP_COLUMNS = ("split", "category", "l2-category")


@functools.cache
def vlmeval_module(name: str) -> Any:
    """A module of vlmeval; the first call imports the whole package."""
    with vlmeval_state():
        return importlib.import_module(name)


@contextlib.contextmanager
def vlmeval_state() -> Iterator[None]:
    """Lets vlmeval work in its own process-wide state and restores ours afterwards.

    Its import switches off TLS verification and autograd, reseeds torch, configures the root logger, reports a missing
    ``.env`` as an error, lifts Pillow's size limit and adds environment variables and search paths. It creates
    ``~/LMUData`` unless ``LMUData`` names a folder, and lets ``PRED_FORMAT`` and others decide how scores are kept.
    """
    with environment_kept(), logging_kept(), libraries_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        os.environ |= {"LMUData": str(cache_folder("vlmeval")), "PRED_FORMAT": "tsv"}
        for name in ("EVAL_FORMAT", "VERBOSE"):
            os.environ.pop(name, None)
        yield


def build_dataset(task: Task, data: TaskData) -> Any:
    """VLMEvalKit's dataset object over our rows: fresh each time, since runs change it. Its index is the row number."""
    parent = getattr(vlmeval_module("vlmeval.dataset"), task.dataset_class)
    image_root = str(cache_folder("vlmeval"))
    frame = _vlmeval_frame(data)

    def load_data(self: Any, dataset: str) -> pd.DataFrame:
        self.img_root = image_root
        return frame

    with vlmeval_state():
        return type(parent.__name__, (parent,), {"load_data": load_data})(task.dataset)


def _vlmeval_frame(data: TaskData) -> pd.DataFrame:
    frame = data.frame.drop(columns="images")
    for column in (*OPTION_COLUMNS, "hint"):
        if column in frame:  # only NaN counts as absent
            frame[column] = [text or np.nan for text in frame[column]]
    for column in _GROUP_COLUMNS:
        if column in frame:  # and NaN breaks the evaluators' sums by group
            frame[column] = [text or NO_GROUP for text in frame[column]]
    return frame.assign(index=range(len(frame)), image_path=[list(paths) for paths in data.frame["images"]])
