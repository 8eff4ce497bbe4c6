"""What a checkpoint says of itself: the JSON beside the shards, and the marker that it is all there.

The manifest has the checksums of shards and ledger, ``COMPLETE`` has the manifest's and its own: no bit of any file can
change unnoticed. Resuming needs no more than this and the tensors. The learning rate is a function of the step, the
data order one of the seed and the samples consumed, and nothing in training draws from a generator that outlives the
draw (no dropout; random weights and scores are functions of the seed), so no generator is saved; fp32 and bf16 need no
loss scale.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune import __version__
from megatron_prune.checkpoint.bounds import checked_record, read_architecture, read_partition
from megatron_prune.checkpoint.files import (
    DamagedCheckpoint,
    json_object,
    read_file,
    sha256_of,
    short,
    whole_number,
)
from megatron_prune.errors import UserError
from megatron_prune.parallel.partition import Partition
from megatron_prune.pruning.ledger import Event, parse_ledger

FORMAT = 4
MANIFEST_FILE = "manifest.json"
COMPLETE_FILE = "COMPLETE"
LEDGER_FILE = "ledger.jsonl"
#: A model of 126 layers and 53,248 FFN channels takes 50 MB.
_MOST_MANIFEST_BYTES = 1 << 28
_MARKER_BYTES = 2 * (64 + len("  \n")) + len(MANIFEST_FILE) + len(COMPLETE_FILE)
_LINE_BYTES, _INDEX_BYTES = 1 << 12, 1 << 5  # of a ledger's line: more than any, and than a layer's index in it
_MOST_LEDGER_BYTES = 1 << 30  # whatever the model
_DIGEST = re.compile(r"[0-9a-f]{64}")
#: The only names a manifest may give to shards: plain ones, so that no path leads out of the directory.
_SHARD = re.compile(r"rank_[0-9]{5,9}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is. All counters start at 0.

    Attributes:
        step: optimizer steps tried.
        adam_steps: steps applied; the optimizer's bias correction counts these.
        consumed_samples: samples of the global order used up.
        units_spent: pruned units.
        events: removals, the ledger's length.
        continue_from: step at which the budget was met and the second stage began, or None.
        exported: names of the budgets already exported.
        pace_from: step at which the present pruning pace took over from another, 0 if it is the first.
        pace_spent: units spent by then.
        skips_in_a_row: how many of the last steps were skipped one after another.
        deferred_at: step whose decision was put off last, or None.
        recent_losses: of the last steps, where a jump of the loss is watched for.
        rollbacks: how often the run has gone back to a checkpoint.
        saliency: the mean that ``--saliency-ema`` decides by, as ``pruning.smoothing`` writes it, or the masks of
            ``--sheared-iters``, as ``training.sheared`` does; empty without either.
    """

    step: int = 0
    adam_steps: int = 0
    consumed_samples: int = 0
    units_spent: int = 0
    events: int = 0
    continue_from: int | None = None
    exported: tuple[str, ...] = ()
    pace_from: int = 0
    pace_spent: int = 0
    skips_in_a_row: int = 0
    deferred_at: int | None = None
    recent_losses: tuple[float, ...] = ()
    rollbacks: int = 0
    saliency: str = ""

    @property
    def skipped(self) -> int:
        """Steps that a non-finite gradient made a no-op."""
        return self.step - self.adam_steps


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    Attributes:
        partition: placement of every unit, with the source architecture.
        progress: counters.
        settings: the run's settings by topic and flag name.
        data_fingerprint: hash of what decides the data order.
        shards: file name to sha256, one file per rank.
        ledger: sha256 of the ledger file.
    """

    partition: Partition
    progress: Progress
    settings: Mapping[str, Any]
    data_fingerprint: str
    shards: Mapping[str, str]
    ledger: str = ""

    def to_json(self) -> str:
        """The file's text."""
        content = {
            "format": FORMAT,
            "version": __version__,
            "source": self.partition.source.to_dict(),
            "architecture": self.partition.architecture().to_dict(),
            "partition": self.partition.to_dict(),
            "progress": dataclasses.asdict(self.progress),
            "settings": dict(self.settings),
            "data_fingerprint": self.data_fingerprint,
            "shards": dict(self.shards),
            "ledger": self.ledger,
        }
        return json.dumps(content)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a checkpoint directory.

        Raises:
            DamagedCheckpoint: it or ``COMPLETE`` is missing, is not what was written, or makes no sense.
            UserError: it is of another format version.
        """
        marker = read_file(directory, COMPLETE_FILE, _MARKER_BYTES)
        text = read_file(directory, MANIFEST_FILE, _MOST_MANIFEST_BYTES)
        digest = _marked_digest(marker)
        if digest is None:
            _refuse_other_formats(directory, text)
            raise DamagedCheckpoint(directory, COMPLETE_FILE, "is damaged (it does not match itself)")
        if sha256_of(text) != digest:
            raise DamagedCheckpoint(
                directory, MANIFEST_FILE, f"is damaged (its checksum is not that in {COMPLETE_FILE})"
            )
        _refuse_other_formats(directory, text)
        try:
            return cls._parse(json_object(text))
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpoint(directory, MANIFEST_FILE, f"is no manifest of ours ({error})") from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> Manifest:
        """A manifest from its JSON.

        Raises:
            ValueError: a field is missing, of another type or out of range.
        """
        missing = {"format", "source", *(field.name for field in dataclasses.fields(cls))} - content.keys()
        if missing:
            raise ValueError(f"it has no {min(missing)}")
        if type(content["format"]) is not int or content["format"] != FORMAT:
            raise ValueError(f"its format is {short(content['format'])}")
        settings, progress, fingerprint = (content[name] for name in ("settings", "progress", "data_fingerprint"))
        topics = {"settings": settings, **(settings if isinstance(settings, dict) else {})}
        for topic, flags in topics.items():
            if not isinstance(flags, dict):
                raise ValueError(f"its {short(topic)} is {short(flags)}, not an object of settings")
        if not isinstance(fingerprint, str):
            raise ValueError(f"data_fingerprint is {short(fingerprint)}, not a text")
        return cls(
            partition=read_partition(read_architecture(content["source"]), content["partition"]),
            progress=checked_record(Progress, progress, "progress"),
            settings=settings,
            data_fingerprint=fingerprint,
            shards=_checked_shards(content["shards"]),
            ledger=_checked_digest(content["ledger"], "ledger"),
        )

    def read_ledger(self, directory: Path) -> list[Event]:
        """Read the ledger beside this manifest.

        Raises:
            DamagedCheckpoint: it is not what was written, makes no sense, or is not as long as the manifest says.
        """
        source = self.partition.source
        removals = source.hidden_size + source.ffn_hidden_size + source.num_attention_heads
        most = min(_MOST_LEDGER_BYTES, removals * (_LINE_BYTES + _INDEX_BYTES * source.num_layers))
        content = read_file(directory, LEDGER_FILE, most)
        if sha256_of(content) != self.ledger:
            raise DamagedCheckpoint(directory, LEDGER_FILE, "is damaged (its checksum is not the manifest's)")
        try:
            events = parse_ledger(content)
        except ValueError as error:
            raise DamagedCheckpoint(directory, LEDGER_FILE, f"is no ledger ({error})") from error
        if len(events) != self.progress.events:
            why = f"counts {self.progress.events} removals, {LEDGER_FILE} has {len(events)}"
            raise DamagedCheckpoint(directory, MANIFEST_FILE, why)
        return events

    def setting(self, topic: str, name: str) -> Any:
        """One of the run's settings.

        Raises:
            UserError: the manifest does not have it.
        """
        flags = self.settings.get(topic)
        if not isinstance(flags, dict) or name not in flags:
            raise UserError(
                f"the checkpoint of step {self.progress.step} does not record the setting {topic}.{name}; use another"
            )
        return flags[name]

    def whole_setting(self, topic: str, name: str, least: int, most: int) -> int:
        """One of the run's settings that is a whole number.

        Raises:
            UserError: the manifest does not have it, or something else in its place.
        """
        try:
            return whole_number(self.setting(topic, name), f"its setting {topic}.{name}", least, most)
        except ValueError as error:
            raise UserError(f"the checkpoint of step {self.progress.step}: {error}; use another") from error


def complete_text(manifest_text: str) -> str:
    """Text of ``COMPLETE``: the manifest's checksum, and the checksum of that line."""
    line = f"{sha256_of(manifest_text.encode())}  {MANIFEST_FILE}\n"
    return line + f"{sha256_of(line.encode())}  {COMPLETE_FILE}\n"


