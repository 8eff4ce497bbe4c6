"""``tools/finetune.py`` from start to answers: a model follows a format that it did not know."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.data.instructions import Instruction, read_instructions
from megatron_prune.data.tokenizer import load_tokenizer
from megatron_prune.generation import respond
from megatron_prune.lora import LoraSettings, _collate, train_adapters
from megatron_prune.parallel.linear_loss import IGNORED

Main = Callable[[Sequence[str]], int]
NEW_TOKENS = 24
#: Long enough for most of the answers to be right to the letter, which the number in the question decides.
EPOCHS = 8
RIGHT = 0.5


@pytest.fixture(scope="module")
def finetune(repo_root: Path) -> Main:
    main: Main = runpy.run_path(str(repo_root / "tools" / "finetune.py"))["main"]
    return main


@pytest.fixture(scope="module")
def demo(repo_root: Path) -> Path:
    return repo_root / "examples" / "demo"


def answer(instruction: str) -> str:
    """What the demo's instructions teach."""
    verb, sign = next(
        pair for pair in (("add", "+"), ("subtract", "-"), ("multi", "*"), ("divide", "/")) if pair[0] in instruction
    )
    number = next(word for word in instruction.strip(".").split() if word.isdigit())
    name = {"multi": "multiply"}.get(verb, verb)
    return f"def {name}(value):\n    return value {sign} {number}"


def test_the_demo_s_data_is_as_the_answers_are_judged(demo: Path) -> None:
    examples = read_instructions(demo / "instructions.json")
    assert all(example.output == answer(example.instruction) for example in examples)
    prompts = read_instructions(demo / "prompts.json", with_output=False)
    assert not {prompt.instruction for prompt in prompts} & {example.instruction for example in examples}


def test_a_tuned_model_follows_instructions_it_was_not_shown(
    finetune: Main, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = read_instructions(demo / "prompts.json", with_output=False)
    before = respond(demo / "source", prompts, NEW_TOKENS)
    assert not any(text.startswith("def ") for text in before)

    words = [str(demo / "source"), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "tuned")]
    words += ["--epochs", str(EPOCHS), "--global-batch-size", "8", "--lr", "3e-3", "--seq-length", "128"]
    words += ["--generate", str(tmp_path / "answers.json"), "--prompts", str(demo / "prompts.json")]
    words += ["--max-new-tokens", str(NEW_TOKENS)]
    assert finetune(words) == 0
    assert "84 examples of at most 128 tokens; 8 epochs in 84 steps of 8" in capsys.readouterr().out
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [entry["instruction"] for entry in answers] == [prompt.instruction for prompt in prompts]
    assert {entry["generator"] for entry in answers} == {"tuned"}
    assert all(entry.keys() == {"instruction", "output", "generator"} for entry in answers)
    right = [entry["output"] == answer(entry["instruction"]) for entry in answers]
    assert sum(right) >= RIGHT * len(right), answers

    assert finetune(words) == 0  # all steps are done: it only answers again
    again = capsys.readouterr().out
    assert "resuming" in again
    assert "step 1/84" not in again
    assert json.loads((tmp_path / "answers.json").read_text()) == answers

    (tmp_path / "other.json").write_text((demo / "instructions.json").read_text().replace("value", "other"))
    model = shutil.copytree(demo / "source", tmp_path / "model")
    assert finetune([str(model), *words[1:]]) == 0  # the same weights elsewhere
    changed_last_bit(model / "model.safetensors")
    capsys.readouterr()
    kept = (tmp_path / "answers.json").stat().st_mtime_ns
    for changed, named in (
        (["--data", str(tmp_path / "other.json")], "--data"),
        (["--lr", "1e-3"], "--lr"),
        (["--epochs", "4"], "--epochs"),
        (["--weight-decay", "0.1"], "--weight-decay"),
    ):
        assert finetune([*words, *changed]) == 2
        assert f"holds a finished tuning with another {named}" in capsys.readouterr().err
    assert finetune([str(model), *words[1:]]) == 2
    assert "holds a finished tuning with another MODEL" in capsys.readouterr().err
    assert (tmp_path / "answers.json").stat().st_mtime_ns == kept


