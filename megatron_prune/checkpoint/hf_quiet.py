"""Keeps transformers' progress bars and remarks, and those of libraries that it looks for, out of our output."""

from __future__ import annotations

import logging
import os

import torch

#: torchao, which transformers imports with the first model if it is installed, reports every CUDA library of its own
#: that a machine without CUDA cannot load, and makes torch speak of what it registers.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def quiet_transformers() -> None:
    """Call it before a model is loaded; imports transformers, which takes seconds."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would warn of finding none
    import transformers

    transformers.utils.logging.disable_progress_bar()  # a bar per verified snapshot is noise in a training log
    transformers.utils.logging.set_verbosity_error()  # what it warns of, missing tensors first, is an error of ours
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
