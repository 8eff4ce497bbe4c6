"""The study's YAML file: sources, seeds, rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from megatron_prune.config.values import nearest
from megatron_prune.errors import UserError

#: Shapes beside the source's own that a row may start from or prune to.
SHAPES = ("hidden_only", "uniform", "searched")
#: The row whose result is the searched shape.
UNIFIED = "unified"

Start = Literal["source", "hidden_only", "uniform", "searched"]
Goal = Literal["none", "budget", "hidden_only", "uniform", "searched"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is done to a source.

    Attributes:
        name: of the row.
        start: the source's weights, or a shape to start from with random ones.
        goal: what to prune to.
        settings: flags of the trainer, over the study's.
        alone: stop once pruned, before any training.
        continued: train on after pruning; without, only the pruned model is measured.
        trace: keep the removals in the results, for pictures.
    """

    name: str
    start: Start = "source"
    goal: Goal = "none"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alone: bool = False
    continued: bool = True
    trace: bool = False

    @property
    def needs_search(self) -> bool:
        """True when the row has to wait for the searched shape."""
        return "searched" in (self.start, self.goal)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to prune, trained by the study or given.

    Attributes:
        name: of the source.
        budget: parameters to prune to, as ``--target-params``.
        rows: the rows to run with it.
        shape: hidden_size, ffn_hidden_size, num_attention_heads and num_layers of one that the study trains.
        settings: flags of that training, over the study's.
        path: Hugging Face directory of one that is given.
        tokens: that a given one was trained on.
    """

    name: str
    budget: str
    rows: tuple[str, ...]
    shape: Mapping[str, int] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    path: str | None = None
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How models are measured: held-out samples for the loss, questions of each cloze task, and their seed."""

    samples: int = 128
    questions: int = 100
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class Study:
    """All of the file.

    Attributes:
        tokenizer: of the text.
        split: as ``--split``; the second part is held out.
        seeds: each row runs once with each.
        evaluation: how models are measured.
        settings: flags of every run.
        pruning: flags of every run with a goal.
        sources: by name.
        rows: by name.
        input: files and patterns to read the text from; the standard library where there are none.
    """

    tokenizer: str
    split: str
    seeds: tuple[int, ...]
    evaluation: Evaluation
    settings: Mapping[str, Any]
    pruning: Mapping[str, Any]
    sources: Mapping[str, Source]
    rows: Mapping[str, Row]
    input: tuple[str, ...] = ()


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        UserError: it cannot be read, or says something that makes no study.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"study {path} cannot be read ({' '.join(str(error).split())})") from error
    top = _mapping(content, f"study {path}", {field.name for field in dataclasses.fields(Study)})
    missing = {"tokenizer", "split", "seeds", "sources", "rows"} - top.keys()
    if missing:
        raise UserError(f"study {path} lacks {', '.join(sorted(missing))}; see examples/study/study.yaml")
    rows = {name: _row(name, value) for name, value in _mapping(top["rows"], "rows").items()}
    sources = {name: _source(name, value, rows) for name, value in _mapping(top["sources"], "sources").items()}
    seeds = top["seeds"]
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise UserError(f"study {path}: seeds {seeds!r} must be a list of whole numbers, [1, 2, 3] say")
    evaluation = _mapping(top.get("evaluation", {}), "evaluation", {f.name for f in dataclasses.fields(Evaluation)})
    return Study(
        tokenizer=str(top["tokenizer"]),
        split=str(top["split"]),
        seeds=tuple(seeds),
        evaluation=Evaluation(**evaluation),
        settings=_mapping(top.get("settings", {}), "settings"),
        pruning=_mapping(top.get("pruning", {}), "pruning"),
        sources=sources,
        rows=rows,
        input=tuple(map(str, top.get("input", ()))),
    )


def _row(name: str, value: object) -> Row:
    fields = _mapping(value, f"row {name}", {"start", "goal", "settings", "alone", "continued", "trace"})
    row = Row(name, **fields)
    words = (("start", row.start, ("source", *SHAPES)), ("goal", row.goal, ("none", "budget", *SHAPES)))
    for what, word, known in words:
        if word not in known:
            raise UserError(f"row {name}: {what} {word!r} is none of {', '.join(known)}")
    if row.name == UNIFIED and row.needs_search:
        raise UserError(f"row {UNIFIED} finds the searched shape and cannot start from it or prune to it")
    return row


def _source(name: str, value: object, rows: Mapping[str, Row]) -> Source:
    fields = _mapping(value, f"source {name}", {field.name for field in dataclasses.fields(Source)} - {"name"})
    if ("path" in fields) == ("shape" in fields) or "budget" not in fields:
        raise UserError(f"source {name} needs a budget, and either a shape to train or the path of a model")
    chosen = fields.get("rows", "all")
    if chosen == "all":
        chosen = list(rows)
    for row in cast("list[str]", chosen):
        if row not in rows:
            raise UserError(f"source {name} has unknown row {row!r}{nearest(str(row), rows)}")
    if any(rows[row].needs_search for row in chosen) and UNIFIED not in chosen:
        raise UserError(f"source {name} needs row {UNIFIED}: others of its rows ask for the shape that it finds")
    return Source(**{**fields, "name": name, "budget": str(fields["budget"]), "rows": tuple(chosen)})


def _mapping(value: object, what: str, known: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} must be names with values, not {value!r}; see examples/study/study.yaml")
    for key in value:
        if known is not None and key not in known:
            raise UserError(f"{what} has unknown key {key!r}{nearest(str(key), known)}")
    return {str(key): item for key, item in value.items()}
