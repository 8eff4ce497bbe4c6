"""What a checkpoint is, in numbers and in words, and whether it is still what was written; no tensor is loaded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_prune.architecture import Architecture
from megatron_prune.checkpoint.directory import CHECKPOINTS, newest_checkpoint, step_directories
from megatron_prune.checkpoint.files import DamagedCheckpoint, regular_file, short
from megatron_prune.checkpoint.manifest import COMPLETE_FILE, MANIFEST_FILE, Manifest
from megatron_prune.checkpoint.reader import Checkpoint, shard_damage
from megatron_prune.config import parse_count, parse_shape
from megatron_prune.config.schema import GqaMode
from megatron_prune.config.targets import shape_between
from megatron_prune.errors import UserError
from megatron_prune.parallel.fragments import Layout
from megatron_prune.pruning.ledger import Event

State = Literal["complete", "damaged", "unfinished"]
_MOST_RANKS = 1 << 24  # of any setting that is a size of the layout
_MOST_TOKENS = 1 << 40  # of a sample


@dataclasses.dataclass(frozen=True)
class Target:
    """Where pruning goes.

    Attributes:
        parameters: the budget; with a target shape its parameters, estimated if K/V heads are shared; None where
            something else ends the pruning.
        shape: ``(hidden_size, ffn_hidden_size, num_attention_heads)`` of ``--target-shape``, or None.
    """

    parameters: int | None
    shape: tuple[int, int, int] | None


@dataclasses.dataclass(frozen=True)
class Description:
    """One checkpoint.

    Attributes:
        path: its directory.
        manifest: what it says of itself.
        events: its ledger.
        target: where pruning goes, or None without pruning.
        layout: sizes it was written under.
        shards: bytes of every shard by file name, in rank order.
        other_bytes: of everything else in the directory.
    """

    path: Path
    manifest: Manifest
    events: Sequence[Event]
    target: Target | None
    layout: Layout
    shards: dict[str, int]
    other_bytes: int

    @property
    def source(self) -> Architecture:
        """The model before any pruning."""
        return self.manifest.partition.source

    @property
    def now(self) -> Architecture:
        """The live model."""
        return self.manifest.partition.architecture()

    @property
    def total_bytes(self) -> int:
        """Size of the directory's files."""
        return sum(self.shards.values()) + self.other_bytes

    @property
    def bytes_per_parameter(self) -> float:
        """Size of the directory over live parameters; 12 and a little with moments, 4 and a little without."""
        return self.total_bytes / self.now.num_parameters()

    @property
    def tokens(self) -> int:
        """Training tokens consumed."""
        return self.manifest.progress.consumed_samples * self.manifest.whole_setting(
            "data", "seq_length", 1, _MOST_TOKENS
        )

    @property
    def pruned_share(self) -> float | None:
        """Part of the way from the source's parameters to the target's, 0 to 1, or None without such a target."""
        if self.target is None or self.target.parameters is None:
            return None
        first, last, now = self.source.num_parameters(), self.target.parameters, self.now.num_parameters()
        return min(1.0, (first - now) / (first - last)) if first > last else 1.0

    @property
    def stage(self) -> str:
        """What the run was doing."""
        progress = self.manifest.progress
        if self.target is None:
            return "training without pruning"
        if progress.continue_from is not None:
            return f"continuing since step {progress.continue_from:,}"
        return "pruning" if progress.events else "before the first removal"


def find_step(path: Path) -> Path:
    """The checkpoint that a path means: a step's directory, or the newest complete one of a run.

    Raises:
        UserError: it is neither.
    """
    if (path / MANIFEST_FILE).exists() or (path / COMPLETE_FILE).exists():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(f"{path} is no checkpoint and has none; give a run directory or a {CHECKPOINTS}/step_* of one")
    return newest


