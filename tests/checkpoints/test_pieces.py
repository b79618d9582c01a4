"""Parts from pieces and back: the arithmetic against plain indexing."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint, DistLayout
from btx_megatron.checkpoints.names import has_expert_axis, has_layer_axis, is_weight, split_layer
from btx_megatron.checkpoints.pieces import Files, Piece, TensorInfo, check_cover, read_rows, write_rows
from btx_megatron.checkpoints.stream import is_finite
from btx_megatron.errors import UserError


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """A partition of range(length) into runs (offset, size)."""
    marks = (
        sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=3)) - {length}) if length > 1 else []
    )
    edges = [0, *marks, length]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


@given(st.data())
def test_any_rows_come_together_from_any_grid_of_pieces(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 6))
    grid = list(itertools.product(data.draw(cuts(rows)), data.draw(cuts(cols))))
    whole = torch.arange(rows * cols, dtype=torch.float32).reshape(rows, cols)
    info = TensorInfo((rows, cols), whole.dtype)
    pieces, end = [], 3
    for (row, height), (col, width) in data.draw(st.permutations(grid)):
        gap = data.draw(st.integers(0, 2))  # what is read may lie in wider rows
        pieces.append(Piece("f", end, height, width, row, col, width + gap if gap else None))
        end += height * (width + gap) * 4
    check_cover(pieces, info.shape, "it")
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), os.O_RDWR | os.O_CREAT)
        files.preallocate("f", end)
        plain = [dataclasses.replace(piece, stride=None) for piece in pieces if piece.stride is None]
        write_rows(files, plain, 0, whole)
        for piece in pieces:
            for row in range(piece.rows if piece.stride else 0):
                values = whole[piece.row + row, piece.col : piece.col + piece.cols]
                files.write("f", piece.offset + row * (piece.stride or 0) * 4, values.numpy().tobytes())
        assert torch.equal(read_rows(files, pieces, info, start, stop), whole[start:stop])
        files.close()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece("f", 0, 1, 3)], "3 of 6 values are stored"),
        ([Piece("f", 0, 2, 3), Piece("f", 0, 1, 1)], "sticks out or overlaps"),
        ([Piece("f", 0, 3, 2)], "sticks out or overlaps"),
        ([Piece("f", 0, 2, 3, col=-1)], "sticks out or overlaps"),
    ],
)
def test_pieces_that_do_not_tile_a_part_are_refused(pieces: list[Piece], message: str) -> None:
    with pytest.raises(UserError, match=f"it: .*{message}"):
        check_cover(pieces, (2, 3), "it")


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    with pytest.raises(UserError, match=r"f: ends too early, it is cut short"):
        read_rows(Files(tmp_path), [Piece("f", 0, 2, 3)], TensorInfo((2, 3), torch.float32), 0, 2)
    with pytest.raises(UserError, match=r"g: cannot be opened \(No such file"):
        read_rows(Files(tmp_path), [Piece("g", 0, 2, 3)], TensorInfo((2, 3), torch.float32), 0, 2)


@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.lists(st.floats(), min_size=1, max_size=5),
)
def test_finite_by_the_bits_is_finite(dtype: torch.dtype, values: list[float]) -> None:
    block = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert is_finite(block) == bool(torch.isfinite(block).all())


def test_writer_and_reader_agree_part_by_part(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 5).bfloat16()
    info = TensorInfo(tuple(tensor.shape), tensor.dtype)
    name = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    layout = DistLayout(tmp_path / "c", {name: info}, lambda name, index: index[1])
    for layer in range(2):
        for expert in range(3):
            write_rows(layout.files, layout.pieces(name, (layer, expert)), 0, tensor[layer, expert])
    layout.finish({"iteration": 7})
    assert len(list((tmp_path / "c").glob("*.distcp"))) == 3  # a file for each expert
    checkpoint = DistCheckpoint(tmp_path / "c")
    assert checkpoint.tensors == {name: info}
    assert checkpoint.common == {"iteration": 7}
    assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read(name, 1), tensor[1])
    assert torch.equal(checkpoint.read(name, 1, 2), tensor[1, 2])
    loaded = {name: torch.zeros_like(tensor)}  # and torch's own reader
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert torch.equal(loaded[name], tensor)


def test_names() -> None:
    assert split_layer("decoder.layers.12.mlp.router.weight") == ("decoder.layers.mlp.router.weight", 12)
    assert split_layer("decoder.layers.mlp.router.weight") == ("decoder.layers.mlp.router.weight", None)
    assert split_layer("output_layer.weight") == ("output_layer.weight", None)
    assert has_layer_axis("decoder.layers.mlp.router.weight")
    assert not has_expert_axis("decoder.layers.mlp.router.weight")
    assert has_expert_axis("decoder.layers.mlp.experts.experts.linear_fc2.weight")
    for key in (
        "optimizer.state.exp_avg.x",
        "chained_0.optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight",
        "chained_12.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.float32).bucket_idx_0.param",
        "rng_state/shard_0_1",
        "a.b._extra_state/shard_0_2",
    ):
        assert not is_weight(key)
