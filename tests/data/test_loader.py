"""NVIDIA DALI's loader gives what the reference gives: the same samples, in order, resumed anywhere."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from corpora import small_recipe

from btx_megatron.data import loader as loader_module
from btx_megatron.data.blend import TrainingSamples, batches
from btx_megatron.data.loader import check_installed, loader
from btx_megatron.errors import UserError

CPU = torch.device("cpu")
SAMPLES = 40
with_dali = pytest.mark.skipif(
    not (importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")),
    reason="NVIDIA DALI is not installed (the extra dali)",
)

BLENDS = [{"loops": 1.0}, {"formats": 1.0, "loops": 3.0}, {"formats": 1.0}]
LAYOUTS = [  # micro-batch, global batch, data-parallel ranks
    (1, 4, 1),
    (2, 8, 2),
    (4, 8, 2),
    (3, 12, 1),
]


@pytest.fixture(scope="module", params=BLENDS, ids=lambda blend: "+".join(blend))
def samples(
    request: pytest.FixtureRequest,
    data_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    megatron_datasets: ModuleType,
) -> TrainingSamples:
    cache = tmp_path_factory.mktemp("cache")
    domains = small_recipe().data.domains
    return TrainingSamples(data_folder, domains, request.param, 64, SAMPLES, 1, cache)


def options(layout: tuple[int, int, int], rank: int, consumed: int) -> dict[str, int]:
    size, batch, ranks = layout
    return {
        "consumed_samples": consumed,
        "micro_batch_size": size,
        "global_batch_size": batch,
        "data_parallel_rank": rank,
        "data_parallel_size": ranks,
    }


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert one["step"] == other["step"]
        for key in one.keys() - {"step"}:
            assert one[key].dtype == other[key].dtype
            assert torch.equal(one[key].cpu(), other[key].cpu()), key


@with_dali
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_same_samples_in_the_same_order_on_every_rank(
    samples: TrainingSamples, layout: tuple[int, int, int]
) -> None:
    dali = loader("dali", CPU)
    for rank in range(layout[2]):
        # all are kept: a micro-batch must stay what it was while DALI reads on
        assert_same(
            list(dali(samples, **options(layout, rank, 0))),
            list(batches(samples, **options(layout, rank, 0))),
        )


@with_dali
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_goes_on_from_any_batch_and_under_another_layout(
    samples: TrainingSamples, layout: tuple[int, int, int]
) -> None:
    batch = layout[1]
    for consumed in range(0, SAMPLES // batch * batch, batch):
        resumed = list(loader("dali", CPU)(samples, **options(layout, 0, consumed)))
        assert_same(resumed, list(batches(samples, **options(layout, 0, consumed))))
        assert resumed[0]["sample_index"][0] == consumed


@with_dali
def test_a_run_may_change_the_loader_at_any_step(samples: TrainingSamples) -> None:
    layout = (2, 8, 2)
    for consumed in (8, 24):
        for first, second in (("megatron", "dali"), ("dali", "megatron")):
            before: Iterator[Any] = loader(first, CPU)(samples, **options(layout, 1, 0))  # type: ignore[arg-type]
            taken = [next(before) for _ in range(consumed // 4)]
            taken += loader(second, CPU)(samples, **options(layout, 1, consumed))  # type: ignore[arg-type]
            assert_same(taken, list(batches(samples, **options(layout, 1, 0))))


@with_dali
def test_consumed_to_the_end_gives_nothing(samples: TrainingSamples) -> None:
    assert list(loader("dali", CPU)(samples, **options((1, 4, 1), 0, SAMPLES))) == []


@with_dali
def test_an_error_of_a_sample_is_told_as_it_is() -> None:
    class Broken:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            if i == 5:
                raise UserError("sample 5 is gone")
            return {"tokens": torch.full((4,), i), "labels": torch.full((4,), i)}

    with pytest.raises(UserError, match="sample 5 is gone"):
        list(loader("dali", CPU)(Broken(), **options((1, 2, 1), 0, 0)))


@with_dali
@pytest.mark.gpu
def test_on_a_gpu_micro_batches_lie_there(samples: TrainingSamples) -> None:
    layout = (2, 8, 2)
    ours = list(loader("dali", torch.device("cuda", 0))(samples, **options(layout, 1, 8)))
    assert {part["tokens"].device.type for part in ours} == {"cuda"}
    assert_same(ours, list(batches(samples, **options(layout, 1, 8))))


def test_without_dali_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data\.loader dali: .* pip install 'btx-megatron\[dali\]'"):
        loader("dali", CPU)
    check_installed("megatron")
    assert loader("megatron", CPU) is batches
