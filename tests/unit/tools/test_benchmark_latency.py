"""The tool that times models."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.config.values import parse_source_shape
from megatron_prune.deployment.contestants import PAPER_SHAPES, short_names
from megatron_prune.deployment.latency_table import Timing, first_of, latency_table, paper_lines, thread_counts
from megatron_prune.pruning.cost import LatencyTable
from megatron_prune.training.latency import write_table

SHAPE = "hidden=10,ffn=12,heads=2,head_dim=4,layers=1,vocab=32,tied=1"
QUICK = ("--context", "5", "--new-tokens", "1", "--rounds", "2", "--threads", "1", "9999")


def run(repo_root: Path, *arguments: str) -> int:
    tool = runpy.run_path(str(repo_root / "tools" / "benchmark_latency.py"))
    code: int = tool["main"](arguments)
    return code


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=2048,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    directory = tmp_path_factory.mktemp("run") / "export"
    MistralForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repo_root / "examples/demo/source" / name, directory)
    return directory


def test_models_and_shapes_side_by_side(
    repo_root: Path, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.py").write_text("def read(path):\n    return open(path).read()\n" * 1500)
    times = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    write_table(tmp_path, LatencyTable.of(((4, 12), (12,), (1, 3)), times, {"context": 9, "precision": "fp32"}))
    arguments = [str(export), "--shape", SHAPE, *QUICK, "--precision", "fp32", "bf16", "int8"]
    arguments += ["--predict", str(tmp_path), "--json", str(tmp_path / "times.json")]
    assert run(repo_root, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "left out: 9999 threads are more than this machine has cores"
    assert [line.split()[:3] for line in lines[3:9]] == [
        [name, precision, "1"] for name in ("run0/export", SHAPE) for precision in ("fp32", "bf16", "int8")
    ]
    assert all(line.count("1.00x") >= 2 for line in lines[3:6])
    assert lines[9] == f"2.500 ms a token expected of {export} after 9 tokens of context in fp32"
    saved = json.loads((tmp_path / "times.json").read_text())
    assert [len(timing["decode"]) for timing in saved] == [2] * 6
    assert min(min(timing["decode"] + timing["prefill"]) for timing in saved) > 0

    picture = ["--plot", str(tmp_path / "family.png"), "--text", str(tmp_path / "text.py")]
    assert run(repo_root, str(export), *QUICK, *picture) == 0
    assert "run0/export fp32: loss 7." in capsys.readouterr().out  # ln 2048 = 7.62: it knows nothing
    assert (tmp_path / "family.png").read_bytes()[1:4] == b"PNG"


def test_mistakes_are_named(repo_root: Path, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        ((str(export), "--predict", str(tmp_path)), "has no latency.json"),
        ((str(export), "--context", "0"), "--context 0 must be 1 or more"),
        ((), "nothing to time"),
        (("--shape", SHAPE, "--plot", "a.png"), "neither a --shape nor a GGUF"),
        ((str(export), "--plot", str(tmp_path / "a.xyz")), "is no kind of picture"),
        ((str(export), "--threads", "9999"), "are all more than this machine has cores"),
        ((str(tmp_path / "none"),), "none"),
    ):
        assert run(repo_root, *arguments) == 2
        assert complaint in capsys.readouterr().err


def test_ratios_are_against_the_first_model_of_the_same_kind() -> None:
    slow = Timing("a", "fp32", 100, 1, (4.0, 2.0, 3.0), (30.0, 30.0, 30.0))
    half = Timing("a", "bf16", 100, 1, (2.0, 2.0, 2.0), (10.0, 10.0, 10.0))
    fast = Timing("b", "bf16", 50, 1, (1.0, 1.0, 1.0), (20.0, 20.0, 20.0))
    file = Timing("c.gguf", "gguf f16", 50, 1, (0.5,), (5.0,))
    timings = [slow, half, fast, file]
    assert first_of(timings, fast) is half
    assert first_of(timings, file) is slow
    lines = latency_table(timings)
    assert lines[1].split()[4:7] == ["3.00", "2.00-4.00", "1.00x"]
    assert lines[3].split()[6] == "2.00x"
    assert lines[3].split()[-1] == "0.50x"


def test_the_papers_ratio_stands_beside_ours() -> None:
    timings = [
        Timing("EfficientLLM-457M", "bf16", 456_900_000, 1, (100.0,), (1.0,)),
        Timing("Qwen2.5-0.5B", "bf16", 494_000_000, 1, (110.0,), (1.0,)),
        Timing("Qwen2.5-0.5B", "bf16", 494_000_000, 2, (60.0,), (1.0,)),
    ]
    (line,) = paper_lines(timings)
    assert "1.10 here, 3.42 in the paper's Table 12 (parameters: 1.08)" in line


def test_named_shapes_have_the_published_sizes() -> None:
    sizes = {name: parse_source_shape(shape).num_parameters() for name, shape in PAPER_SHAPES.items()}
    assert sizes == {"EfficientLLM-457M": 456_930_955, "Qwen2.5-0.5B": 494_032_768}


def test_threads_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert thread_counts([1, 2, 4, 8]) == ([1, 2], [4, 8])


def test_models_whose_paths_end_alike_have_names_of_their_own() -> None:
    assert short_names(["runs/a/export", "runs/b/export"]) == ["a/export", "b/export"]
    assert short_names(["one/run/export", "two/run/export", "x/y"]) == ["one/run/export", "two/run/export", "x/y"]
    assert short_names(["one/export", "one/export"]) == ["one/export"] * 2


def test_compiled_ones_are_announced_and_timed(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(repo_root, "--shape", SHAPE, *QUICK, "--context", "1", "--compile") == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line.removeprefix(f"compiling {SHAPE} fp32: ") for line in lines if line.startswith("compiling")]
    assert said == ["1 token(s) on 1 thread(s)"]
    assert "prefill of 1 tokens, then a token at a time, compiled ahead of time; medians of 2 rounds" in lines
    assert lines[-1].startswith(SHAPE)
