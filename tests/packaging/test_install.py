"""The source distribution installs in an empty environment, with every compiler and with none, and says what it built.

pip fetches the build requirements, setuptools and pybind11; the environments have neither torch nor any dependency of
the package. Kernels are compiled once: the installs share one source directory.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Mapping
from pathlib import Path

import pytest

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
#: Seconds; compiling alone takes one minute of a quiet core.
LIMIT = 500
pytestmark = pytest.mark.timeout(LIMIT + 60)
COMPILER_TOOLS = ("g++", "c++", "clang++", "gcc", "cc", "as", "ld")


def run(command: list[str], environment: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=dict(environment),
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT,
    )


def environment(**changes: str) -> dict[str, str]:
    """Ours without what steers the build, so that a test decides alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_PRUNE_")}
    for name in ("CC", "CXX", "CUDA_HOME", "PYTHONPATH"):
        kept.pop(name, None)
    return {**kept, **changes}


@dataclasses.dataclass(frozen=True)
class Installed:
    """An environment that pip has installed into, or failed to."""

    root: Path
    code: int
    output: str

    @property
    def package(self) -> Path:
        return self.root / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages/megatron_prune"

    @property
    def modules(self) -> set[str]:
        return {path.name.removesuffix(SUFFIX) for path in self.package.glob(f"*{SUFFIX}")}

    @property
    def said(self) -> str:
        """The one line of the build about kernels."""
        (line,) = (line for line in self.output.splitlines() if "megatron-prune kernels:" in line)
        return line.strip()

    def python(self, *arguments: str, path: str = "") -> str:
        done = run([str(self.root / "bin/python"), *arguments], environment(PYTHONPATH=path), self.root)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def saliency_row(self) -> str:
        """What ``python -m megatron_prune.ops`` says of saliency; torch is borrowed from the tests' environment."""
        path = f"{self.package.parent}{os.pathsep}{sysconfig.get_path('purelib')}"
        table = self.python("-m", "megatron_prune.ops", path=path)
        (row,) = (line for line in table.splitlines() if line.startswith("saliency"))
        return " ".join(row.split())


def install(source: Path, root: Path, settings: Mapping[str, str], *, editable: bool = False) -> Installed:
    venv.EnvBuilder(with_pip=False, symlinks=True).create(root)
    command = [sys.executable, "-m", "pip", "--python", str(root / "bin/python"), "install", "--no-deps", "--verbose"]
    done = run([*command, *(["--editable"] if editable else []), str(source)], settings, root)
    return Installed(root, done.returncode, done.stdout)


