"""Settings every test shares. They are made before torch or DeepSpeed are imported, which read them once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest


def _configure_environment() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is wrong
    os.environ.setdefault("WANDB_MODE", "offline")
    # Processes of a multi-process test share the cores; OpenMP's default of one thread per core makes them thrash.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


_configure_environment()
# A shared machine is slow at moments; how long an example took says nothing about it.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The directory that holds pretrain_prune.py, tools/ and examples/."""
    return Path(__file__).resolve().parents[1]


@contextmanager
def _environment_restored() -> Iterator[None]:
    """A run in this process sets the launcher's variables, of which a later one, or a library, would make a job."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _own_environment_of_a_test() -> Iterator[None]:
    with _environment_restored():
        yield


@pytest.fixture(scope="module", autouse=True)
def _own_environment_of_a_file() -> Iterator[None]:
    """For fixtures that all of a file's tests share."""
    with _environment_restored():
        yield
