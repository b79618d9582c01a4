"""One rank on one GPU for all tests of this folder; without a CUDA device they fail, they are not skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from btx_megatron.runtime import ranks


@pytest.fixture(scope="session", autouse=True)
def one_rank() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device")
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # resumes are compared bit by bit
    with ranks.joined_ranks():
        yield
