"""The package's layers are one-way, and its sources keep the bars that a reader can count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "megatron_prune"
LAYER = {
    "__init__": 0,
    "errors": 0,
    "tool": 0,
    "architecture": 0,
    "config": 0,
    "parallel": 1,
    "ops": 1,
    "model": 2,
    "data": 2,
    "pruning": 3,
    "checkpoint": 4,
    "training": 5,
    "evaluation": 5,
    "activations": 6,
    "baselines": 6,
    "growth": 6,
    "memory": 6,
    "layouts": 6,
    "stops": 6,
    "deployment": 6,
    "plan": 6,
    "tuning": 6,
    "lora": 6,
    "generation": 6,
    "pretrain": 6,
    "plotting": 6,
    "report_page": 6,
    "study": 7,
}
MAX_LINES = 600
#: Parts that must stay usable, and readable, without the engine.
NO_DEEPSPEED = ("architecture", "config", "parallel", "ops", "model", "data", "pruning")


def _imports(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of everything imported anywhere in a module that lives in ``package``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]) if base else ".".join(parent)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _part(dotted: str) -> str:
    """``megatron_prune.ops.norm`` is in part ``ops``; the bare package is ``__init__``."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def _upward_imports(source: str, module: str, package: str) -> list[str]:
    own = LAYER[_part(module)]
    found = []
    for name in sorted(_imports(ast.parse(source), package)):
        if name.split(".")[0] == PACKAGE:
            part = _part(name) if _part(name) in LAYER else "__init__"  # a name of the package itself: __version__
            if LAYER[part] > own:
                found.append(f"{module} (layer {own}) imports {name} (layer {LAYER[part]})")
    return found


def _modules(root: Path) -> list[tuple[Path, str, str]]:
    """Every source file with its dotted module name and the package it lives in."""
    modules = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        package = ".".join(parts[:-1])
        module = package if parts[-1] == "__init__" else ".".join(parts)
        modules.append((path, module, package))
    return modules


def test_every_part_has_a_layer(repo_root: Path) -> None:
    parts = {_part(module) for _, module, _ in _modules(repo_root)}
    assert parts <= set(LAYER), f"give these a layer: {sorted(parts - set(LAYER))}"


def test_imports_go_down_only(repo_root: Path) -> None:
    upward = [
        line
        for path, module, package in _modules(repo_root)
        for line in _upward_imports(path.read_text(encoding="utf-8"), module, package)
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize(
    "source",
    [
        "from megatron_prune.training import engine",
        "import megatron_prune.training.engine",
        "from megatron_prune import training",
        "from ..training.engine import Engine",
        "from .. import training",
        "def late():\n    from megatron_prune.training import engine",
    ],
)
def test_an_upward_import_is_seen(source: str) -> None:
    assert _upward_imports(source, "megatron_prune.ops.norm", "megatron_prune.ops")


@pytest.mark.parametrize("source", ["from megatron_prune.errors import UserError", "from . import loss", "import re"])
def test_a_downward_import_is_fine(source: str) -> None:
    assert not _upward_imports(source, "megatron_prune.ops.norm", "megatron_prune.ops")


def test_deepspeed_stays_in_the_engine(repo_root: Path) -> None:
    for path, module, package in _modules(repo_root):
        if _part(module) in NO_DEEPSPEED:
            roots = {name.split(".")[0] for name in _imports(ast.parse(path.read_text(encoding="utf-8")), package)}
            # The pipeline's split of the model is made of DeepSpeed's layer specs; the maths beside it is not.
            assert "deepspeed" not in roots or module == f"{PACKAGE}.model.pipeline", f"{module} imports deepspeed"


def test_no_global_statements_and_no_huge_files(repo_root: Path) -> None:
    for path, module, _ in _modules(repo_root):
        source = path.read_text(encoding="utf-8")
        assert not any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(source))), f"{module}: global"
        assert len(source.splitlines()) <= MAX_LINES, f"{module} is longer than {MAX_LINES} lines"
