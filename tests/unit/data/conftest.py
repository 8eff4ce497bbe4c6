"""A small tokenizer shared by the data tests; training it imports transformers, which takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prune.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXT = "the quick brown fox jumps over a lazy dog while two wise owls watch and say nothing at all\n"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 pieces as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe([TEXT] * 20, 300, directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    """The same, opened without transformers."""
    return load_tokenizer(str(tokenizer_dir / "tokenizer.json"))
