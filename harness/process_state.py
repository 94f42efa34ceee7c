"""Process-wide state, saved on entry and put back on exit: for code of third parties that changes it in passing."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import ssl
import sys
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Environment variables and the module search path."""
    environment, search_path = dict(os.environ), list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = search_path
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Handlers and level of the root logger, and what ``logging.disable`` silences."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)


@contextlib.contextmanager
def libraries_kept() -> Iterator[None]:
    """TLS verification, Pillow's size limit, autograd, and the random states of Python, NumPy and torch."""
    tls_context, pixel_limit = ssl._create_default_https_context, Image.MAX_IMAGE_PIXELS
    random_state, numpy_state, grad = random.getstate(), np.random.get_state(), torch.is_grad_enabled()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        ssl._create_default_https_context = tls_context
        Image.MAX_IMAGE_PIXELS = pixel_limit
        random.setstate(random_state)
        np.random.set_state(numpy_state)
        torch.set_grad_enabled(grad)
