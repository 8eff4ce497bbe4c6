"""Fixtures of the multi-process tests: one launcher, and the runs it has made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("layout_runs")  # before its first import, or its comparisons fail without saying how

from layout_runs import Cluster, Runs  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Runs scripts on several ranks."""
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Runs:
    """Runs of the tests' sources on any layout."""
    return Runs(tmp_path_factory.mktemp("runs"), cluster)
