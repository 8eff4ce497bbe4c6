"""The kernels of csrc, built from the sources as they are and kept under build/ by a hash of them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch  # noqa: F401  (before the modules, so that they share its OpenMP runtime)

Commands = Callable[..., list[list[str]]]


def load(name: str, path: Path) -> ModuleType:
    """Import the module ``name`` from a file, compiled or not."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build_commands(repo_root: Path) -> ModuleType:
    """csrc/build_commands.py."""
    return load("build_commands", repo_root / "csrc" / "build_commands.py")


@pytest.fixture(scope="session")
def build(repo_root: Path, build_commands: ModuleType) -> Callable[..., Path]:
    """Run the commands that a function of build_commands gives; return their directory, with the output in log.txt."""
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    paths = sorted(path for path in (repo_root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    sources = b"".join(path.read_bytes() for path in [*paths, repo_root / "csrc" / "build_commands.py"])

    def run(commands: Commands, **options: object) -> Path:
        key = f"{commands.__name__} {options} {includes}".encode()
        final = repo_root / "build" / "csrc-tests" / hashlib.sha256(sources + key).hexdigest()[:16]
        if not final.exists():
            made = final.with_name(f"{final.name}.{os.getpid()}")
            made.mkdir(parents=True)
            _run_all(commands(made, includes, **options), made / "log.txt")
            if final.exists():  # another process was faster
                shutil.rmtree(made)
            else:
                made.rename(final)
        return final

    return run


def _run_all(commands: Sequence[Sequence[str]], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            finished = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
            file.write(finished.stdout + finished.stderr)
            assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="session")
def cpu_module(build: Callable[..., Path], build_commands: ModuleType) -> ModuleType:
    """``_C``."""
    return load("_C", build_commands.module_file(build(build_commands.cpu_commands, debug=True), "_C"))


@pytest.fixture(scope="session")
def emulated_module(build: Callable[..., Path], build_commands: ModuleType) -> ModuleType:
    """``_C_cuda`` whose kernels run on fibers."""
    return load("_C_cuda", build_commands.module_file(build(build_commands.emulated_commands), "_C_cuda"))


@pytest.fixture(scope="session")
def nvcc_build(build: Callable[..., Path], build_commands: ModuleType) -> Path | None:
    """Directory of ``_C_cuda`` as nvcc builds it for sm_80 and sm_90, None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    return build(build_commands.cuda_commands, archs=[80, 90], debug=True)
