"""Command lines that build the kernels; ``setup.py`` and the tests run them. Nothing here starts a process."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).resolve().parent
ARCHS_VARIABLE = "MEGATRON_PRUNE_CUDA_ARCHS"
DEFAULT_ARCHS = "80;90"

Command = list[str]


def module_file(out_dir: Path, name: str) -> Path:
    """Path of the module ``name`` (``_C``, ``_C_cuda``) in ``out_dir`` with this interpreter's suffix."""
    return out_dir / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def cuda_archs(text: str | None = None) -> list[int]:
    """Compute capabilities to compile for, ascending: ``"80;90"`` or ``"8.0 9.0"`` to ``[80, 90]``.

    Args:
        text: list separated by semicolons, commas or blanks; None reads ``MEGATRON_PRUNE_CUDA_ARCHS``, default 80;90.

    Raises:
        ValueError: an entry is no capability of 70 or more (the kernels need ``__grid_constant__``).
    """
    text = os.environ.get(ARCHS_VARIABLE, "") if text is None else text
    archs = set()
    for entry in re.split(r"[;,\s]+", text.strip() or DEFAULT_ARCHS):
        digits = entry.replace(".", "")
        if not digits.isdecimal() or int(digits) < 70:
            raise ValueError(f"{ARCHS_VARIABLE}={text!r}: {entry!r} is not a compute capability such as 80 or 9.0")
        archs.add(int(digits))
    return sorted(archs)


def gencode_flags(archs: Sequence[int]) -> list[str]:
    """Machine code for every arch, and PTX of the newest so that later GPUs can run it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{max(archs)},code=compute_{max(archs)}"]


def cpu_commands(
    out_dir: Path, include_dirs: Sequence[Path | str], *, cxx: str = "g++", openmp: bool = True, debug: bool = False
) -> list[Command]:
    """Commands that build ``_C`` in ``out_dir``, to run in order.

    Args:
        out_dir: existing directory for the module and its objects.
        include_dirs: directories of the Python and pybind11 headers.
        cxx: C++17 compiler.
        openmp: False builds a single-threaded module, for compilers without OpenMP.
        debug: compile the bindings without optimisation (tests: twice as fast to build, kernels unaffected).
    """
    threads = "-fopenmp" if openmp else "-fopenmp-simd"
    kernel, binding = out_dir / "saliency_cpu.o", out_dir / "bind_cpu.o"
    return [
        [
            # No trapping: lets the selects in the fp16 conversion be vectorised, and changes no result.
            *[cxx, *_cxx_flags("-O3"), "-fno-trapping-math", threads],
            *["-c", str(CSRC / "saliency_cpu.cpp"), "-o", str(kernel)],
        ],
        [
            *[cxx, *_cxx_flags("-O0" if debug else "-O2"), threads, *_includes(include_dirs)],
            *["-c", str(CSRC / "bind_cpu.cpp"), "-o", str(binding)],
        ],
        [cxx, "-shared", threads, str(kernel), str(binding), "-o", str(module_file(out_dir, "_C"))],
    ]


def cuda_commands(
    out_dir: Path,
    include_dirs: Sequence[Path | str],
    *,
    nvcc: str = "nvcc",
    cxx: str = "g++",
    archs: Sequence[int] | None = None,
    debug: bool = False,
) -> list[Command]:
    """Commands that build ``_C_cuda`` in ``out_dir``, to run in order. ptxas reports registers and spills on stderr.

    nvcc links, too: it knows where its static runtime lies, whereas the ``nvcc`` on PATH may be a wrapper script
    whose place says nothing. The runtime is static so that the module imports on a machine without CUDA.

    Args:
        out_dir: existing directory for the module and its objects.
        include_dirs: directories of the Python and pybind11 headers.
        nvcc: CUDA compiler.
        cxx: C++17 compiler for the bindings.
        archs: compute capabilities, None for :func:`cuda_archs`.
        debug: compile the bindings without optimisation.
    """
    archs = cuda_archs() if archs is None else sorted(archs)
    gencode = gencode_flags(archs)
    kernel, binding = out_dir / "saliency_cuda.o", out_dir / "bind_cuda.o"
    return [
        [
            *[nvcc, "-O3", "-std=c++17", "--threads=2", *gencode, "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"],
            *["-c", str(CSRC / "saliency_cuda.cu"), "-o", str(kernel)],
        ],
        [
            *[cxx, *_cxx_flags("-O0" if debug else "-O2"), *_includes(include_dirs)],
            f'-DMEGATRON_PRUNE_ARCHS="{";".join(map(str, archs))}"',
            *["-c", str(CSRC / "bind_cuda.cpp"), "-o", str(binding)],
        ],
        [
            *[nvcc, "-shared", "-cudart=static", *gencode, str(kernel), str(binding)],
            *["-o", str(module_file(out_dir, "_C_cuda"))],
        ],
    ]


def emulated_commands(
    out_dir: Path, include_dirs: Sequence[Path | str], *, cxx: str = "g++", max_fragments: int = 3
) -> list[Command]:
    """Commands that build ``_C_cuda`` by the host compiler for the emulation in ``testing/`` (tests only).

    Args:
        out_dir: existing directory for the module and its objects.
        include_dirs: directories of the Python and pybind11 headers.
        cxx: C++17 compiler.
        max_fragments: fragments per launch; small, so that short lists already need several launches.
    """
    kernel, binding = out_dir / "emulated.o", out_dir / "bind_cuda.o"
    return [
        [
            *[cxx, *_cxx_flags("-O1"), "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", f"-I{CSRC / 'testing/include'}"],
            *[f"-DMEGATRON_PRUNE_MAX_FRAGMENTS={max_fragments}", "-x", "c++"],
            *["-c", str(CSRC / "saliency_cuda.cu"), "-o", str(kernel)],
        ],
        [
            *[cxx, *_cxx_flags("-O0"), *_includes(include_dirs), '-DMEGATRON_PRUNE_ARCHS="emulated"'],
            *["-c", str(CSRC / "bind_cuda.cpp"), "-o", str(binding)],
        ],
        [cxx, "-shared", str(kernel), str(binding), "-o", str(module_file(out_dir, "_C_cuda"))],
    ]


def _cxx_flags(optimisation: str) -> list[str]:
    return [optimisation, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def _includes(directories: Sequence[Path | str]) -> list[str]:
    return [f"-I{directory}" for directory in directories]