@pytest.fixture(scope="module")
def source(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("sdist")
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
    ):
        shutil.copy2(repo_root / name, clone)
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "csrc_build.json", "build")
    for name in ("megatron_prune", "csrc"):
        shutil.copytree(repo_root / name, clone / name, ignore=built)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    done = run([sys.executable, "-c", build], environment(), clone)
    assert done.returncode == 0, done.stdout
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    (unpacked,) = (path for path in out.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def full(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Installed with everything this machine has; one GPU generation suffices here."""
    return install(source, tmp_path_factory.mktemp("full"), environment(MEGATRON_PRUNE_CUDA_ARCHS="90"))


@pytest.fixture
def no_tools(tmp_path: Path) -> Path:
    """A PATH that leads nowhere."""
    directory = tmp_path / "no_tools"
    directory.mkdir()
    return directory


def test_sdist_has_every_kernel_source(repo_root: Path, source: Path) -> None:
    sources = {path for path in (repo_root / "csrc").rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")}
    assert sources
    assert {path.relative_to(repo_root) for path in sources} <= {path.relative_to(source) for path in source.rglob("*")}
    assert not [path for path in source.rglob("*") if path.suffix in (".o", ".so", ".pyc")]


def test_with_compilers(full: Installed) -> None:
    assert full.code == 0, full.output
    has_nvcc = shutil.which("nvcc") is not None
    assert full.modules == ({"_C", "_C_cuda"} if has_nvcc else {"_C"})
    cuda = "_C_cuda built" if has_nvcc else "_C_cuda not built (no CUDA compiler: nvcc is not on PATH nor in CUDA_HOME)"
    assert full.said == f"megatron-prune kernels: _C built, {cuda}"
    for module in sorted(full.modules):  # without torch, and without a GPU
        assert full.python("-c", f"from megatron_prune import {module}; print({module}.info())").startswith("{")
    assert full.saliency_row().startswith("saliency csrc our kernels")


def test_without_nvcc_nothing_is_compiled_twice(source: Path, full: Installed, tmp_path: Path) -> None:
    assert full.code == 0, full.output
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in COMPILER_TOOLS:
        found = shutil.which(name)
        if found is not None:
            (tools / name).symlink_to(found)
    before = {path: path.stat().st_mtime_ns for path in (source / "build").rglob("*.o")}
    assert before
    without = install(source, tmp_path / "env", environment(PATH=str(tools)))
    assert without.code == 0, without.output
    assert without.modules == {"_C"}, "a CUDA module of the build before must not be taken along"
    missing = "no CUDA compiler: nvcc is not on PATH nor in CUDA_HOME"
    assert without.said == f"megatron-prune kernels: _C built, _C_cuda not built ({missing})"
    assert json.loads((without.package / "csrc_build.json").read_text(encoding="utf-8")) == {"_C_cuda": missing}
    assert before == {path: path.stat().st_mtime_ns for path in (source / "build").rglob("*.o")}


def test_editable_install_puts_modules_beside_the_package(
    source: Path, full: Installed, no_tools: Path, tmp_path: Path
) -> None:
    assert full.code == 0, full.output
    package = source / "megatron_prune"
    first = install(source, tmp_path / "env", environment(MEGATRON_PRUNE_CUDA_ARCHS="90"), editable=True)
    assert first.code == 0, first.output
    assert {path.name.removesuffix(SUFFIX) for path in package.glob("*.so")} == full.modules
    where = first.python("-c", "from megatron_prune import _C; print(_C.__file__)")
    assert Path(where.strip()) == package / f"_C{SUFFIX}"

    second = install(source, tmp_path / "env", environment(PATH=str(no_tools)), editable=True)
    assert second.code == 0, second.output
    assert not list(package.glob("*.so")), "modules of an older build must not outlive one that could not make them"
    assert json.loads((package / "csrc_build.json").read_text(encoding="utf-8"))["_C"].startswith("no C++ compiler")


def test_without_any_compiler(source: Path, no_tools: Path, tmp_path: Path) -> None:
    settings = environment(PATH=str(no_tools), CC="/bin/false", CXX="/bin/false")
    without = install(source, tmp_path / "env", settings)
    assert without.code == 0, without.output
    assert without.modules == set()
    assert without.said.startswith("megatron-prune kernels: _C not built (/bin/false failed with code 1")
    assert "saliency torch" in without.saliency_row()
    assert "megatron_prune._C is not built (/bin/false failed with code 1" in without.saliency_row()


def test_required_kernels_are_an_error(source: Path, no_tools: Path, tmp_path: Path) -> None:
    settings = environment(PATH=str(no_tools), MEGATRON_PRUNE_REQUIRE_EXT="1")
    refused = install(source, tmp_path / "env", settings)
    assert refused.code != 0
    assert not refused.package.exists()
    line = "MEGATRON_PRUNE_REQUIRE_EXT=1, but megatron_prune._C cannot be built: no C++ compiler: g++, c++ and clang++"
    assert line in refused.output
    assert "Traceback" not in refused.output


def test_a_wrong_arch_is_an_error(source: Path, no_tools: Path, tmp_path: Path) -> None:
    """A GPU build that was asked for in a way nobody can read is not left out in silence."""
    nvcc = no_tools / "nvcc"
    nvcc.symlink_to("/bin/false")
    settings = environment(PATH=str(no_tools), CXX="/bin/false", MEGATRON_PRUNE_CUDA_ARCHS="hopper")
    refused = install(source, tmp_path / "env", settings)
    assert refused.code != 0
    assert "MEGATRON_PRUNE_CUDA_ARCHS='hopper'" in refused.output
    assert "Traceback" not in refused.output
