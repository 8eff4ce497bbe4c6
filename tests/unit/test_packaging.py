"""The pinned versions satisfy the ranges, so that `make setup` and a plain install agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: The other lists of strings in setup.py name packages to include and the files in them.
NOT_REQUIREMENTS = ("megatron_prune", "megatron_prune.*", "py.typed", "*.css", "*.js")


def _pins(repo_root: Path) -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def _ranges(repo_root: Path) -> list[Requirement]:
    """Every requirement written in setup.py: the string items of all its lists."""
    tree = ast.parse((repo_root / "setup.py").read_text(encoding="utf-8"))
    lists = [node for node in ast.walk(tree) if isinstance(node, ast.List)]
    items = [item.value for node in lists for item in node.elts if isinstance(item, ast.Constant)]
    return [Requirement(item) for item in items if isinstance(item, str) and item not in NOT_REQUIREMENTS]


def test_every_requirement_is_pinned_within_its_range(repo_root: Path) -> None:
    pins, ranges = _pins(repo_root), _ranges(repo_root)
    assert {"torch", "deepspeed", "matplotlib"} <= {requirement.name for requirement in ranges}
    for requirement in ranges:
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} against the pinned {version}"


def test_build_requirements_are_those_of_the_tests_and_not_torch(repo_root: Path) -> None:
    """The tests compile with the pinned versions; a build that needed torch would fetch gigabytes to be isolated."""
    text = (repo_root / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r"^requires = \[(.*?)\]", text, re.MULTILINE)
    assert match is not None
    requirements = [Requirement(item) for item in re.findall(r'"([^"]+)"', match.group(1))]
    assert {requirement.name for requirement in requirements} == {"setuptools", "pybind11"}
    assert {str(requirement) for requirement in requirements} <= {str(one) for one in _ranges(repo_root)}


def test_torch_is_pinned_without_a_build(repo_root: Path) -> None:
    """A local version such as 2.13.0+cpu would keep GPU machines from their build."""
    assert "+" not in _pins(repo_root)["torch"]
