"""What a checkpoint says of itself: the JSON beside the shards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune import __version__
from megatron_prune.architecture import Architecture
from megatron_prune.errors import UserError
from megatron_prune.parallel.partition import Partition

FORMAT = 2
MANIFEST_FILE = "manifest.json"


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
        settings: the run's settings by flag name.
        data_fingerprint: hash of what decides the data order.
        shards: file name to sha256, one file per rank.
    """

    partition: Partition
    progress: Progress
    settings: Mapping[str, Any]
    data_fingerprint: str
    shards: Mapping[str, str]

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
        }
        return json.dumps(content)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a checkpoint directory.

        Raises:
            UserError: it is missing, no manifest of ours, or of another format version.
        """
        path = directory / MANIFEST_FILE
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise UserError(f"{path} has format {content['format']}, this version reads {FORMAT}")
            source = Architecture.from_dict(content["source"])
            progress = dict(content["progress"], exported=tuple(content["progress"]["exported"]))
            return cls(
                partition=Partition.from_dict(source, content["partition"]),
                progress=Progress(**progress),
                settings=content["settings"],
                data_fingerprint=content["data_fingerprint"],
                shards=content["shards"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no readable manifest ({error!r}); delete it to resume earlier") from error
