"""quantize, export_onnx, convert_to_gguf and convert_to_hf --check-targets as a user calls them."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.architecture import Architecture, tensor_specs
from megatron_prune.checkpoint.hf import export_hf, read_config
from megatron_prune.deployment.runtimes import runtime_names
from megatron_prune.evaluation.offline import write_offline_tasks

PAPER = "hidden=1195,ffn=3006,heads=19,head_dim=64,layers=24,vocab=49152,tied=1"


def run(repo_root: Path, tool: str, *arguments: str) -> int:
    code: int = runpy.run_path(str(repo_root / "tools" / f"{tool}.py"))["main"](arguments)
    return code


def test_quantize_compares_three_precisions(
    repo_root: Path, tmp_path: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = tmp_path / "long.py", tmp_path / "short.py"
    long.write_text((repo_root / "tools/demo.py").read_text() * 3)
    short.write_text("def short():\n    pass\n")
    arguments = ["--tokens", "512", "--questions", "1", "--json", str(tmp_path / "table.json"), "--text", str(long)]
    assert run(repo_root, "quantize", str(export), *arguments) == 0
    printed = capsys.readouterr().out
    assert f"{export}-int8: W8A8, " in printed
    assert "stores" not in printed
    fp32, bf16, int8 = json.loads((tmp_path / "table.json").read_text())
    assert int8["num_bytes"] <= 0.30 * fp32["num_bytes"]
    assert bf16["num_bytes"] * 2 == fp32["num_bytes"] == 4 * 1_066_112
    assert abs(int8["perplexity"] / bf16["perplexity"] - 1) < 0.01
    assert 0 <= int8["accuracy"] <= 1

    assert run(repo_root, "quantize", f"{export}-int8") == 2
    assert "quantised already" in capsys.readouterr().err
    for arguments, complaint in (
        (["--tokens", "3"], "--tokens 3 must be 256 or more"),
        (["--calibration-text", "x"], "add one of them"),
        (["--text", str(tmp_path / "none")], "cannot be read"),
        (["--text", str(short)], "give more --text or fewer --tokens"),
        (["--tokens", "512", "--clip", "--calibration-text", str(short)], "fewer --calibration-tokens"),
    ):
        assert run(repo_root, "quantize", str(export), *arguments) == 2
        assert complaint in capsys.readouterr().err


@pytest.fixture
def export(repo_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repo_root / "examples/demo/source", tmp_path / "export"))


@pytest.fixture
def llama_cpp(tmp_path: Path) -> str:
    """A converter that writes a file, whatever the model is."""
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "convert_hf_to_gguf.py").write_text(
        "import pathlib, sys\n"
        "class TextModel:\n    get_vocab_base_pre = None\n"
        "def main():\n    pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).touch()\n"
    )
    return str(tmp_path / "llama.cpp")


def drop(export: Path) -> None:
    (export / "model.safetensors").unlink()


def truncate(export: Path) -> None:
    os.truncate(export / "model.safetensors", 100_000)


def thin_out(export: Path) -> None:
    tensors = load_file(export / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})


def widen(export: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"intermediate_size": 360}))


def call_eight_bit(export: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (drop, "has neither model.safetensors nor"),
        (truncate, "model.safetensors is no readable safetensors file"),
        (thin_out, "model.layers.1.mlp.down_proj.weight"),
        (widen, "config.json says (360, 128)"),
        (call_eight_bit, "is quantised already; give the export"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_whole_export(
    spoil: Callable[[Path], None],
    complaint: str,
    repo_root: Path,
    export: Path,
    llama_cpp: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(export)
    before = sorted(export.parent.iterdir())
    for tool, more in (
        ("quantize", ["--tokens", "512", "--questions", "0"]),
        ("export_onnx", []),
        ("convert_to_gguf", ["--llama-cpp", llama_cpp]),
    ):
        assert run(repo_root, tool, str(export), *more) == 2, tool
        (line,) = capsys.readouterr().err.splitlines()
        assert complaint in line
    assert [path for path in sorted(export.parent.iterdir()) if path.name != "__pycache__"] == before


@pytest.fixture
def odd(repo_root: Path, tmp_path: Path) -> Path:
    """A pruned shape in bf16: odd widths, and layers that differ in K/V heads, which are repeated when written."""
    arch = Architecture("llama", 2, 37, 51, 3, ((1, 2), (1, 1, 1)), 16, 2048, tie_embeddings=True)
    draw = torch.Generator().manual_seed(0)
    weights = {spec.name: torch.randn(arch.tensor_shape(spec), generator=draw) / 8 for spec in tensor_specs(arch)}
    source = repo_root / "examples/demo/source"
    export_hf(
        tmp_path / "odd",
        arch,
        weights,
        dtype=torch.bfloat16,
        tokenizer_dir=source,
        source_config=read_config(source),
        max_shard_bytes=10**9,
    )
    return tmp_path / "odd"


def test_a_pruned_shape_goes_through_every_tool(
    repo_root: Path,
    odd: Path,
    llama_cpp: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Named as the current directory, beside which the outputs go."""
    inside = sorted(odd.iterdir())
    monkeypatch.chdir(odd)
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf", raising=False)
    assert run(repo_root, "convert_to_gguf", ".", "--llama-cpp", llama_cpp, "--outtype", "q8_0") == 0
    assert run(repo_root, "export_onnx", ".") == 0
    assert "is equal at all" in capsys.readouterr().out
    assert run(repo_root, "quantize", ".", "--tokens", "512", "--questions", "0", "--smooth", "--clip") == 0
    assert ". stores bfloat16; fp32 is the same weights" in capsys.readouterr().out
    names = {path.name for path in odd.parent.iterdir()}
    assert names == {"odd", "odd-q8_0.gguf", "odd-int8", "odd.onnx", "llama.cpp"}
    assert sorted(odd.iterdir()) == inside

    write_offline_tasks(odd.parent / "tasks", questions=3)
    for model in (".", "../odd-int8"):
        assert run(repo_root, "evaluate", model, "--task-dir", "../tasks") == 0
        assert f"{Path(model).resolve().name} acc_norm" in capsys.readouterr().out
    assert run(repo_root, "convert_to_hf", "--load", ".", "--check-targets", ",".join(runtime_names())) == 0
    assert "MistralForCausalLM, any widths" in capsys.readouterr().out


