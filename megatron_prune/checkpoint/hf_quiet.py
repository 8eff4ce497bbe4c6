"""Keeps transformers' progress bars, and remarks of libraries that it looks for, out of our output."""

from __future__ import annotations

import logging

#: torchao, which transformers imports with the first model if it is installed, reports every CUDA library of its own
#: that a machine without CUDA cannot load, and makes torch speak of what it registers.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def quiet_transformers() -> None:
    """Call it before a model is loaded; imports transformers, which takes seconds."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # a bar per verified snapshot is noise in a training log
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
