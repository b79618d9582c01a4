"""Legacy checkpoints that are damaged, hostile, or of a kind that is not read: one line each, by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_shards import (
    DENSE,
    HIDDEN,
    LAYER,
    LAYERS,
    MOE,
    arguments,
    random_model,
    save,
    save_dense,
    shard,
)

from btx_megatron.checkpoints.megatron_legacy import LegacyCheckpoint
from btx_megatron.errors import UserError


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A good TP2 PP2 checkpoint, for a test to break."""
    save_dense(tmp_path, 2, 2, random_model(DENSE))
    return tmp_path


def change(folder: Path, name: str, edit: Any) -> None:
    path = folder / "iter_0000007" / name / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        LegacyCheckpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_rank(damaged: Path) -> None:
    shutil.rmtree(damaged / "iter_0000007" / "mp_rank_01_001")
    assert_refused(damaged, "mp_rank_01_001")


def test_missing_first_rank(damaged: Path) -> None:
    shutil.rmtree(damaged / "iter_0000007" / "mp_rank_00_000")
    assert_refused(damaged, "mp_rank_00_000")


def test_rank_of_another_layout(damaged: Path) -> None:
    shutil.copytree(damaged / "iter_0000007" / "mp_rank_01_001", damaged / "iter_0000007" / "mp_rank_02_001")
    assert_refused(damaged, "mp_rank_02_001")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_file(damaged: Path, share: float) -> None:
    path = damaged / "iter_0000007" / "mp_rank_01_000" / "model_optim_rng.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(damaged, "mp_rank_01_000")


def test_unknown_key(damaged: Path) -> None:
    key = f"{LAYER}1.self_attention.linear_qkv.bias"
    change(damaged, "mp_rank_01_000", lambda content: content["model"].update({key: torch.ones(4)}))
    assert_refused(damaged, "mp_rank_01_000", key)


def test_old_grouped_experts_are_named(damaged: Path) -> None:
    key = f"{LAYER}0.mlp.experts.weight1"
    change(damaged, "mp_rank_00_000", lambda content: content["model"].update({key: torch.ones(4, 4)}))
    assert_refused(damaged, key, "transposed")


def test_lost_key(damaged: Path) -> None:
    key = f"{LAYER}1.mlp.linear_fc2.weight"
    change(damaged, "mp_rank_01_000", lambda content: content["model"].pop(key))
    assert_refused(damaged, "linear_fc2", "[1]")


def test_lost_layer(damaged: Path) -> None:
    def drop(content: dict[str, Any]) -> None:
        for key in [key for key in content["model"] if key.startswith(f"{LAYER}3.")]:
            del content["model"][key]

    for rank in ("mp_rank_00_001", "mp_rank_01_001"):  # in both: only the arguments can tell
        change(damaged, rank, drop)
    assert_refused(damaged, "num_layers 7", "8")


def test_one_weight_twice(damaged: Path) -> None:
    change(
        damaged,
        "mp_rank_00_000",
        lambda content: content["model"].update({f"{LAYER}0.input_layernorm.weight": torch.ones(HIDDEN)}),
    )
    assert_refused(damaged, "mp_rank_00_000", "input_layernorm", "same weight")


def test_ranks_that_do_not_agree(damaged: Path) -> None:
    key = f"{LAYER}2.mlp.linear_fc1.layer_norm_weight"
    change(damaged, "mp_rank_01_001", lambda content: content["model"][key][3].add_(1e-3))
    assert_refused(damaged, "mp_rank_01_001", key, "differs")


def test_another_dtype(damaged: Path) -> None:
    key = f"{LAYER}2.mlp.linear_fc1.weight"
    change(
        damaged,
        "mp_rank_01_001",
        lambda content: content["model"].update({key: content["model"][key].half()}),
    )
    assert_refused(damaged, "mp_rank_01_001", key, "float16")


def test_a_transposed_matrix(damaged: Path) -> None:
    key = f"{LAYER}0.self_attention.linear_proj.weight"
    change(
        damaged,
        "mp_rank_00_000",
        lambda content: content["model"].update({key: content["model"][key].t().contiguous().t()}),
    )
    assert_refused(damaged, "mp_rank_00_000", key, "row-major")


def test_tied_copy_that_is_none(tmp_path: Path) -> None:
    model = random_model(DENSE)
    del model["output_layer.weight"]
    save_dense(tmp_path, 1, 2, model)
    change(tmp_path, "mp_rank_00_001", lambda content: content["model"]["output_layer.weight"].neg_())
    assert_refused(tmp_path, "mp_rank_00_001", "output_layer.weight", "tied")


def test_chunks_without_their_arguments(damaged: Path) -> None:
    change(damaged, "mp_rank_00_001", lambda content: content.update(model0=content.pop("model")))
    assert_refused(damaged, "mp_rank_00_001", "model0")


def test_no_arguments(damaged: Path) -> None:
    change(damaged, "mp_rank_00_000", lambda content: content.pop("args"))
    assert_refused(damaged, "mp_rank_00_000", "args")


def test_old_row_order(damaged: Path) -> None:
    change(damaged, "mp_rank_00_000", lambda content: content.update(checkpoint_version=1.0))
    assert_refused(damaged, "mp_rank_00_000", "checkpoint_version 1.0")


def test_experts_cut_finer_than_the_rest(tmp_path: Path) -> None:
    model = random_model(MOE)
    args = arguments(model, expert_tensor_parallel_size=2)
    save(tmp_path, "mp_rank_00", args, model=shard(model, range(LAYERS), True, True))
    assert_refused(tmp_path, "mp_rank_00", "expert_tensor_parallel_size 2")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_pickle_is_run(damaged: Path) -> None:
    planted = damaged / "planted"
    change(damaged, "mp_rank_01_001", lambda content: content.update(rng_state=_Evil(planted)))
    planted.unlink(missing_ok=True)
    assert_refused(damaged, "mp_rank_01_001")
    assert not planted.exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    assert_refused(tmp_path, str(tmp_path))
    (tmp_path / "mp_rank_00").mkdir()
    assert_refused(tmp_path, "mp_rank_*")