def shard_name(rank: int) -> str:
    """File name of a rank's shard."""
    return f"rank_{rank:05d}.safetensors"


def _marked_digest(marker: bytes) -> str | None:
    """The manifest's checksum that ``COMPLETE`` holds, or None if the marker is not as it was written."""
    digest = marker[:64].decode("ascii", errors="replace")
    line = f"{digest}  {MANIFEST_FILE}\n"
    whole = line + f"{sha256_of(line.encode())}  {COMPLETE_FILE}\n"
    return digest if _DIGEST.fullmatch(digest) and marker == whole.encode() else None


def _refuse_other_formats(directory: Path, text: bytes) -> None:
    try:
        version = json_object(text).get("format")
    except ValueError:
        return  # what is no JSON at all is reported as that
    if type(version) is int and version != FORMAT:
        raise UserError(
            f"{directory / MANIFEST_FILE} has format {version}, this version reads {FORMAT}; export the run with the "
            "version that wrote it and start from the export"
        )


def _checked_shards(shards: object) -> dict[str, str]:
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"shards is {short(shards)}, not an object of files")
    for name in shards:
        if not _SHARD.fullmatch(name):
            raise ValueError(f"{short(name)} is no name of a shard")
    return {name: _checked_digest(digest, name) for name, digest in shards.items()}


def _checked_digest(value: object, what: str) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"the checksum of {what} is {short(value)}")
    return value
