"""A cluster for the tests of this folder; they are skipped where Slurm is not installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, installed


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not installed():
        pytest.skip("Slurm is not installed (Debian: apt install slurm-wlm)")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