def test_where_nothing_can_be_written(
    repo_root: Path, export: Path, llama_cpp: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (export.parent / "file").touch()
    output = str(export.parent / "file" / "output")
    for tool, arguments in (
        ("quantize", [str(export), "--output", output]),
        ("export_onnx", [str(export), "--output", output]),
        ("convert_to_gguf", [str(export), "--llama-cpp", llama_cpp, "--output", output]),
        ("evaluate", [str(export), "--suite", "offline", "--keep-tasks", output]),
        ("evaluate", [str(export), "--suite", "offline", "--output", output]),
        ("convert_to_hf", ["--load", str(export), "--save", output]),
    ):
        assert run(repo_root, tool, *arguments) == 2, tool
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{output}" in line
        assert "cannot be written" in line


def test_a_check_that_cannot_be_made_is_told_before_the_work(
    repo_root: Path,
    export: Path,
    llama_cpp: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for flags, complaint in (
        (["--check", "-1"], "--check -1 must be 0 or more"),
        (["--check", "4"], "--check needs llama-cpp-python"),
        (["--prompt", "def "], "give both"),
        (["--check", "4", "--prompt", ""], "give both"),
    ):
        assert run(repo_root, "convert_to_gguf", str(export), "--llama-cpp", llama_cpp, *flags) == 2
        assert complaint in capsys.readouterr().err
    assert not list(export.parent.glob("*.gguf"))


def test_no_model_is_named(repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tool, more in (("quantize", []), ("export_onnx", []), ("convert_to_gguf", ["--llama-cpp", str(tmp_path)])):
        assert run(repo_root, tool, str(tmp_path), *more) == 2
        assert "is neither a Hugging Face model directory nor the --save of a run" in capsys.readouterr().err


def test_targets_are_checked(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repo_root, "convert_to_hf", "--shape", PAPER, "--check-targets", "vllm, llama.cpp") == 0
    out = capsys.readouterr().out
    assert "no   TP 2" in out
    assert "8% of weights are q8_0" in out
    source = str(repo_root / "examples/demo/source")
    assert run(repo_root, "convert_to_hf", "--load", source, "--check-targets", "transformers") == 0
    assert "LlamaForCausalLM, any widths" in capsys.readouterr().out


def test_flags_that_do_not_go_together(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (["--save", "x"], "--load is missing"),
        (["--load", "x"], "--save is missing"),
        (["--shape", PAPER, "--save", "x"], "--load is missing"),
        (["--shape", PAPER, "--load", "x", "--check-targets", "onnx"], "in place of --load"),
        (["--shape", PAPER, "--check-targets", "trt"], "'trt' is unknown"),
        (["--shape", PAPER, "--check-targets", "onnx", "--save", "x"], "has nothing to write"),
        (["--shape", PAPER, "--check-targets", " "], "--check-targets names no runtime; there are"),
        (["--shape", PAPER, "--check-targets", "onnx", "--dtype", "bf16"], "--dtype bf16 has no effect without --save"),
        (["--shape", PAPER, "--check-targets", "onnx", "--max-shard-gb", "1"], "--max-shard-gb 1.0 has no effect"),
        (["--load", "x", "--save", "y", "--max-shard-gb", "nan"], "--max-shard-gb nan must be above 0 and finite"),
        (["--load", "x", "--save", "y", "--max-shard-gb", "inf"], "--max-shard-gb inf must be above 0 and finite"),
        (["--load", "x", "--save", "y", "--max-shard-gb", "0"], "--max-shard-gb 0.0 must be above 0 and finite"),
    ):
        assert run(repo_root, "convert_to_hf", *arguments) == 2
        assert complaint in capsys.readouterr().err


def test_flags_are_not_abbreviated(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(repo_root, "convert_to_hf", "--loa", "x", "--save", "y")
    assert ended.value.code == 2
    assert "unrecognized arguments: --loa x" in capsys.readouterr().err
