"""How Megatron's legacy checkpoints cut a model into one file a rank: ranks, keys and shards, as arithmetic.

    CKPT/iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

TT is the tensor-parallel rank; PPP the pipeline rank, there where the pipeline has more than one stage; EEE
the expert rank, there where experts are spread. So ``mp_rank_00_001`` alone does not tell which it is: the
arguments saved in every file do. A file holds a plain ``state_dict`` for each model chunk, with keys as the
modules are called: layers and experts are numbered from 0 in every file, norms have other names in the local
build than in Transformer Engine's, and a matrix is the rank's own slice:

    rows     [V/T, H], [Q/T, H]   embedding, output layer, q/k/v: the T slices lie one below the other
    cols     [H, D/T], [H, F/T]   attention output, linear_fc2: side by side
    gated    [2F/T, H]            linear_fc1: each slice is [gate rows of the rank; up rows of the rank]
    whole    [H], [E, H]          norms and router: every rank holds all of it
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, LAYERS, ROUTER
from btx_megatron.checkpoints.pieces import matrix_shape
from btx_megatron.errors import UserError

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
FC1 = LAYERS + "mlp.linear_fc1.weight"
FEED_FORWARD_NORM = LAYERS + "mlp.linear_fc1.layer_norm_weight"

FILE = "model_optim_rng.pt"

# ranks


class Rank(NamedTuple):
    """One file of a checkpoint."""

    tensor: int
    pipeline: int
    expert: int


@dataclass(frozen=True)
class Grid:
    """The parallel sizes under which a checkpoint was, or will be, written."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    """Over so many ranks each expert's matrices are cut; divides ``tensor``."""
    virtual: int = 1
    """Model chunks of each pipeline rank (interleaved pipelines have more than one)."""

    def ranks(self) -> Iterator[Rank]:
        """Every rank that has a file.

        Megatron numbers ranks t + T d (d: data-parallel) and, for experts, i + I (e + E ...), so of a rank
        e = (t // I + (T // I) d) mod E: where experts are cut into fewer slices (I) than the rest (T), not
        every pair of tensor and expert rank exists.
        """
        apart = self.tensor // self.expert_tensor
        for pipeline in range(self.pipeline):
            for tensor in range(self.tensor):
                first = tensor // self.expert_tensor
                for expert in sorted({(first + apart * d) % self.expert for d in range(self.expert)}):
                    yield Rank(tensor, pipeline, expert)

    def folder(self, rank: Rank) -> str:
        """Name of the rank's folder."""
        stage = f"_{rank.pipeline:03d}" if self.pipeline > 1 else ""
        experts = f"_{rank.expert:03d}" if self.expert > 1 else ""
        return f"mp_rank_{rank.tensor:02d}{stage}{experts}"

    def slice_of(self, rank: Rank, expert: bool) -> tuple[int, int]:
        """Which slice of a cut matrix the rank holds, and of how many; experts are cut on their own."""
        if expert:
            return rank.tensor % self.expert_tensor, self.expert_tensor
        return rank.tensor, self.tensor


def grid_of(args: Any, where: str) -> Grid:
    """The parallel sizes in the arguments that Megatron saved. Raises UserError for unusable ones."""
    tensor = _size(args, "tensor_model_parallel_size", where)
    grid = Grid(
        tensor,
        _size(args, "pipeline_model_parallel_size", where),
        _size(args, "expert_model_parallel_size", where, 1),
        _size(args, "expert_tensor_parallel_size", where, tensor),
        _size(args, "virtual_pipeline_model_parallel_size", where, 1),
    )
    if grid.tensor % grid.expert_tensor:
        raise UserError(
            f"{where}: expert_tensor_parallel_size {grid.expert_tensor} does not divide"
            f" tensor_model_parallel_size {grid.tensor}, so ranks wrote over each other's files;"
            " save it as torch_dist (--ckpt-format torch_dist)"
        )
    return grid


def _size(args: Any, name: str, where: str, default: int | None = None) -> int:
    value = getattr(args, name, None)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 100_000:
        raise UserError(f"{where}: its saved arguments hold no usable {name} ({value}); restore the file")
    return value


def first_layers(counts: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Number of the first layer of each (chunk, stage), from how many layers each holds.

    Model chunks follow one another as the activations pass them: chunk 0 of every stage in turn, then chunk
    1 of every stage. All of Megatron's splits are cases of this one order (even, interleaved, first or last
    stage of another size, embedding or loss counted as a layer, a layout written out by hand:
    megatron/core/transformer/transformer_layer.py, get_transformer_layer_offset).
    """
    first, layer = {}, 0
    for place in sorted(counts):
        first[place] = layer
        layer += counts[place]
    return first


# shards

Cut = Literal["whole", "rows", "gated", "cols"]

_CUTS: dict[str, Cut] = {
    EMBEDDING: "rows",
    OUTPUT: "rows",
    LAYERS + "self_attention.linear_qkv.weight": "rows",  # whole query groups, or heads, stay together
    LAYERS + "self_attention.linear_proj.weight": "cols",
    LAYERS + "mlp.linear_fc1.weight": "gated",
    LAYERS + "mlp.linear_fc2.weight": "cols",
}
KNOWN = {*DENSE, *DENSE_TO_MOE.values(), ROUTER}
_TO_DENSE = {moe: dense for dense, moe in DENSE_TO_MOE.items()}


def cut_of(name: str) -> Cut:
    """How tensor parallelism cuts a weight of this (stacked) name."""
    return _CUTS.get(_TO_DENSE.get(name, name), "whole")


class Box(NamedTuple):
    """A block of a part, [rows, cols] at (row, col), which begins at row ``at`` of a rank's slice."""

    row: int
    col: int
    rows: int
    cols: int
    at: int = 0


