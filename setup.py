"""Packaging of megatron-prune. Versions known good together are pinned in constraints.txt, ranges live here."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def _version() -> str:
    """The version, read rather than imported so that a build needs none of our dependencies."""
    text = (ROOT / "megatron_prune" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert match is not None, "megatron_prune/__init__.py must define __version__"
    return match.group(1)


PLOTS = ["matplotlib>=3.8"]
WANDB = ["wandb>=0.17"]
TENSORBOARD = ["tensorboard>=2.16"]

setup(
    name="megatron-prune",
    version=_version(),
    description="Prune a language model structurally while pretraining it",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_prune", "megatron_prune.*"]),
    package_data={"megatron_prune": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed==0.19.*",  # we read ZeRO's parameter fragments, which no DeepSpeed release promises to keep
        "transformers>=4.51",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "huggingface_hub>=0.30",
        "tyro>=0.9",
        "PyYAML>=6.0",
        "tqdm>=4.66",
        "pyarrow>=15",
        "zstandard>=0.22",
    ],
    extras_require={
        "plots": PLOTS,
        "wandb": WANDB,
        "tensorboard": TENSORBOARD,
        "dev": [
            *PLOTS,
            *WANDB,
            *TENSORBOARD,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "megatron-core>=0.12",  # the other reader of .bin/.idx that the tests compare ours with
        ],
    },
)
