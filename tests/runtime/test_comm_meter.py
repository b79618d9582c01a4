"""The meter by itself: hooked in while it is on, gone afterwards, loud about calls that it cannot count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from btx_megatron.errors import UserError
from btx_megatron.runtime import comm_meter
from btx_megatron.runtime.comm_meter import CommMeter, ranks_of_a_node


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hooked() -> list[str]:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("c10d::")]
    return [name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "BackendSelect")]


@pytest.mark.usefixtures("alone")
def test_nothing_is_registered_before_and_after() -> None:
    assert hooked() == []
    for _ in range(2):
        with CommMeter():
            assert len(hooked()) == len(comm_meter._OPERATORS)
        assert hooked() == []
    with pytest.raises(RuntimeError, match="of the model"), CommMeter() as meter, meter.step():
        raise RuntimeError("of the model")
    assert hooked() == []
    assert meter.steps == 0


@pytest.mark.usefixtures("alone")
def test_a_group_of_one_sends_nothing() -> None:
    with CommMeter() as meter, meter.step():
        dist.all_reduce(tensor := torch.ones(3))
    assert tensor.tolist() == [1, 1, 1]
    assert (meter.steps, meter.traffic.lines) == (1, {})
    assert meter.over_ranks().total().calls == 0


@pytest.mark.usefixtures("alone")
def test_ranks_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks_of_a_node() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert CommMeter().ranks_per_node == 8
    assert CommMeter(4).ranks_per_node == 4


@pytest.mark.usefixtures("alone")
def test_a_collective_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(comm_meter._OPERATORS, "reduce_")
    with pytest.raises(UserError, match=r"training\.log_communication: torch .* \(reduce_\); set it"):
        CommMeter().__enter__()
    assert hooked() == []
