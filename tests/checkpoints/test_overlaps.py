"""Putting a box together from chunks: the arithmetic against plain indexing."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint, DistWriter, TensorInfo
from btx_megatron.checkpoints.metadata import overlaps
from btx_megatron.checkpoints.names import has_expert_axis, has_layer_axis, is_weight, split_layer


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """A partition of range(length) into runs (offset, size)."""
    marks = (
        sorted(draw(st.sets(st.integers(1, max(1, length - 1)), max_size=3)) - {length}) if length > 1 else []
    )
    edges = [0, *marks, length]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], list[list[tuple[int, int]]], list[tuple[int, int]]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    partitions = [draw(cuts(length)) for length in shape]
    box = []
    for length in shape:
        start = draw(st.integers(0, length - 1))
        box.append((start, draw(st.integers(1, length - start))))
    return shape, partitions, box


@given(cases())
def test_any_box_comes_together_from_any_grid_of_chunks(
    case: tuple[list[int], list[list[tuple[int, int]]], list[tuple[int, int]]],
) -> None:
    shape, partitions, box = case
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    start, extent = tuple(b[0] for b in box), tuple(b[1] for b in box)
    out = torch.full(extent, -1)
    for runs in torch.cartesian_prod(*[torch.arange(len(p)) for p in partitions]).reshape(-1, len(shape)):
        chunk = [partitions[axis][int(i)] for axis, i in enumerate(runs)]
        offset, size = tuple(c[0] for c in chunk), tuple(c[1] for c in chunk)
        met = overlaps(offset, size, start, extent)
        if met:
            stored = whole[tuple(slice(o, o + s) for o, s in chunk)]
            out[met[1]] = stored[met[0]]
    assert torch.equal(out, whole[tuple(slice(s, s + e) for s, e in box)])


def test_writer_and_reader_agree_part_by_part(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 5).bfloat16()
    info = TensorInfo(tuple(tensor.shape), tensor.dtype)
    name = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    writer = DistWriter(tmp_path / "c")
    for layer in range(2):
        for expert in range(3):
            writer.add(name, info, tensor[layer, expert], layer, expert)
    writer.finish({})
    checkpoint = DistCheckpoint(tmp_path / "c")
    assert checkpoint.tensors == {name: info}
    assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read(name, 1), tensor[1])
    assert torch.equal(checkpoint.read(name, 1, 2), tensor[1, 2])


def test_names() -> None:
    assert split_layer("decoder.layers.12.mlp.router.weight") == ("decoder.layers.mlp.router.weight", 12)
    assert split_layer("decoder.layers.mlp.router.weight") == ("decoder.layers.mlp.router.weight", None)
    assert split_layer("output_layer.weight") == ("output_layer.weight", None)
    assert has_layer_axis("decoder.layers.mlp.router.weight")
    assert not has_expert_axis("decoder.layers.mlp.router.weight")
    assert has_expert_axis("decoder.layers.mlp.experts.experts.linear_fc2.weight")
    for key in ("optimizer.state.exp_avg.x", "rng_state/shard_0_1", "a.b._extra_state/shard_0_2"):
        assert not is_weight(key)
