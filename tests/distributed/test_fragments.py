"""The private DeepSpeed attributes we read hold what its public accessors say, also after an upgrade."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prune.data.indexed import IndexedDatasetWriter

TIMEOUT_SECONDS = 240


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fragments_match_the_safe_api(tmp_path: Path, precision: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=50, head_dim=8, **sizes)).save_pretrained(tmp_path / "source")
    with IndexedDatasetWriter(str(tmp_path / "text"), np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(50, size=2000))
        writer.finalize()
    flags = {
        "source": tmp_path / "source",
        "data-path": tmp_path / "text",
        "seq-length": 8,
        "global-batch-size": 4,
        "train-iters": 2,
        "lr-warmup-iters": 0,
        "eval-interval": 0,
        "precision": precision,
        "save": tmp_path / "report.txt",
    }
    worker = Path(__file__).with_name("fragments_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "report.txt").read_text() == "8 gradients compared"
