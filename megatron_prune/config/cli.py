"""Command line: defaults, then the YAML file of ``--config``, then flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence

import tyro

from megatron_prune.config.schema import Config
from megatron_prune.config.values import nearest
from megatron_prune.config.yaml_file import dump_yaml, read_yaml, settings, with_values
from megatron_prune.errors import UserError

__all__ = ["dump_yaml", "load_config"]

_HELP_FLAGS = ("-h", "--help")
#: Settings of which a run has one: choosing one on the command line sets the others, perhaps from YAML, aside.
_ALTERNATIVES = (("target_params", "target_shape", "target_latency_ms", "target_kv_bytes"),)


@dataclasses.dataclass(frozen=True)
class _CommandLine:
    """Prune a language model while pretraining it. Flags override the YAML file; its keys are the flags' names with
    underscores."""

    settings: Config
    config: str | None = None
    """YAML file with settings."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print all settings as YAML, ready for --config, and exit."""


def load_config(argv: Sequence[str]) -> Config:
    """Settings of a run from its arguments (without the program's name).

    Prints and exits 0 on ``--help`` and ``--print-config``. The values are not checked against each other here:
    see :func:`~megatron_prune.config.validate.validate_config`.

    Raises:
        UserError: an unknown flag, a value of the wrong type, or a YAML file with a problem.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--config")
    scan.add_argument("--local_rank", "--local-rank")  # the deepspeed launcher adds it; the environment says the same
    try:
        scanned, flags = scan.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; write it like --config run.yaml") from error
    from_file = read_yaml(scanned.config) if scanned.config is not None else {}
    _check_flag_names(flags)
    for names in _ALTERNATIVES:
        if any(_is_given(flags, name) for name in names):
            from_file = {name: value for name, value in from_file.items() if name not in names}
    parsed = _parse_flags(flags, from_file)
    if parsed.print_config:
        print(dump_yaml(parsed.settings), end="")
        raise SystemExit(0)
    return parsed.settings


def _parse_flags(argv: Sequence[str], from_file: Mapping[str, object]) -> _CommandLine:
    default = _CommandLine(settings=with_values(Config(), from_file))
    markers = (tyro.conf.OmitArgPrefixes,)
    if any(flag in argv for flag in _HELP_FLAGS):
        return tyro.cli(_CommandLine, args=list(argv), default=default, config=markers)
    # tyro prints a framed paragraph and exits; a user of a cluster's log gets one line, as for any other mistake.
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(_CommandLine, args=list(argv), default=default, config=markers)
    except SystemExit as error:
        raise UserError(_one_line(printed.getvalue())) from error


def _one_line(framed: str) -> str:
    """tyro's framed message without frame, title, the flag's help and trailing advice."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", framed)
    _title, *lines = (line.strip(" |\u2502") for line in text.strip().splitlines())
    words = " ".join(word for line in lines for word in line.split() if word.strip("-\u2500\u256d\u256e\u2570\u256f"))
    words = words.split("Argument helptext:")[0].split("For full helptext")[0].strip()
    return words.rstrip(".") + "; --help explains every flag"


def _flag_names() -> set[str]:
    names = settings().keys() | {"config", "print_config", "help"}
    switches = {"no_" + name for name, item in settings().items() if item.annotation is bool}
    return {"--" + name.replace("_", "-") for name in names | switches}


def _check_flag_names(argv: Sequence[str]) -> None:
    known = _flag_names()
    for word in argv:
        flag = word.split("=", 1)[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            raise UserError(f"unknown flag {word.split('=', 1)[0]}{nearest(flag, known) or '; --help lists all'}")


def _is_given(argv: Sequence[str], name: str) -> bool:
    flag = "--" + name.replace("_", "-")
    return any(word.split("=", 1)[0].replace("_", "-") == flag for word in argv)
