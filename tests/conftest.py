"""Settings for every test: no network, reproducible examples, no limit on the time of one example."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Before any library reads them: tests must pass on a machine that reaches nothing.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton reads it when it is first imported: without a GPU, kernels are interpreted on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("mqbench", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("mqbench")
