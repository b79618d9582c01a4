"""Checkpoints that are damaged, inconsistent or hostile: one clear line, and nothing is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch_dist import save_torch_dist

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint
from btx_megatron.checkpoints.tracker import write_tracker
from btx_megatron.errors import UserError

NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
HEAD = "output_layer.weight"


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return save_torch_dist(folder, tensors)


def change_index(folder: Path, change: Any) -> None:
    """What a broken writer might have left."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.mkdir, (self.folder,)  # type: ignore[return-value]


def test_a_malicious_index_is_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {HEAD: torch.zeros(2)})
    change_index(folder, lambda metadata: setattr(metadata, "planner_data", Planted(tmp_path / "planted")))
    with pytest.raises(UserError, match=r"\.metadata: not a checkpoint index: it names pathlib"):
        DistCheckpoint(folder)
    assert not (tmp_path / "planted").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "planted").exists()  # it would have


def test_a_malicious_tensor_is_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {HEAD: torch.zeros(2)})
    torch.save(Planted(tmp_path / "planted"), folder / "__0_0.distcp")
    length = (folder / "__0_0.distcp").stat().st_size

    def point_at_it(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, length

    change_index(folder, point_at_it)
    with pytest.raises(UserError, match=r"__0_0\.distcp: its pickle names .*getattr, which no checkpoint"):
        DistCheckpoint(folder).read(HEAD)
    assert not (tmp_path / "planted").exists()


def test_no_file_outside_the_checkpoint_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {HEAD: torch.zeros(2)})
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")

    def point_outside(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../elsewhere"

    change_index(folder, point_outside)
    with pytest.raises(UserError, match="c/elsewhere: missing"):
        DistCheckpoint(folder).read(HEAD)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("c")
    write(folder, {HEAD: torch.arange(6.0).view(3, 2), NORM: torch.ones(2, 4)})
    return folder, (folder / ".metadata").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_index_is_a_user_error_or_harmless(
    whole: tuple[Path, bytes], at: float, bit: int
) -> None:
    folder, index = whole
    position = int(at * len(index))
    flipped = bytearray(index)
    flipped[position] ^= 1 << bit
    (folder / ".metadata").write_bytes(flipped)
    try:
        checkpoint = DistCheckpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except UserError:
        pass


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_truncated_index(whole: tuple[Path, bytes], keep: int) -> None:
    folder, index = whole
    (folder / ".metadata").write_bytes(index[:keep])
    with pytest.raises(UserError, match=r"\.metadata: not a checkpoint index"):
        DistCheckpoint(folder)


def test_values_that_are_not_stored(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {HEAD: torch.zeros(3, 2)})
    change_index(folder, lambda metadata: metadata.state_dict_metadata[HEAD].chunks.clear())
    with pytest.raises(UserError, match=r"output_layer\.weight: 0 of 6 values are stored"):
        DistCheckpoint(folder)


@pytest.mark.parametrize(
    "other", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(1)]
)
def test_a_block_that_is_not_what_the_index_says(tmp_path: Path, other: Tensor) -> None:
    """Of the same number of values, of another precision, or one that torch would broadcast."""
    folder = write(tmp_path / "c", {HEAD: torch.zeros(3, 2)})
    torch.save(other, folder / "__0_0.distcp")
    length = (folder / "__0_0.distcp").stat().st_size

    def measure(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.length = length

    change_index(folder, measure)
    with pytest.raises(UserError, match="another shape or dtype"):
        DistCheckpoint(folder).read(HEAD)


def layer(number: int, rest: str = "mlp.linear_fc1.layer_norm_weight") -> str:
    return f"decoder.layers.{number}.{rest}"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({layer(0): torch.ones(4), layer(2): torch.ones(4)}, "for layers 0, 2"),
        ({layer(0): torch.ones(4), NORM: torch.ones(2, 4)}, "for layers 0, all of them"),
        ({layer(0): torch.ones(4), layer(1): torch.ones(5)}, r"\[4\] float32.*\[5\] float32 in layer 1"),
        ({layer(0): torch.ones(4), layer(1): torch.ones(4).half()}, r"float32 .* float16 in layer 1"),
    ],
)
def test_layers_that_do_not_go_together(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    folder = write(tmp_path / "c", tensors)
    with pytest.raises(UserError, match=message):
        DistCheckpoint(folder)


@given(order=st.permutations(range(12)))
@example(order=[11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5)
def test_layers_are_put_in_the_order_of_their_numbers(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    """10 comes after 9, not after 1, in whatever order the keys are stored."""
    folder = write(tmp_path_factory.mktemp("c"), {layer(i): torch.full((3,), float(i)) for i in order})
    checkpoint = DistCheckpoint(folder)
    assert checkpoint.read(NORM)[:, 0].tolist() == list(range(12))
    assert checkpoint.read(NORM, 10)[0] == 10


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("12", "iter_0000012, which is not there"),
        ("²", "not a step"),
        ("../x", "not a step"),
        ("", "not a step"),
    ],
)
def test_a_tracker_that_names_nothing(tmp_path: Path, tracker: str, message: str) -> None:
    write_tracker(tmp_path, tracker)
    with pytest.raises(UserError, match=message):
        DistCheckpoint(tmp_path)


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path, tmp_path / "file", tmp_path / "absent"):
        with pytest.raises(UserError, match="no Megatron checkpoint there"):
            DistCheckpoint(path)
