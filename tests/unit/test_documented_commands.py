"""Every command of the README and of docs/ is one that works: its flags are parsed, its files exist, its plans made.

What a block of commands asks for is looked up in the real thing: a tool's own parser, the run's own settings, the
launchers' parsers, the Makefile's targets. Planner commands on files of the repository are run. Nothing is trained:
tests/e2e and tests/unit/tools run the tools on small models.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from megatron_prune.config import Config, load_config, validate_config, yaml_file
from megatron_prune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
)
ENTRY = "pretrain_prune.py"
#: Commands that are no part of this project, and why nothing of them is checked.
FOREIGN = {
    "hf": "downloads from a hub; there is no network in tests",
    "pip": "installs packages; tests/packaging does it",
    "kill": "a signal, of the shell",
    "touch": "of the shell",
    "source": "of the shell: .venv/bin/activate is made by make setup",
    "export": "of the shell: a variable for the next line",
    "scontrol": "Slurm's, which machines with tests do not have",
    "sbatch": "Slurm's; tests/unit/examples reads the scripts that it is given",
    "git": "no part of the project",
    "lm_eval": "lm-evaluation-harness's own command; tests/unit/evaluation runs it",
}
#: Flags of foreign programs that the text of a page names, by program.
FOREIGN_FLAGS = {
    "--no_ssh": "deepspeed",
    "--node_rank": "deepspeed, torchrun",
    "--hostfile": "deepspeed",
    "--master_port": "deepspeed, torchrun",
    "--gpus-per-task": "srun",
    "--ntasks-per-node": "srun",
}
#: Settings of users that a page only names: any file of settings will do.
USERS_CONFIGS = ("run.yaml", "new.yaml")
#: Directories of the repository: a path that begins with one of them has to be there.
OWN_DIRECTORIES = ("examples", "tools", "docs", "tests", "benchmarks", "csrc", "megatron_prune", "pretrain_prune.py")


Main = Callable[[Sequence[str]], int]
FindMain = Callable[[str], Main]


class Command(NamedTuple):
    """One command of a page, without variables before it and comments behind."""

    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


class Parsed(Exception):
    """A tool has read its command line; what would follow is work."""


def _blocks(page: Path) -> Iterator[str]:
    """Fenced blocks that are not in another language than the shell's."""
    fenced = re.findall(r"^```([a-z]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return (text for language, text in fenced if language in ("", "sh", "bash", "console"))


def _programs() -> set[str]:
    return {"python", "make", "deepspeed", "torchrun", "srun", ".ci/run", *FOREIGN}


def _lines(block: str) -> list[list[str]]:
    """Words of each command of a block; nothing of a block that shows output or a tree."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(re.sub(r"\$\([^)]*\)", "SUBSTITUTED", line), comments=True)
        except ValueError:  # an apostrophe in a sentence
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words and words[0].removeprefix(".venv/bin/") in _programs():
            found.append([words[0].removeprefix(".venv/bin/"), *(word for word in words[1:] if word != "...")])
    return found


def commands() -> list[Command]:
    """Every command of every page."""
    return [
        Command(str(page.relative_to(ROOT)), tuple(words))
        for page in PAGES
        for block in _blocks(page)
        for words in _lines(block)
    ]


@pytest.fixture(scope="module")
def tool_main() -> FindMain:
    """``main`` of a script of the repository by its path; the module is made once."""
    modules: dict[str, ModuleType] = {}

    def find(path: str) -> Main:
        if path not in modules:
            name = "documented_" + path.replace("/", "_").removesuffix(".py")
            spec = importlib.util.spec_from_file_location(name, ROOT / path)
            assert spec is not None
            assert spec.loader is not None
            modules[path] = importlib.util.module_from_spec(spec)
            sys.modules[name] = modules[path]
            spec.loader.exec_module(modules[path])
        main: Main = modules[path].main
        return main

    return find


@contextlib.contextmanager
def _parsing_only() -> Iterator[None]:
    """A parser that has read a command line goes no further."""
    read = argparse.ArgumentParser.parse_known_args

    def stop(
        self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> Any:
        _, unknown = read(self, args, namespace)
        if unknown:  # a tool that passes flags on passes them to a run
            settings = {f"--{name.replace('_', '-')}" for name in yaml_file.settings()}
            if not settings.issuperset(word for word in unknown if word.startswith("--")):
                self.error(f"unrecognized arguments: {' '.join(unknown)}")
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        yield


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Tools that are started as python tools/X.py find their neighbours there.
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _settings(words: Sequence[str]) -> Config:
    """Settings of a run, from flags in which a user's file may be named."""
    replaced = ["examples/smollm_1.7b_to_457m.yaml" if word in USERS_CONFIGS else word for word in words]
    return load_config(replaced)


def _check_run(words: Sequence[str], world_size: int) -> None:
    config = _settings(words)
    processes = max(world_size, config.parallel.model_parallel_size)
    validate_config(config, processes)


def _check_launched(command: Command, tool_main: FindMain) -> None:
    """deepspeed, torchrun or srun with a script of ours: the launcher's flags by its parser, ours by ours."""
    place = next(index for index, word in enumerate(command.words) if word.endswith(".py"))
    script = command.words[place]
    launcher, rest = command.words[0], command.words[1 : place + 1]
    if launcher == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        options = parse_args(rest)
        assert options.user_script == script
        if options.hostfile.startswith("examples/"):
            assert (ROOT / options.hostfile).is_file()
    elif launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        assert get_args_parser().parse_args(rest).training_script == script
    else:
        assert launcher == "srun"
        assert rest[-2] == "python"
        assert set(word for word in rest if word.startswith("--")) <= set(FOREIGN_FLAGS)
    if script == ENTRY:
        _check_run(command.words[place + 1 :], world_size=8)
    else:
        _check_script(script, command.words[place + 1 :], tool_main)


def _check_script(path: str, words: Sequence[str], tool_main: FindMain) -> None:
    assert (ROOT / path).is_file(), f"there is no {path}"
    main = tool_main(path)
    if path == "tools/plan.py":
        _check_plan(main, words)
        return
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), _parsing_only():
        try:
            main(list(words))
        except Parsed:
            return
        except SystemExit as end:
            pytest.fail(f"{path} {shlex.join(words)}: exit {end.code}, {printed.getvalue().splitlines()[-1:]}")
    pytest.fail(f"{path} read no command line")


