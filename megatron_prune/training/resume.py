"""Going on from a checkpoint, at the start of a run or in the middle: which one it is, and with which counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_prune.checkpoint.manifest import Manifest, Progress
from megatron_prune.checkpoint.store import (
    DamagedCheckpoint,
    Found,
    may_be_whole,
    open_newest,
    set_aside,
    verify_together,
)
from megatron_prune.config.schema import TARGET_MARK, Config
from megatron_prune.parallel.collectives import agreed
from megatron_prune.parallel.mesh import Mesh


def newest_whole(found: Found | None, mesh: Mesh) -> Found | None:
    """Go back from the newest checkpoint to one whose checksums are right; a collective of all ranks.

    Args:
        found: what :func:`open_newest` found on this rank.
        mesh: groups.

    Raises:
        MegatronPruneError: the ranks opened different ones. Nothing has been changed.
        UserError: no checkpoint is whole; the same on every rank.
    """
    while True:
        agreed("no checkpoint" if found is None else str(found.checkpoint.path), mesh)
        if found is None:
            return None
        try:
            verify_together(found.checkpoint, mesh)
        except DamagedCheckpoint as error:
            found = open_newest(found.checkpoint.path.parent.parent, (*found.damaged, error))
        else:
            return found


def put_aside(damaged: Sequence[DamagedCheckpoint], mesh: Mesh) -> None:
    """Rename damaged checkpoints of the run directory, so that their steps can be saved again.

    Call it once all ranks have agreed on another. A file that could not be read says nothing of what it holds: such a
    checkpoint keeps its name.
    """
    if mesh.is_main:
        for damage in damaged:
            if not may_be_whole(damage):
                set_aside(damage.directory)


def resumed(config: Config, saved: Manifest, met: bool) -> Progress:
    """Where a run goes on. A changed pace or a lowered target starts counting units now, not from the beginning.

    Args:
        config: settings from now on.
        saved: of the checkpoint.
        met: whether its model is at or under the target of now.
    """
    progress, before = saved.progress, saved.setting
    start = before("prune", "prune_start_iter")
    pace = (before("prune", "prune_ratio"), before("optim", "lr_warmup_iters") if start is None else start)
    reopened = progress.continue_from is not None and not met
    if reopened:
        exported = tuple(name for name in progress.exported if name != TARGET_MARK)  # there is another one now
        progress = dataclasses.replace(progress, continue_from=None, exported=exported)
    measured = ("prune_metric", "prune_hessian", "saliency_ema")
    masked = config.baseline.sheared_iters is not None
    other = any(saved.settings["prune"].get(name) != getattr(config.prune, name) for name in measured)
    if other or masked != (before("baseline", "sheared_iters") is not None):
        progress = dataclasses.replace(progress, saliency="")  # of something else
    if reopened or pace != (config.prune.prune_ratio, config.prune_start_iter):
        progress = dataclasses.replace(progress, pace_from=progress.step, pace_spent=progress.units_spent)
    return progress
