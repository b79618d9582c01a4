"""One rank on one GPU for all tests of this folder; without a CUDA device they fail, they are not skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from btx_megatron.runtime import ranks


@pytest.fixture(scope="session", autouse=True)
def one_rank() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device")
    with ranks.joined_ranks():
        yield
