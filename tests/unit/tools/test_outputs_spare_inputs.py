"""No tool writes over the model or the run that it reads."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("tool", "flag", "name"),
    [
        ("export_onnx", "--output", "model.safetensors"),
        ("convert_to_gguf", "--output", "model.safetensors"),
        ("quantize", "--json", "tokenizer.json"),
        ("evaluate", "--output", "config.json"),
        ("benchmark_latency", "--json", "config.json"),
        ("benchmark_latency", "--plot", "model.safetensors"),
        ("plot_run", "--html", "metrics.jsonl"),
    ],
)
def test_what_is_read_is_not_written(
    repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str, flag: str, name: str
) -> None:
    (tmp_path / name).write_text("as it was")
    (tmp_path / "link").symlink_to(tmp_path / name)
    main = runpy.run_path(str(repo_root / "tools" / f"{tool}.py"))["main"]
    more = ["--llama-cpp", str(tmp_path)] if tool == "convert_to_gguf" else []
    for output in (tmp_path / name, tmp_path / "link"):
        assert main([str(tmp_path), flag, str(output), *more]) == 2
        assert f"{flag} {output} is what this command reads; give another file" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "as it was"
