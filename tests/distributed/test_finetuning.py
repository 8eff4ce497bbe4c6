"""Instruction tuning of a pruned odd shape: every layout follows one process, and one process follows transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from layout_runs import Layout, Runs, Source, assert_same_curves, assert_same_weights, lines

from megatron_prune.data.instructions import InstructionSamples, read_instructions
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.parallel.linear_loss import IGNORED
from megatron_prune.tuning import check_target

CHARACTERS = "\n #:-" + "".join(chr(code) for code in (*range(48, 58), *range(65, 91), *range(97, 123)))
SEQ_LENGTH = 64
BATCH = 4


@pytest.fixture(scope="module")
def pruned(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a model of 3 heads and 24 hidden channels, with a tokenizer of characters."""
    run = tmp_path_factory.mktemp("finetuning") / "run"
    shutil.copytree(runs.get(Source(6, 3), Layout()), run)
    vocabulary = {character: number for number, character in enumerate(["</s>", *CHARACTERS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="-"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.save(str(run / "source" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (run / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    return run


def test_the_checkpoints_of_pruning_are_not_taken_for_a_tuning(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(UserError, match="is the directory of another run"):
        check_target(tmp_path, "checkpoints")


@pytest.fixture(scope="module")
def data(pruned: Path) -> Path:
    """Responses of very different lengths: a mean of means would not be the mean."""
    words = ["a", "bc", "def", "ghijk", "lmnopqrstu", "vw", "xyzabcdefghi", "j"]
    path = pruned.parent / "data.json"
    path.write_text(json.dumps([{"instruction": word[0], "output": word} for word in words]))
    return path


def tune(repo_root: Path, runs: Runs, pruned: Path, data: Path, layout: Layout, **flags: str) -> Path:
    """The tool itself, on the ranks of a layout."""
    save = pruned.parent / f"tuned-{layout}"
    save.mkdir()
    given = {
        "data": str(data),
        "save": str(save),
        "epochs": "3",
        "seq-length": str(SEQ_LENGTH),
        "global-batch-size": str(BATCH),
        "lr": "1e-3",
        "adam-eps": "1e-5",
        "log-interval": "1",
        "tensor-model-parallel-size": str(layout.tensor),
        "pipeline-model-parallel-size": str(layout.pipeline),
        **flags,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    words += ["--sequence-parallel"] * layout.sequence_parallel
    runs.cluster.run(repo_root / "tools" / "finetune.py", [str(pruned), *words], layout.processes, save)
    return save


@pytest.fixture(scope="module")
def alone(repo_root: Path, runs: Runs, pruned: Path, data: Path) -> Path:
    """The whole batch in one forward pass."""
    return tune(repo_root, runs, pruned, data, Layout())


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(2, 2, sequence_parallel=True)], ids=str)
def test_layouts_follow_one_process(
    repo_root: Path, runs: Runs, pruned: Path, data: Path, alone: Path, layout: Layout
) -> None:
    run = tune(repo_root, runs, pruned, data, layout, **{"micro-batch-size": "1"})
    assert len(lines(run / "metrics.jsonl")) == 6
    assert_same_curves(run, alone)
    assert_same_weights(run, alone)


def test_one_process_follows_transformers(alone: Path, pruned: Path, data: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_prune.checkpoint.run_export import model_directory

    model = AutoModelForCausalLM.from_pretrained(model_directory(pruned))
    assert (model.config.num_attention_heads, model.config.hidden_size) == (3, 24)
    tokenizer = load_tokenizer(str(pruned / "source"))
    samples = InstructionSamples(read_instructions(data), tokenizer, SEQ_LENGTH, 1234, model.config.vocab_size)
    tokens, counted = samples.batch(0, BATCH), samples.counted(0, BATCH)
    labels = tokens.clone()
    labels[:, 0] = IGNORED
    labels[:, 1:].masked_fill_(~counted, IGNORED)
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=labels).loss.item()
    assert lines(alone / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_the_tuned_model_loads_in_transformers(alone: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(alone / "export")
    assert model.config.num_attention_heads == 3
    assert AutoTokenizer.from_pretrained(alone / "export").eos_token == "</s>"
