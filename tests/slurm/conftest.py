"""A cluster for the tests of this folder; where Slurm is not installed they are skipped, and fail in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, installed


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not installed():
        missing = "Slurm is not installed (Debian: apt install slurm-wlm)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