def changed_last_bit(weights: Path) -> None:
    """Another model of the same shape."""
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1
    weights.write_bytes(content)


@pytest.fixture(scope="module")
def tiny(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / "source" / name, directory)
    return directory


def files_of(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_unfinished_tuning_goes_on_with_its_own_model_and_data_only(
    finetune: Main, tiny: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, save = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "tuned"
    words = [str(model), "--data", str(demo / "instructions.json"), "--save", str(save), "--seq-length", "64"]
    words += ["--global-batch-size", "16", "--epochs", "1"]
    stopped = [*words, "--exit-duration-in-mins", "1e-9"]
    assert finetune(stopped) == 75
    (tmp_path / "other.json").write_text((demo / "instructions.json").read_text().replace("value", "other"))
    before = files_of(save)
    capsys.readouterr()
    assert finetune([*words, "--data", str(tmp_path / "other.json")]) == 2
    assert "holds an unfinished tuning with another --data" in capsys.readouterr().err
    changed_last_bit(model / "model.safetensors")
    assert finetune(words) == 2
    assert "holds an unfinished tuning with another MODEL" in capsys.readouterr().err
    assert files_of(save) == before
    assert finetune([str(tiny), *words[1:]]) == 0
    assert "resuming" in capsys.readouterr().out
    # the tuned run as a base, which then goes on
    again = [str(save), *words[1:4], str(tmp_path / "again"), *words[5:]]
    assert finetune([*again, "--exit-duration-in-mins", "1e-9"]) == 75
    assert finetune([str(tiny), *words[1:], "--epochs", "2"]) == 0
    capsys.readouterr()
    assert finetune(again) == 2
    assert "holds an unfinished tuning with another MODEL" in capsys.readouterr().err


def test_a_dry_run_answers_nothing(finetune: Main, tiny: Path, demo: Path, tmp_path: Path) -> None:
    save, answers = tmp_path / "tuned", tmp_path / "answers.json"
    words = [str(tiny), "--data", str(demo / "instructions.json"), "--save", str(save), "--dry-run"]
    words += ["--generate", str(answers)]
    assert finetune(words) == 0
    assert not save.exists()
    assert not answers.exists()


def test_adapters_see_one_gpu(
    finetune: Main,
    tiny: Path,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = [str(tiny), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "adapted")]
    assert finetune([*words, "--lora-rank", "2"]) == 2
    assert "works on one GPU and 2 are visible; set CUDA_VISIBLE_DEVICES=0" in capsys.readouterr().err
    assert not (tmp_path / "adapted").exists()


def test_adapters_change_the_model_and_are_merged(
    finetune: Main, tiny: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    words = [
        str(tiny),
        "--data",
        str(demo / "instructions.json"),
        "--save",
        str(tmp_path / "adapted"),
        "--lora-rank",
        "2",
    ]
    assert finetune([*words, "--epochs", "0.5", "--global-batch-size", "6"]) == 0
    assert "adapters of rank 2 merged" in capsys.readouterr().out
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "adapted" / "export").state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert (tmp_path / "adapted" / "adapter" / "adapter_model.safetensors").exists()
    assert load_tokenizer(str(tmp_path / "adapted" / "export")).eod_id == load_tokenizer(str(tiny)).eod_id
    assert finetune([*words, "--precision", "fp32"]) == 2
    assert "--precision goes to the trainer, which --lora-rank does not use" in capsys.readouterr().err


def test_adapters_go_with_the_tokenizer_that_is_given(finetune: Main, tiny: Path, demo: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    words = [str(model), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "adapted")]
    words += ["--lora-rank", "2", "--epochs", "0.1", "--tokenizer", str(demo / "source")]
    assert finetune(words) == 0
    assert load_tokenizer(str(tmp_path / "adapted" / "export")).eod_id == load_tokenizer(str(tiny)).eod_id


def test_adapters_that_are_no_numbers_leave_what_was_there(
    finetune: Main, tiny: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save = tmp_path / "adapted"
    words = [str(tiny), "--data", str(demo / "instructions.json"), "--save", str(save), "--lora-rank", "2"]
    words += ["--epochs", "0.1", "--global-batch-size", "4", "--seq-length", "64"]
    assert finetune(words) == 0
    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert finetune([*words, "--lr", "1e30"]) == 2
    assert "error: the training at --lr 1e+30 ended with weights that are no numbers" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in save.rglob("*") if path.is_file()} == before


def test_a_merged_model_that_is_not_what_was_trained_is_put_aside(
    finetune: Main, tiny: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_changed(directory: Path, **options: Any) -> Any:
        loaded: Any = load(directory, **options)
        if options.get("output_loading_info"):
            loaded[0].lm_head.weight.data[0, 0] += 1
        return loaded

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_changed)
    words = [str(tiny), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "adapted")]
    assert finetune([*words, "--lora-rank", "2", "--epochs", "0.1", "--global-batch-size", "4"]) == 1
    assert {path.name for path in (tmp_path / "adapted").glob("export*")} == {"export.unverified"}


def test_adapters_see_the_same_targets_as_the_trainer() -> None:
    tokens = torch.arange(14).reshape(2, 7)
    counted = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    batch = _collate(list(zip(tokens, counted, strict=True)))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    skip = IGNORED
    assert batch["labels"].tolist() == [[skip, skip, 2, 3, skip], [skip, skip, skip, skip, 11]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "p.json"], "--prompts p.json is of no use without --generate"),
        (["--train-iters", "5"], "--train-iters is set by finetune.py itself"),
        (["--lerning-rate", "5"], "unknown flag --lerning-rate"),
        (["--lora-rank", "0"], "--lora-rank 0 must be 1 or more"),
    ],
)
def test_mistakes(
    finetune: Main,
    tiny: Path,
    demo: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(tiny), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "save")]
    assert finetune([*given, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("written", ["data.json", "prompts.json", "model/config.json"])
def test_an_input_is_not_written_over(
    finetune: Main, tiny: Path, tmp_path: Path, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    for name in ("data.json", "prompts.json"):
        (tmp_path / name).write_text('[{"instruction": "Say", "output": "A"}]')
    before = (tmp_path / written).read_bytes()
    words = [str(tmp_path / "model"), "--data", str(tmp_path / "data.json"), "--save", str(tmp_path / "save")]
    words += ["--prompts", str(tmp_path / "prompts.json"), "--generate", str(tmp_path / written)]
    assert finetune(words) == 2
    assert f"{written} is what this command reads; give another file" in capsys.readouterr().err
    assert (tmp_path / written).read_bytes() == before
    assert not (tmp_path / "save").exists()


def test_prompts_are_read_before_training(
    finetune: Main, tiny: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.json").write_text("[1]")
    words = [str(tiny), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "save")]
    words += ["--prompts", str(tmp_path / "prompts.json"), "--generate", str(tmp_path / "answers.json")]
    assert finetune(words) == 2
    assert "prompts.json: entry 1 has no text under 'instruction'" in capsys.readouterr().err
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("words", [[], ["--lora-rank", "2"]], ids=["whole", "adapters"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_no_model_is_tuned_from_random_weights(
    finetune: Main,
    tiny: Path,
    demo: Path,
    tmp_path: Path,
    words: list[str],
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    weights = model / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-4])
    given = [str(model), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "save")]
    assert finetune([*given, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    expected = {"missing": "has neither model.safetensors nor", "truncated": "is no readable safetensors file"}
    assert expected[damage] in line
    assert not (tmp_path / "save").exists()


def test_adapters_go_where_something_can_be_written(
    finetune: Main, tiny: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = [str(tiny), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "file" / "save")]
    assert finetune([*words, "--lora-rank", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (Not a directory)" in line


def test_ctrl_c_outside_of_the_training_has_a_shell_s_code(
    finetune: Main,
    tiny: Path,
    demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_prune import pretrain

    def interrupted(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "main", interrupted)
    assert finetune([str(tiny), "--data", str(demo / "instructions.json"), "--save", str(tmp_path / "save")]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_missing_library_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from megatron_prune.data.instructions import InstructionSamples
    from megatron_prune.errors import UserError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    samples = InstructionSamples([Instruction("a", "", "b")], load_tokenizer(str(tiny)), 64, 0, 2048)
    with pytest.raises(UserError, match="pip install peft"):
        train_adapters(tiny, samples, LoraSettings(2, 1e-3, 1, 1, 0), tmp_path)