def boxes(cut: Cut, shape: tuple[int, ...], number: int, slices: int) -> list[Box]:
    """What slice ``number`` of so many holds of a part of this shape; a box takes the slice's full width.

    Raises ValueError where it cannot be cut in equal slices.
    """
    rows, cols = matrix_shape(shape)
    if cut == "whole":
        return [Box(0, 0, rows, cols)]
    if cut == "cols":
        width = _equal(cols, slices)
        return [Box(0, number * width, rows, width)]
    if cut == "rows":
        height = _equal(rows, slices)
        return [Box(number * height, 0, height, cols)]
    half = _equal(rows, 2)
    height = _equal(half, slices)
    return [Box(start + number * height, 0, height, cols, at) for start, at in ((0, 0), (half, height))]


def _equal(length: int, slices: int) -> int:
    if length % slices:
        raise ValueError(f"{length} cannot be cut in {slices} equal slices")
    return length // slices


def whole_shape(cut: Cut, shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """Shape of the part of which slices have this shape."""
    if cut == "whole":
        return shape
    rows, cols = shape
    return (rows, cols * slices) if cut == "cols" else (rows * slices, cols)


def slice_shape(cut: Cut, shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """Shape of the slices of a part of this shape. Raises ValueError where they are not equal."""
    parts = boxes(cut, shape, 0, slices)
    return shape if cut == "whole" else (sum(box.rows for box in parts), parts[0].cols)


# keys


class Slot(NamedTuple):
    """A part: a stacked name and where in it; layer and expert None where it has no such axis."""

    name: str
    layer: int | None = None
    expert: int | None = None

    @property
    def leading(self) -> tuple[int, ...]:
        """Layer and expert, those that there are."""
        return tuple(number for number in (self.layer, self.expert) if number is not None)


_LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_KEY = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<each>\d+)\.linear_fc(?P<fc>[12])\.weight"
    r"|linear_fc(?P<grouped_fc>[12])\.weight(?P<grouped>\d+))"
)
_EXPERT_NAME = "mlp.experts.experts.linear_fc{}.weight"
_INPUT_NORM = "self_attention.linear_qkv.layer_norm_weight"


def is_state(key: str) -> bool:
    """True of Transformer Engine's ``_extra_state``: fp8 scales and the like, no weights."""
    return "_extra_state" in key.rpartition(".")[2]


def parse_key(key: str, moe: bool) -> Slot | None:
    """The part, with the rank's own numbers, that a key of a state dict holds; None if none is known.

    The local build has ``pre_mlp_layernorm`` in every model, Transformer Engine in a MoE (``moe``) only.
    """
    match = _LAYER_KEY.fullmatch(key)
    if match is None:
        return Slot(key) if key in (EMBEDDING, FINAL_NORM, OUTPUT) else None
    layer, rest = int(match[1]), match[2]
    if expert := _EXPERT_KEY.fullmatch(rest):
        number, matrix = expert["each"] or expert["grouped"], expert["fc"] or expert["grouped_fc"]
        return Slot(LAYERS + _EXPERT_NAME.format(matrix), layer, int(number))
    if rest == "input_layernorm.weight":
        rest = _INPUT_NORM
    if rest == "pre_mlp_layernorm.weight" and not moe:
        rest = FEED_FORWARD_NORM.removeprefix(LAYERS)
    name = LAYERS + rest
    return Slot(name, layer) if name in KNOWN and ".experts." not in name else None


def key_of(slot: Slot, local: bool, grouped: bool) -> str:
    """The key under which a rank holds a part, with the rank's own numbers.

    ``local``: for Megatron's local build, not Transformer Engine's; ``grouped``: experts in one grouped
    module, not one by one.
    """
    if slot.layer is None:
        return slot.name
    rest = slot.name.removeprefix(LAYERS)
    if slot.expert is not None:
        matrix = rest.removeprefix("mlp.experts.experts.").removesuffix(".weight")
        one = f"{matrix}.weight{slot.expert}" if grouped else f"local_experts.{slot.expert}.{matrix}.weight"
        return f"{LAYERS}{slot.layer}.mlp.experts.{one}"
    if local and rest == _INPUT_NORM:
        rest = "input_layernorm.weight"
    if local and slot.name == FEED_FORWARD_NORM:
        rest = "pre_mlp_layernorm.weight"
    return f"{LAYERS}{slot.layer}.{rest}"