def _check_plan(main: Main, words: Sequence[str]) -> None:
    """Planned in full if the model is described in the repository; a model of the user's is only named."""
    foreign = "--source" in words
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(list(words))
    if foreign:
        assert "models/SmolLM" in errors.getvalue(), errors.getvalue()
        assert "unknown" not in errors.getvalue(), errors.getvalue()
    else:
        assert code == 0, errors.getvalue()
        assert output.getvalue()


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_there_are_commands_on_every_page_that_needs_them() -> None:
    found = commands()
    assert len(found) >= 40
    pages = {command.page for command in found}
    silent = {f"docs/{name}.md" for name in ("index", "how_it_works", "extending", "shape_search", "performance")}
    assert {str(page.relative_to(ROOT)) for page in PAGES if page.parent.name == "docs"} - pages <= silent


@pytest.mark.parametrize("command", commands(), ids=lambda command: f"{command.page}: {command.text[:70]}")
def test_a_command_is_understood(command: Command, tool_main: FindMain) -> None:
    program, *rest = command.words
    if program in FOREIGN:
        return
    if program == ".ci/run":
        assert (ROOT / program).is_file()
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= _targets()
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None
    elif program == "python" and rest[0] != ENTRY:
        _check_script(rest[0], rest[1:], tool_main)
    elif program == "python":
        _check_run(rest[1:], world_size=1)
    else:
        _check_launched(command, tool_main)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page: Path) -> None:
    """Links, and paths of the repository in code or commands."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    words = [word for span in spans for word in span.split()]
    words += [word for command in commands() if command.page == str(page.relative_to(ROOT)) for word in command.words]
    for word in words:
        path = word.strip("'\"(),;:").split(":")[0]
        if "/" in path and path.split("/")[0] in OWN_DIRECTORIES and not re.search(r"[*…{}]|[A-Z]{3,}", path):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def _all_flags() -> set[str]:
    """Flags of the entry point and of every tool and benchmark, from their sources and the schema."""
    from megatron_prune.config.yaml_file import settings

    flags = {f"--{name.replace('_', '-')}" for name in settings()} | {"--config", "--print-config", "--help"}
    for path in [*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        flags |= set(re.findall(r"""["'](--[a-z][a-z0-9-]+)["']""", path.read_text(encoding="utf-8")))
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_flags_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = " ".join(re.findall(r"`([^`]+)`", text))
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]+)", spans))
    assert named - _all_flags() - set(FOREIGN_FLAGS) == set()


def test_targets_of_make_in_the_text_exist() -> None:
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8")))
        assert named <= _targets(), f"{page.name}: {named - _targets()}"


@pytest.mark.parametrize(
    "words",
    [
        ("python", "tools/plot_run.py", "runs/457m", "--htm"),
        ("python", "tools/plot_run.py"),
        ("python", "tools/no_such.py", "runs/457m"),
        ("python", "tools/inspect_checkpoint.py", "runs/457m", "--verfy"),
        ("python", "tools/plan.py", "--config", "examples/llama2_7b.yaml", "--gpu", "3"),
        ("python", ENTRY, "--config", "examples/no_such.yaml"),
        ("python", ENTRY, "--config", "run.yaml", "--target-prams", "3M"),
        ("deepspeed", "--hostfle", "hostfile", ENTRY, "--config", "run.yaml"),
        ("torchrun", "tools/finetune.py", "runs/457m", "--data", "a.json", "--save", "b", "--learning-rate", "1"),
        ("torchrun", "--nnode", "four", ENTRY, "--config", "run.yaml"),
        ("make", "dmeo"),
        ("python", "-m", "megatron_prune.opps"),
    ],
    ids=lambda words: shlex.join(words),
)
def test_a_mistake_is_seen(words: tuple[str, ...], tool_main: FindMain) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, UserError, SystemExit)):
        test_a_command_is_understood(Command("here", words), tool_main)


def test_commands_are_told_from_output() -> None:
    block = "python tools/plan.py --json   # a comment\nA=1 deepspeed --x \\\n    y ...\n  config.yaml   settings\n"
    assert _lines(block) == [["python", "tools/plan.py", "--json"], ["deepspeed", "--x", "y"]]
    assert _lines("runs/457m/checkpoints/step_00001000/\n  manifest.json  don't\n") == []
