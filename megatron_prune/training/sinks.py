"""Where metrics go besides the console and metrics.jsonl: Weights & Biases and TensorBoard.

A sink may fail as it likes (no network, no package, a full disk); :class:`~megatron_prune.training.report.Reporter`
drops it and the run goes on.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

RUN_ID_BYTES = 4


class Sink(Protocol):
    """A place that takes numbers by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""

    def close(self) -> None:
        """Flush and finish."""


class WandbSink:
    """Weights & Biases. ``WANDB_MODE`` (offline, disabled) is honoured; a resumed run continues its own curve.

    Args:
        save_dir: run directory; holds wandb's files and the id of the run.
        project: project name.
        config: settings to show next to the curves.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, save_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        id_file = save_dir / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(RUN_ID_BYTES))
        self._run = wandb.init(
            project=project, id=id_file.read_text(), resume="allow", name=save_dir.name, dir=save_dir, config=config
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and finish the run."""
        self._run.finish()


class TensorBoardSink:
    """TensorBoard event files under ``save_dir/tensorboard``.

    Args:
        save_dir: run directory.
        purge_step: steps from here on that an earlier, interrupted run wrote are hidden.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, save_dir: Path, purge_step: int) -> None:
        writer_type = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer_type(log_dir=str(save_dir / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()
