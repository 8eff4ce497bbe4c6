"""What only some families have: biases and q/k norms, whose gradients tensor parallel ranks have to add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import (
    HERE,
    VOCAB_SIZE,
    Layout,
    Runs,
    Source,
    assert_same_curves,
    assert_same_decisions,
    assert_same_weights,
    exported_weights,
)

ONE = Layout()
#: One KV head for all queries and two for four: the KV heads, with their biases, are copied to both ranks.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "Qwen2": {"num_attention_heads": 5, "num_key_value_heads": 1},
    "Llama": {"num_attention_heads": 5, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
}
LAYOUTS = [Layout(2), Layout(2, sequence_parallel=True), Layout(2, 2, sequence_parallel=True)]
ONLY_THERE = {"Qwen3": "q_norm.weight", "Qwen2": "k_proj.bias", "Llama": "down_proj.bias"}


def make_source(root: Path, family: str) -> Path:
    """A random model with biases and gains that differ from their neutral start."""
    import transformers

    path = root / f"source-{family}"
    if path.exists():
        return path
    torch.manual_seed(5)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2}
    settings = {"max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**sizes, **settings, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    return path


def make_run(runs: Runs, family: str, layout: Layout) -> Path:
    """Run directory of a family on a layout; recomputes activations where it is split, as large models do."""
    directory = runs.root / f"{family}-{layout}"
    if not directory.exists():
        directory.mkdir()
        flags = runs.flags(Source(4, 4), layout, directory, target_shape="hidden=24,ffn=20,heads=2")
        flags += ["--source", str(make_source(runs.root, family))]  # the last of two holds
        flags += ["--recompute"] * (layout != ONE)
        runs.cluster.run(HERE / "layout_worker.py", flags, layout.processes, directory)
    return directory


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_one_process(runs: Runs, family: str, layout: Layout) -> None:
    baseline, run = make_run(runs, family, ONE), make_run(runs, family, layout)
    assert any(name.endswith(ONLY_THERE[family]) for name in exported_weights(baseline))
    assert_same_decisions(run, baseline)
    assert_same_curves(run, baseline)
    assert_same_weights(run, baseline)
