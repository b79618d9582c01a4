"""How much routes tell of a domain, against the definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def specialization() -> Any:
    from btx_megatron.runtime import cpu_backend

    cpu_backend.install()
    from btx_megatron.evaluation import specialization

    return specialization


LOADS = st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any), min_size=2, max_size=3)


@given(LOADS)
def test_mutual_information_is_the_definition(specialization: Any, loads: list[list[int]]) -> None:
    p = [[n / sum(row) / len(loads) for n in row] for row in loads]  # joint, domains alike
    of_expert = [sum(row[e] for row in p) for e in range(4)]
    expected = sum(
        p[d][e] * math.log(p[d][e] / (of_expert[e] / len(loads)))
        for d in range(len(loads))
        for e in range(4)
        if p[d][e] > 0
    )
    (found,) = specialization.mutual_information(torch.tensor(loads, dtype=torch.float64)[:, None])
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_ends_of_the_scale(specialization: Any) -> None:
    load = torch.tensor([[[7.0, 0], [1, 1]], [[0, 90.0], [50, 50]]])
    assert specialization.mutual_information(load) == pytest.approx([math.log(2), 0])


def test_likelihoods_are_shares_with_one_more_of_each(specialization: Any) -> None:
    found = specialization.log_likelihoods(torch.tensor([[[3.0, 0]]]))
    assert found.exp().flatten().tolist() == pytest.approx([0.8, 0.2])
