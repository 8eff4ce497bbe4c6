"""The prompt that transformers and llama.cpp are compared on, with a tokenizer that begins every text."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.deployment import gguf
from megatron_prune.errors import UserError
from megatron_prune.evaluation.scoring import load_causal_lm

BOS, TEXT = 1, [5, 6, 7]


class TheirModel:
    """Continues everything with the token 3; its tokenizer knows the text."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.open = True

    def generate(self, tokens: list[int], **_: Any) -> Iterator[int]:
        assert tokens == [BOS, *TEXT]
        while True:
            yield 3

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        return [BOS, *TEXT] if add_bos else TEXT

    def close(self) -> None:
        self.open = False


def test_a_beginning_of_sequence_is_no_difference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BOS, *TEXT] if add_special_tokens else TEXT}

    monkeypatch.setattr(gguf, "require_llama_cpp", lambda what: types.SimpleNamespace(Llama=TheirModel))
    monkeypatch.setattr(gguf, "load_causal_lm", lambda directory, dtype: (None, tokenizer))
    monkeypatch.setattr(gguf, "_greedy", lambda model, tokens, count: [3] * count)
    (report,) = gguf.compare_greedy(tmp_path, tmp_path / "x.gguf", ["text"], 4)
    assert report.same_prompt


def test_a_config_that_is_a_list_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_causal_lm(tmp_path, torch.float32)
