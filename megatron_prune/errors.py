"""The exceptions a user can meet, and the exit code each one ends a run with."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_REQUEUE = 75  # sysexits' EX_TEMPFAIL: stopped with a complete checkpoint, start me again


class MegatronPruneError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(MegatronPruneError):
    """The input is wrong and the user can mend it. One line: what, why, what to do. Exit code 2."""


class ConfigError(UserError):
    """One or more settings are wrong; all of them are reported together.

    Args:
        problems: one line each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


class PeersMissingError(MegatronPruneError):
    """Some processes of the job did not come. Every process that did has the same to say. Exit code 1."""


class StopRequested(MegatronPruneError):
    """A signal, time limit or stop file ended the run after a complete checkpoint. Exit code 75."""
