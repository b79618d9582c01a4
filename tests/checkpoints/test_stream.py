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
from btx_megatron.checkpoints.stream import BUFFERS, BUFFERS_WHOLE, Effort, PlannedTensor, stream
from btx_megatron.errors import UserError

NAME = "decoder.layers.mlp.linear_fc2.weight"
VALUES = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(1))


def planned(values: Tensor, whole: bool = False) -> PlannedTensor:
    info = TensorInfo(tuple(values.shape), values.dtype)
    return PlannedTensor(NAME, info, "test", ("x",), lambda i: lambda a, b: values[i[0]][a:b], whole)


@given(st.integers(1, 64), st.integers(1, 1 << 34))
def test_buffers_stay_below_the_bound(workers: int, bound: int) -> None:
    threads, block = Effort(workers, bound).fit([planned(VALUES)])
    assert threads == workers
    assert threads * BUFFERS * block <= bound or block == 1
    assert block <= engine.BLOCK_BYTES


def test_rules_that_need_whole_parts_take_threads_or_are_refused() -> None:
    need = 40 * 50 * 4 * BUFFERS_WHOLE
    plan = [planned(VALUES, whole=True)]
    assert Effort(8, 3 * need).fit(plan)[0] == 3
    assert Effort(2, 3 * need).fit(plan)[0] == 2
    with pytest.raises(UserError, match=rf"is made whole, which takes about {need} bytes"):
        Effort(8, need - 1).fit(plan)


@pytest.mark.parametrize("effort", [Effort(1), Effort(7), Effort(2, 5_000)])
def test_threads_and_blocks_change_nothing(tmp_path: Path, effort: Effort) -> None:
    plan = [planned(VALUES)]
    tables = []
    for name, one in (("a", Effort(1, 1 << 30)), ("b", effort)):
        layout = DistLayout(tmp_path / name, {NAME: plan[0].info})
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
