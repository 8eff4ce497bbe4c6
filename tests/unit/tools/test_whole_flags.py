"""A flag is written out: half of one may be another tomorrow, and a misspelt one should not pass for something else."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from megatron_prune import pretrain
from megatron_prune.ops import __main__ as ops

_TOOLS = {
    "plan.py": (["--source-shape", "hidden=8,ffn=8,heads=2,layers=2,vocab=9", "--gpu", "8"], "unknown flag --gpu;"),
    "preprocess_data.py": (["--std", "--tokenizer", "no", "--output-prefix", "no"], "--input --stdlib is required"),
    "study.py": (["--conf", "nowhere.yaml"], "unrecognized arguments: --conf"),
    "demo.py": (["--hel"], "unrecognized arguments: --hel"),
    "make_demo_source.py": (["--sav", "no", "--no-such-flag"], "unrecognized arguments: --sav no"),
    "reshard_checkpoint.py": (["no", "elsewhere", "--prune-al", "8"], "unrecognized arguments: --prune-al"),
}


@pytest.mark.parametrize("tool", _TOOLS)
def test_half_a_flag_is_refused(repo_root: Path, capsys: pytest.CaptureFixture[str], tool: str) -> None:
    argv, words = _TOOLS[tool]
    main = runpy.run_path(str(repo_root / "tools" / tool))["main"]
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert words in capsys.readouterr().err


def test_so_it_is_by_the_run_and_the_table_of_operations(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--conf", "run.yaml"]) == 2
    assert "unknown flag --conf" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        ops.main(["--forc", "rms_norm=torch"])
