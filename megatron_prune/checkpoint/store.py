"""Checkpoints: one directory per step with a manifest, the ledger and one shard per rank.

A shard holds, for every fragment its rank owns, the *live* elements it is the keeper of: of the fp32 master and of both
moments, under the logical name; dead padding is rebuilt from the manifest's placement. The parts are in ``shards`` (one
file), ``manifest``, ``directory`` (names and renames), ``writer`` and ``reader``; these are the names the rest uses.
"""

from __future__ import annotations

from megatron_prune.checkpoint.directory import (
    CHECKPOINTS,
    SOURCE_DIR,
    NewCheckpoint,
    complete_checkpoints,
    damaged_directories,
    newest_checkpoint,
    set_aside,
    step_directories,
)
from megatron_prune.checkpoint.files import DamagedCheckpoint
from megatron_prune.checkpoint.manifest import COMPLETE_FILE, LEDGER_FILE
from megatron_prune.checkpoint.reader import Checkpoint, Found, may_be_whole, open_newest, verify_together
from megatron_prune.checkpoint.writer import BackgroundSave, HostMemory, SaveError, save_checkpoint

__all__ = [
    "CHECKPOINTS",
    "COMPLETE_FILE",
    "LEDGER_FILE",
    "SOURCE_DIR",
    "BackgroundSave",
    "Checkpoint",
    "DamagedCheckpoint",
    "Found",
    "HostMemory",
    "NewCheckpoint",
    "SaveError",
    "complete_checkpoints",
    "damaged_directories",
    "may_be_whole",
    "newest_checkpoint",
    "open_newest",
    "save_checkpoint",
    "set_aside",
    "step_directories",
    "verify_together",
]
