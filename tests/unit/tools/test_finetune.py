"""tools/finetune.py on a pruned shape that divides nothing: 29 channels, 5 heads, K/V groups that differ by layer."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.hf import hf_config_from_architecture
from megatron_prune.checkpoint.reader import Checkpoint
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.checkpoint.store import newest_checkpoint
from megatron_prune.parallel.fragments import Layout

CHARACTERS = "\n #:-IR" + "".join(map(chr, range(97, 123)))


@pytest.fixture
def run_dir(tmp_path: Path, hold_states: Callable[..., Any]) -> Path:
    """What pruning leaves, but without a tokenizer: that of another place is given."""
    states = hold_states()
    reshard(states, tmp_path / "run", Layout(), 1)
    (tmp_path / "run" / "source").mkdir()
    config = hf_config_from_architecture(states.manifest.partition.source, torch_dtype="float32", extra={})
    (tmp_path / "run" / "source" / "config.json").write_text(json.dumps(config))
    return tmp_path / "run"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One token a character."""
    vocabulary = {character: number for number, character in enumerate(["</s>", *CHARACTERS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="-"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    (tmp_path / "tokenizer").mkdir()
    made.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("more", [[], ["--lora-rank", "2"]], ids=["whole", "adapters"])
def test_a_pruned_odd_shape_is_tuned_and_answers(
    repo_root: Path, run_dir: Path, tokenizer: Path, tmp_path: Path, more: list[str]
) -> None:
    from transformers import AutoModelForCausalLM

    newest = newest_checkpoint(run_dir)
    assert newest is not None
    arch: Architecture = Checkpoint(newest).manifest.partition.architecture()
    assert (arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads) == (29, 42, 5)
    assert len({arch.kv_of_head(layer) for layer in range(arch.num_layers)}) > 1

    data, answers, save = tmp_path / "data.json", tmp_path / "answers.json", tmp_path / "tuned"
    data.write_text(json.dumps([{"instruction": word[0], "output": word} for word in ("a", "bc", "def", "ghijk")]))
    words = [str(run_dir), "--data", str(data), "--save", str(save), "--tokenizer", str(tokenizer)]
    words += ["--epochs", "2", "--global-batch-size", "4", "--seq-length", "48", "--lr", "1e-2"]
    words += ["--generate", str(answers), "--max-new-tokens", "2"]
    main = runpy.run_path(str(repo_root / "tools" / "finetune.py"))["main"]
    assert main([*words, *more]) == 0

    tuned = AutoModelForCausalLM.from_pretrained(save / "export").state_dict()
    before = Checkpoint(newest)
    for name, spec in before.specs().items():
        if name.endswith("o_proj.weight"):
            assert tuned[name].shape == (29, 20)
            assert not torch.equal(tuned[name].float(), before.live(spec))
    assert len(json.loads(answers.read_text())) == 4
