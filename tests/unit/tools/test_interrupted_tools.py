"""Ctrl-C while a tool imports what it needs ends it with 130 and no traceback."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest


class _Interrupt:
    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.name:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("tool", "module"),
    [
        ("inspect_checkpoint", "megatron_prune.checkpoint.inspect"),
        ("plot_run", "megatron_prune.plotting"),
    ],
)
def test_an_import(tool: str, module: str, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Interrupt(module), *sys.meta_path])
    main = runpy.run_path(str(repo_root / "tools" / f"{tool}.py"))["main"]
    assert main([str(tmp_path)]) == 130
