"""A model compiled ahead of time says what it says in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_prune.config.values import parse_source_shape
from megatron_prune.deployment.compiled import CompiledModel, no_trace_on_disk
from megatron_prune.deployment.contestants import random_model
from megatron_prune.errors import UserError

#: As pruning leaves one: no width is a multiple of anything, and three query heads share one K/V head.
ODD = "hidden=37,ffn=51,heads=3,kv_heads=1,head_dim=16,layers=2,vocab=97,tied=1"


def test_prefill_and_decoding_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = random_model(parse_source_shape(ODD), "fp32")
    said: list[tuple[int, int]] = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kept"))
    compiled = CompiledModel(model, 12, lambda tokens, threads: said.append((tokens, threads)))
    tokens = torch.randint(97, (11,))
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0]
    with no_trace_on_disk():
        _compare(compiled, tokens, expected)
    assert said == [(5, torch.get_num_threads()), (1, torch.get_num_threads())], "once each"
    assert not (tmp_path / "kept").exists()


def _compare(compiled: CompiledModel, tokens: Tensor, expected: Tensor) -> None:
    for _ in range(2):  # a new sequence begins with an empty cache
        feed = compiled.start()
        torch.testing.assert_close(feed(tokens[:5].tolist()), expected[4], rtol=1e-4, atol=1e-5)
        for place in range(5, 11):
            torch.testing.assert_close(feed([int(tokens[place])]), expected[place], rtol=1e-4, atol=1e-5)


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    compiled = CompiledModel(random_model(parse_source_shape(ODD), "fp32"), 4, lambda tokens, threads: None)
    with pytest.raises(
        UserError, match=r"the model cannot be compiled \(.*\); install a C\+\+ compiler, name one in CXX"
    ):
        compiled.start()([1])
