"""Legacy checkpoints, read and written, against shards cut by a few independent lines."""

from __future__ import annotations

import argparse
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_shards import (
    DENSE,
    EXPERT,
    HIDDEN,
    LAYER,
    LAYERS,
    MOE,
    arguments,
    assert_same,
    random_model,
    read_all,
    save,
    save_dense,
    save_moe,
    shard,
)
from torch import Tensor

from btx_megatron.checkpoints.legacy_writer import LegacyLayout
from btx_megatron.checkpoints.megatron_legacy import LegacyCheckpoint
from btx_megatron.checkpoints.pieces import TensorInfo, write_rows
from btx_megatron.checkpoints.tracker import write_tracker
from btx_megatron.errors import UserError

# reading


@pytest.mark.parametrize("style", ["te", "local"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_dense_shards_are_read(tmp_path: Path, tensor: int, pipeline: int, style: str) -> None:
    model = random_model(DENSE, torch.bfloat16)
    save_dense(tmp_path, tensor, pipeline, model, style)
    checkpoint = LegacyCheckpoint(tmp_path)
    assert_same(read_all(checkpoint), model)
    assert checkpoint.folder == tmp_path / "iter_0000007"
    assert checkpoint.args.hidden_size == HIDDEN
    assert_same(read_all(LegacyCheckpoint(checkpoint.folder)), model)


def test_interleaved_pipeline(tmp_path: Path) -> None:
    """PP2 x VPP2 of 8 layers: stage 0 holds [0 1] [4 5], stage 1 holds [2 3] [6 7]."""
    model = random_model(DENSE)
    args = arguments(model, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    for stage, (a, b) in enumerate((((0, 1), (4, 5)), ((2, 3), (6, 7)))):
        chunks = [range(a[0], a[1] + 1), range(b[0], b[1] + 1)]
        save(
            tmp_path,
            f"mp_rank_00_{stage:03d}",
            args,
            model0=shard(model, chunks[0], stage == 0, False),
            model1=shard(model, chunks[1], False, stage == 1),
        )
    assert_same(read_all(LegacyCheckpoint(tmp_path)), model)


@pytest.mark.parametrize("split", [(2, 3, 3), (3, 3, 2), (1, 6, 1), (0, 4, 4)])
def test_uneven_pipeline(tmp_path: Path, split: tuple[int, ...]) -> None:
    model = random_model(DENSE)
    args = arguments(model, pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=split[0])
    ends = [0, *itertools.accumulate(split)]
    for stage in range(3):
        state = shard(model, range(ends[stage], ends[stage + 1]), stage == 0, stage == 2)
        save(tmp_path, f"mp_rank_00_{stage:03d}", args, model=state)
    assert_same(read_all(LegacyCheckpoint(tmp_path)), model)


@pytest.mark.parametrize("style", ["te", "grouped"])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (1, 1, 2, 1), (2, 1, 2, 2), (2, 1, 2, 1), (2, 2, 4, 1), (2, 2, 2, 2), (4, 1, 1, 1)],
    ids=lambda sizes: "TP{}-PP{}-EP{}-ETP{}".format(*sizes),
)
def test_moe_shards_are_read(tmp_path: Path, sizes: tuple[int, int, int, int], style: str) -> None:
    model = random_model(MOE)
    save_moe(tmp_path, model, sizes, style)
    assert_same(read_all(LegacyCheckpoint(tmp_path)), model)


def test_local_build_of_a_moe(tmp_path: Path) -> None:
    """Its second norm has the same name under both builds."""
    model = random_model(MOE)
    save_moe(tmp_path, model, (1, 1, 2, 1), "local")
    assert_same(read_all(LegacyCheckpoint(tmp_path)), model)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_tied_embeddings(tmp_path: Path, pipeline: int) -> None:
    model = random_model(DENSE)
    del model["output_layer.weight"]
    save_dense(tmp_path, 2, pipeline, model)
    assert_same(read_all(LegacyCheckpoint(tmp_path)), model)


def test_a_view_of_a_larger_storage(tmp_path: Path) -> None:
    """Strides and offsets of what was saved count, not only shapes."""
    model = random_model(DENSE)
    state = shard(model, range(LAYERS), True, True)
    for key in list(state):
        if torch.is_tensor(state[key]) and state[key].dim() == 2:
            wide = torch.randn(state[key].shape[0] + 1, state[key].shape[1] + 5)
            wide[1:, 2:-3] = state[key]
            state[key] = wide[1:, 2:-3]
    save(tmp_path, "mp_rank_00", arguments(model), model=state)
    assert_same(read_all(LegacyCheckpoint(tmp_path)), model)


# writing


def write(folder: Path, model: dict[str, Tensor], args: Any, *sizes: int) -> Path:
    tensors = {name: TensorInfo(tuple(weight.shape), weight.dtype) for name, weight in model.items()}
    layout = LegacyLayout(folder / "release", tensors, args, *sizes)
    for name, weight in reversed(model.items()):
        axes = name.startswith(LAYER) + (EXPERT in name)
        for index in itertools.product(*map(range, weight.shape[:axes])):
            part, rows = weight[index], weight.shape[axes]
            for start in range(0, rows, 7):  # in blocks that meet no boundary
                write_rows(layout.files, layout.pieces(name, index), start, part[start : start + 7])
    layout.finish()
    write_tracker(folder, "release")
    return folder / "release"


def assert_state(found: dict[str, Tensor], wanted: dict[str, Any]) -> None:
    weights = {key: value for key, value in wanted.items() if value is not None}
    assert found.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.equal(found[key], weight), key
        assert found[key].is_contiguous()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("style", ["te", "local"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2), (1, 4)])
