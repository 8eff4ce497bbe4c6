"""YAML in and out: flat keys named like the flags, types taken from the schema rather than guessed from the text.

PyYAML follows YAML 1.1, which reads ``1:9`` as the base-60 number 69 and ``1e-4`` as a word. So the file is only
parsed to its nodes, with the safe loader and without building any object, and the schema says what each text means.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml

from megatron_prune.config.schema import Config, split_commas
from megatron_prune.config.values import nearest
from megatron_prune.errors import ConfigError, UserError

_NULL_TAG = "tag:yaml.org,2002:null"
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the schema.

    Attributes:
        part: field of :class:`Config` it belongs to.
        name: its own name, which is the YAML key.
        annotation: its type, ``Annotated`` kept.
    """

    part: str
    name: str
    annotation: Any


def settings() -> dict[str, Setting]:
    """Every setting by name, in the schema's order."""
    table = {}
    for part, part_type in typing.get_type_hints(Config).items():
        hints = typing.get_type_hints(part_type, include_extras=True)
        for field in dataclasses.fields(part_type):
            assert field.name not in table, f"two settings are called {field.name}"
            table[field.name] = Setting(part, field.name, hints[field.name])
    return table


def read_yaml(path: str) -> dict[str, Any]:
    """Settings of a YAML file, typed as the schema says.

    Raises:
        ConfigError: unknown or repeated keys and values of the wrong type, all together.
        UserError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path} holds no 'key: value' lines: write one setting a line, such as lr: 5e-4")
    known, values, problems = settings(), dict[str, Any](), []
    for key_node, value_node in root.value:
        key, place = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if key not in known:
            problems.append(f"{place}: unknown key {key!r}{nearest(key, known) or '; --help lists all'}")
        elif key in values:
            problems.append(f"{place}: {key} is set twice, keep one")
        else:
            try:
                values[key] = _convert(value_node, known[key].annotation)
            except ValueError as error:
                problems.append(f"{place}: {key} is {_shown(value_node)}, expected {error}")
    if problems:
        raise ConfigError(problems)
    return values


def dump_yaml(config: Config) -> str:
    """All settings as YAML, defaults included; reading it back gives an equal :class:`Config`."""
    flat = {name: getattr(getattr(config, item.part), name) for name, item in settings().items()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
    # ASCII: with allow_unicode PyYAML writes some line separators raw and reads them back as blanks.
    return yaml.safe_dump(plain, sort_keys=False, width=math.inf, default_flow_style=None)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with some settings, by name, replaced."""
    known = settings()
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        changes.setdefault(known[name].part, {})[name] = value
    parts = {part: dataclasses.replace(getattr(config, part), **fields) for part, fields in changes.items()}
    return dataclasses.replace(config, **parts)


def _convert(node: yaml.Node, annotation: Any) -> Any:
    """Value of a node under a type. Raises ValueError with the words for what was expected."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        inner = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
        return None if node.tag == _NULL_TAG else _convert(node, inner)
    if origin is Annotated:
        return _convert_items(node, split_commas, "a list, or words separated by commas")
    if origin is tuple:
        return _convert_items(node, shlex.split, "a list, or words separated by blanks")
    expected = _expected(annotation)
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL_TAG:
        raise ValueError(expected)
    text = node.value
    if origin is Literal and text in typing.get_args(annotation):
        return text
    if annotation is str:
        return text
    if annotation is bool and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(expected) from None
    raise ValueError(expected)


def _convert_items(node: yaml.Node, split: Any, expected: str) -> tuple[str, ...]:
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return tuple(item.value for item in node.value)
    if isinstance(node, yaml.ScalarNode) and node.tag != _NULL_TAG:
        try:
            return tuple(split(node.value))
        except ValueError:  # an unclosed quote
            raise ValueError(expected) from None
    raise ValueError(expected)


def _expected(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(annotation, "text")


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a nested mapping"
