"""The engine: what it takes of the machine, and that neither threads nor blocks change a byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from btx_megatron.checkpoints import stream as engine
from btx_megatron.checkpoints.megatron_dist import DistCheckpoint, DistLayout
from btx_megatron.checkpoints.pieces import TensorInfo
from btx_megatron.checkpoints.stream import (
    OWN_COPIES,
    Effort,
    PlannedTensor,
    job_bytes,
    peak_bytes,
    stream,
)
from btx_megatron.errors import UserError

NAME = "decoder.layers.mlp.linear_fc2.weight"
VALUES = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(1))


def planned(values: Tensor, whole: bool = False) -> PlannedTensor:
    info = TensorInfo(tuple(values.shape), values.dtype)
    return PlannedTensor(NAME, info, "test", ("x",), lambda i: lambda a, b: values[i[0]][a:b], whole)


@given(st.integers(1, 64), st.integers(1 << 27, 1 << 34))
def test_memory_stays_below_the_bound(workers: int, bound: int) -> None:
    large = PlannedTensor(
        NAME, TensorInfo((90, 40_000, 500), torch.bfloat16), "test", (), lambda i: rows_of_none
    )
    threads, block = Effort(workers, bound).fit([large])
    assert peak_bytes([large], threads, block) <= bound
    assert engine.SMALLEST_BLOCK <= block <= engine.BLOCK_BYTES
    assert 1 <= threads <= workers
    assert threads == workers or block == engine.SMALLEST_BLOCK  # smaller blocks come first
    more = Effort(workers, 2 * bound).fit([large])
    assert more[0] >= threads


def rows_of_none(start: int, stop: int) -> Tensor:
    raise AssertionError


def test_without_a_bound_blocks_are_of_the_usual_size() -> None:
    assert Effort(3).fit([planned(VALUES)]) == (3, engine.BLOCK_BYTES)


def test_rules_that_need_whole_parts_take_threads_or_are_refused() -> None:
    plan = [planned(VALUES, whole=True)]
    one, two = (peak_bytes(plan, threads, 1) for threads in (1, 2))
    assert two - one == job_bytes(plan[0], 1) == 40 * 50 * (4 * OWN_COPIES + 8)
    assert Effort(8, two).fit(plan)[0] == 2
    assert Effort(8, two - 1).fit(plan)[0] == 1
    with pytest.raises(
        UserError, match=rf"{one - 1}: this takes {one} bytes at least, most of it for {NAME} "
    ):
        Effort(8, one - 1).fit(plan)


@pytest.mark.parametrize("effort", [Effort(1), Effort(7), Effort(2)])
@pytest.mark.parametrize("block", [1, 1_000, 1 << 20])
def test_threads_and_blocks_change_nothing(
    tmp_path: Path, effort: Effort, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [planned(VALUES)]
    tables = []
    for name, one in (("a", Effort(1, 1 << 30)), ("b", effort)):
        layout = DistLayout(tmp_path / name, {NAME: plan[0].info})
        monkeypatch.setattr(engine, "BLOCK_BYTES", block if name == "b" else 1 << 20)
        tables.append(stream(plan, layout, one))
        layout.finish({})
    assert tables[0] == tables[1]
    assert torch.equal(DistCheckpoint(tmp_path / "b").read(NAME), VALUES)
    file = "__0_0.distcp"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_first_error_ends_it(tmp_path: Path) -> None:
    values = VALUES.clone()
    values[1, 3, 4] = float("inf")
    layout = DistLayout(tmp_path / "a", {NAME: planned(values).info})
    with pytest.raises(UserError, match=r"linear_fc2.weight \[1\]: NaN or infinite values"):
        stream([planned(values)], layout, Effort(3))
