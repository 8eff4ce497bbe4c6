"""nvcc's build: no spills, imports without a GPU, refuses to launch in clear words; and the command lines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

# In a process of its own: the emulated module has the same name.
LAUNCH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.info()["archs"])
import ctypes
data = (ctypes.c_double * 64)()
pointer = (ctypes.addressof(data) + 15) // 16 * 16
item = (pointer, 0, pointer, 0, 0, 0, 0, 8, 4, pointer, pointer + 64)
for function, arguments in [
    ("score", (0, [item], 0, pointer + 128, module.workspace_bytes([item]))),
    ("wanda_sums", ([(pointer, 0, 0, 8, 4, pointer, pointer, pointer + 64)], 0, pointer + 128, 256)),
    ("column_square_sums", ([(pointer, 0, 2, 4, pointer)], 0, pointer + 128, 256)),
    ("square_add", ([(pointer, 0, pointer, 8)], 0)),
]:
    try:
        getattr(module, function)(*arguments)
        print(function, "ran")
    except RuntimeError as error:
        print(function, error)
"""


def say_what_is_built(repo_root: Path, directory: Path, path: str) -> str:
    """What setup.py prints of the kernels where PATH is ``path`` and there is no C++ compiler."""
    for name in ("setup.py", "README.md"):
        shutil.copy(repo_root / name, directory)
    for name in ("csrc", "megatron_prune"):
        shutil.copytree(repo_root / name, directory / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "MEGATRON_PRUNE_"))}
    finished = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
        cwd=directory,
        env=environment | {"PATH": path, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return next(line for line in finished.stderr.splitlines() if line.startswith("megatron-prune kernels:"))


def path_without_nvcc() -> str:
    directories = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(directory for directory in directories if shutil.which("nvcc", path=directory) is None)


def test_the_build_says_that_there_is_no_nvcc(repo_root: Path, tmp_path: Path) -> None:
    said = say_what_is_built(repo_root, tmp_path, path_without_nvcc())
    assert re.search(r"_C_cuda not built \(.*nvcc is not on PATH", said), said
    assert re.search(r"_C not built \(no-such-compiler", said), said


def test_nvcc_compiles_without_spills(nvcc_build: Path | None, repo_root: Path, tmp_path: Path) -> None:
    if nvcc_build is None:
        assert "nvcc is not on PATH" in say_what_is_built(repo_root, tmp_path, os.environ["PATH"])
        return
    log = (nvcc_build / "log.txt").read_text(encoding="utf-8")
    kernels = re.findall(r"Compiling entry function '\S+' for 'sm_(\d+)'", log)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert set(kernels) == {"80", "90"}
    assert kernels.count("80") == kernels.count("90") >= 27  # 23 of tile_sums, 3 of add_squares, combine
    assert len(spills) == len(kernels)
    assert set(spills) == {("0", "0", "0")}
    assert "warning" not in log.lower()


def test_cuda_module_imports_and_refuses_to_launch_without_a_gpu(
    nvcc_build: Path | None, build_commands: ModuleType, repo_root: Path, tmp_path: Path
) -> None:
    if nvcc_build is None:
        assert "nvcc is not on PATH" in say_what_is_built(repo_root, tmp_path, os.environ["PATH"])
        return
    module = build_commands.module_file(nvcc_build, "_C_cuda")
    finished = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(module)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # also where there is one
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    archs, *lines = finished.stdout.splitlines()
    assert archs == "80;90"
    assert [line.split()[0] for line in lines] == ["score", "wanda_sums", "column_square_sums", "square_add"]
    for line in lines:
        assert re.search(r"saliency kernel: .*(CUDA|device).* \(no usable GPU: check nvidia-smi", line), line


def test_cpu_module_builds_and_runs_without_openmp(build: Callable[..., Path], build_commands: ModuleType) -> None:
    """The commands differ by one flag; the sources must not need the OpenMP runtime under it."""
    with_openmp = build_commands.cpu_commands(Path("out"), [])
    without = build_commands.cpu_commands(Path("out"), [], openmp=False)
    changed = [(a, b) for one, two in zip(with_openmp, without, strict=True) for a, b in zip(one, two, strict=True)]
    assert {pair for pair in changed if pair[0] != pair[1]} == {("-fopenmp", "-fopenmp-simd")}

    def unoptimised(out_dir: Path, include_dirs: Sequence[str]) -> list[list[str]]:
        commands = build_commands.cpu_commands(out_dir, include_dirs, openmp=False, debug=True)
        return [["-O0" if word == "-O3" else word for word in command] for command in commands]

    module = build_commands.module_file(build(unoptimised), "_C")
    program = LAUNCH.split("import ctypes")[0].replace('module.info()["archs"]', "module.info()").replace("_cuda", "")
    program += (
        "import ctypes\n"
        "floats, rows, columns = (ctypes.c_float * 6)(*range(6)), (ctypes.c_double * 2)(), (ctypes.c_double * 3)()\n"
        "w, r, c = map(ctypes.addressof, (floats, rows, columns))\n"
        "module.score(0, [(w, 0, w, 0, 0, 0, 0, 6, 3, r, c)])\n"
        "print(list(rows), list(columns))\n"
    )
    command = [sys.executable, "-c", program, str(module)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "'openmp': False, 'threads': 1" in finished.stdout
    assert "[5.0, 50.0] [9.0, 17.0, 29.0]" in finished.stdout


@pytest.mark.parametrize(
    ("text", "archs"),
    [(None, [80, 90]), ("", [80, 90]), ("90", [90]), ("9.0;8.0", [80, 90]), ("100, 80 90", [80, 90, 100])],
)
def test_archs_are_read(
    build_commands: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str | None, archs: list[int]
) -> None:
    if text is None:
        monkeypatch.delenv("MEGATRON_PRUNE_CUDA_ARCHS", raising=False)
    else:
        monkeypatch.setenv("MEGATRON_PRUNE_CUDA_ARCHS", text)
    assert build_commands.cuda_archs() == archs


@pytest.mark.parametrize("text", ["hopper", "sm_90", "60", "80;x"])
def test_unknown_archs_are_refused(build_commands: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="MEGATRON_PRUNE_CUDA_ARCHS=.* is not a compute capability"):
        build_commands.cuda_archs(text)


def test_every_arch_and_the_newest_ptx_are_compiled_and_linked(build_commands: ModuleType) -> None:
    compile_kernel, _, link = build_commands.cuda_commands(Path("out"), [], archs=[90, 80])
    for command in (compile_kernel, link):
        assert [flag.split(",code=")[1] for flag in command if "gencode" in flag] == ["sm_80", "sm_90", "compute_90"]
    assert "-cudart=static" in link


def test_torch_is_not_needed_to_build(repo_root: Path) -> None:
    """Neither its headers nor its package."""
    for path in (repo_root / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)|^\s*(import|from) torch", text, re.MULTILINE), path