def test_dense_files_are_what_megatron_would_save(
    tmp_path: Path, tensor: int, pipeline: int, style: str, tied: bool
) -> None:
    model = random_model(DENSE, torch.bfloat16)
    if tied:
        del model["output_layer.weight"]
    impl = {"te": "transformer_engine", "local": "local"}[style]
    args = arguments(model, transformer_impl=impl, pipeline_model_parallel_size=3, odd=pickle.Pickler)
    folder = write(tmp_path, model, args, tensor, pipeline)
    size = LAYERS // pipeline
    for t, p in itertools.product(range(tensor), range(pipeline)):
        name = f"mp_rank_{t:02d}_{p:03d}" if pipeline > 1 else f"mp_rank_{t:02d}"
        content = torch.load(folder / name / "model_optim_rng.pt", weights_only=False)
        layers = range(p * size, (p + 1) * size)
        wanted = shard(model, layers, p == 0, p == pipeline - 1, (t, tensor), style=style)
        assert_state(content["model"], wanted)
        assert content["checkpoint_version"] == 3.0
        assert content["iteration"] == 0
        saved = content["args"]
        assert isinstance(saved, argparse.Namespace)
        assert (saved.tensor_model_parallel_size, saved.pipeline_model_parallel_size) == (tensor, pipeline)
        assert saved.params_dtype == torch.float32
        assert not hasattr(saved, "odd")
    assert len(list(folder.iterdir())) == tensor * pipeline
    assert_same(read_all(LegacyCheckpoint(tmp_path)), model)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 2), (2, 1, 2), (2, 2, 4), (1, 2, 1)], ids=str)
def test_moe_files_are_what_megatron_would_save(
    tmp_path: Path, sizes: tuple[int, int, int], grouped: bool
) -> None:
    model = random_model(MOE)
    folder = write(tmp_path, model, arguments(model, moe_grouped_gemm=grouped), *sizes)
    reference = tmp_path / "reference"
    save_moe(reference, model, (*sizes, sizes[0]), "grouped" if grouped else "te")
    expected = sorted((reference / "iter_0000007").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in expected]
    for path in expected:
        wanted = torch.load(path / "model_optim_rng.pt", weights_only=False)["model"]
        found = torch.load(folder / path.name / "model_optim_rng.pt", weights_only=False)["model"]
        assert_state(found, wanted)
    assert_same(read_all(LegacyCheckpoint(tmp_path)), model)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 3, 1), "8 layers"),
        ((1, 1, 3), "4 experts"),
        ((3, 1, 1), "equal slices"),
        ((8, 1, 1), "4 heads"),
    ],
)
def test_unequal_shares_are_refused(tmp_path: Path, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path, random_model(MOE), arguments(random_model(MOE)), *sizes)
