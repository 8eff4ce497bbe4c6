"""quantize, export_onnx, convert_to_gguf and convert_to_hf --check-targets as a user calls them."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest

PAPER = "hidden=1195,ffn=3006,heads=19,head_dim=64,layers=24,vocab=49152,tied=1"


def run(repo_root: Path, tool: str, *arguments: str) -> int:
    code: int = runpy.run_path(str(repo_root / "tools" / f"{tool}.py"))["main"](arguments)
    return code


def test_quantize_compares_three_precisions(
    repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = tmp_path / "export"
    shutil.copytree(repo_root / "examples/demo/source", export)
    arguments = ["--tokens", "512", "--questions", "1", "--json", str(tmp_path / "table.json")]
    assert run(repo_root, "quantize", str(export), *arguments) == 0
    assert f"{export}-int8: W8A8, " in capsys.readouterr().out
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
    ):
        assert run(repo_root, "quantize", str(export), *arguments) == 2
        assert complaint in capsys.readouterr().err


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
        (["--shape", PAPER, "--check-targets", "trt"], "trt is unknown"),
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