def describe(path: Path) -> Description:
    """Read what a checkpoint says of itself.

    Args:
        path: its directory.

    Raises:
        UserError: manifest, ledger or the header of a shard is damaged, or a setting that is shown makes no sense.
    """
    checkpoint = Checkpoint(path, verify=False)
    manifest = checkpoint.manifest
    shards = {name: regular_file(path, name).stat().st_size for name in checkpoint.shard_names()}
    tensor = manifest.partition.tensor_parallel
    stages = manifest.whole_setting("parallel", "pipeline_model_parallel_size", 1, _MOST_RANKS)
    others = sum(file.lstat().st_size for file in path.iterdir() if file.is_file() and file.name not in shards)
    return Description(
        path=path,
        manifest=manifest,
        events=checkpoint.events,
        target=_target(manifest),
        layout=Layout(tensor, stages, max(1, len(shards) // (tensor * stages))),
        shards=shards,
        other_bytes=others,
    )


def damages(path: Path) -> Iterator[DamagedCheckpoint]:
    """Recompute every checksum of a checkpoint; yields what is not as it was written, file by file.

    If every file is, it is opened as for resuming: what the files say may contradict one another, or the directory.
    """
    try:
        manifest = Manifest.read(path)
    except DamagedCheckpoint as damage:
        yield damage
        return
    found = _file_damages(path, manifest)
    yield from found
    if found:
        return
    try:
        Checkpoint(path, verify=False)
    except DamagedCheckpoint as damage:
        yield damage


def run_steps(run_dir: Path, verify: bool) -> Iterator[tuple[str, State, str]]:
    """Everything in a run's directory of checkpoints, oldest step first: name, state, and what is wrong if anything.

    Args:
        run_dir: the run directory.
        verify: recompute all checksums; otherwise only what can be seen without reading the tensors.
    """
    for path in step_directories(run_dir):
        if not (path / COMPLETE_FILE).exists():
            yield path.name, "unfinished", f"no {COMPLETE_FILE}"
            continue
        try:
            if verify:
                for damage in damages(path):
                    raise damage
            else:
                Checkpoint(path, verify=False)
        except DamagedCheckpoint as damage:
            yield path.name, "damaged", f"{damage.file} {damage.why}"
        except UserError as error:
            yield path.name, "damaged", str(error)
        else:
            yield path.name, "complete", ""
    for path in sorted((run_dir / CHECKPOINTS).glob(".writing_*")):
        yield path.name, "unfinished", "being written, or left by a process that was killed"


def description_dict(description: Description, num_events: int) -> dict[str, Any]:
    """JSON-ready form, with the last ``num_events`` removals as ledger lines."""
    events = description.events
    manifest, target, layout = description.manifest, description.target, description.layout
    progress = manifest.progress
    return {
        "path": str(description.path),
        "step": progress.step,
        "skipped_steps": progress.skipped,
        "samples": progress.consumed_samples,
        "tokens": description.tokens,
        "stage": description.stage,
        "continue_from": progress.continue_from,
        "shape": _shape(description.now),
        "shape_source": _shape(description.source),
        "shape_target": None if target is None or target.shape is None else _named(target.shape),
        "parameters": description.now.num_parameters(),
        "parameters_source": description.source.num_parameters(),
        "parameters_target": None if target is None else target.parameters,
        "pruned_share": description.pruned_share,
        "removed": dict(Counter(event.type for event in events)),
        "last_events": [dataclasses.asdict(event) for event in events[max(0, len(events) - num_events) :]],
        "exported": list(progress.exported),
        "layout": dataclasses.asdict(layout),
        "shards": description.shards,
        "bytes": description.total_bytes,
        "bytes_per_parameter": description.bytes_per_parameter,
    }


def _file_damages(path: Path, manifest: Manifest) -> list[DamagedCheckpoint]:
    """What is wrong with the ledger and the shards, one by one."""
    found = []
    try:
        manifest.read_ledger(path)
    except DamagedCheckpoint as damage:
        found.append(damage)
    for name, digest in sorted(manifest.shards.items()):
        why = shard_damage(path, name, digest)
        if why is not None:
            found.append(DamagedCheckpoint(path, name, why))
    return found


def _target(manifest: Manifest) -> Target | None:
    source = manifest.partition.source
    shape, count = manifest.setting("prune", "target_shape"), manifest.setting("prune", "target_params")
    flags = manifest.settings["prune"]  # which may lack what its version did not know
    if shape is not None:
        widths = parse_shape(str(shape)).resolve(source)
        most = (source.hidden_size, source.ffn_hidden_size, source.num_attention_heads)
        if any(width > limit for width, limit in zip(widths, most, strict=True)):
            raise UserError(
                f"the checkpoint of step {manifest.progress.step}: its setting prune.target_shape is {short(shape)}, "
                "wider than its source; use another"
            )
        mode: GqaMode = "balanced" if flags.get("gqa_mode") == "balanced" else "cluster"
        return Target(shape_between(source, *widths, mode).num_parameters(), widths)
    if count is not None:
        return Target(parse_count(str(count)), None)
    others = ("target_latency_ms", "target_kv_bytes", "replay")
    ends = any(flags.get(name) is not None for name in others)
    return Target(None, None) if ends else None


def _shape(arch: Architecture) -> dict[str, int]:
    return _named((arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads))


def _named(widths: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("hidden_size", "ffn_hidden_size", "num_attention_heads"), widths, strict=True))
