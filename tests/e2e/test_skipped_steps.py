"""A batch whose gradient is not finite is skipped, counted, and decides nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.data.indexed import IndexedDatasetWriter

POISON = 95  # the one token whose embedding is not a number


@pytest.fixture
def poisoned(workspace: Any, tmp_path: Path) -> tuple[Path, Path]:
    """An untied source with one NaN embedding row, and data in which one training sample reads it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(workspace.source, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = math.nan
    model.save_pretrained(tmp_path / "source")
    tokens = np.random.default_rng(0).integers(POISON, size=16 * 4 * 24)
    tokens[16 * 4 * 10 + 3] = POISON
    with IndexedDatasetWriter(str(tmp_path / "text"), np.uint16) as writer:
        writer.add_document(tokens)
        writer.finalize()
    return tmp_path / "source", tmp_path / "text"


@pytest.mark.parametrize(("precision", "split"), [("fp32", 1), ("bf16", 1), ("fp32", 2)])
def test_a_nan_batch_is_skipped(
    workspace: Any, poisoned: tuple[Path, Path], read_jsonl: Any, precision: str, split: int
) -> None:
    """Alone and on ``split`` tensor-parallel ranks of ``split`` stages, of which only the first reads the poison."""
    source, data = poisoned
    name = f"nan-{precision}-{split}"
    flags = workspace.flags(
        name,
        source=source,
        data_path=data,
        precision=precision,
        split="1,0,0",
        eval_interval=0,
        train_iters=20,
        lr_warmup_iters=0,
        prune_ratio="1:1",
        prune_axes="ffn",
        target_shape="ffn=24",
        tensor_model_parallel_size=split,
        pipeline_model_parallel_size=split,
    )
    output = workspace.run_ok(flags, processes=split * split)
    assert "non-finite gradient" in output
    lines = read_jsonl(workspace.root / name / "metrics.jsonl")
    bad = [line["step"] for line in lines if line["loss"] is None]
    assert len(bad) == 1
    assert lines[-1]["skipped"] == 1
    assert all(line["loss"] is not None for line in lines if line["step"] not in bad)
    decided = [event["step"] for event in read_jsonl(workspace.root / name / "ledger.jsonl")]
    assert bad[0] not in decided
    # What was due then is made up for by the next step.
    assert decided.count(bad[0] + 1) == 2
