"""Megatron's legacy checkpoints (``mp_rank_*`` folders) as an index of pieces: read without Megatron.

legacy_files.py opens the files and finds the slices, legacy_layout.py holds the arithmetic, and here they
become whole weights, each checked: every slice there, all of one shape and dtype, and all ranks agreeing.

A weight that every rank holds whole (norms, router) is read from the first rank, after a comparison with all
others, byte by byte. What ranks hold in common beyond that (attention and embeddings, under expert
parallelism) is too large to compare and is checked by shape and dtype only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from btx_megatron.checkpoints.legacy_files import Stored, find_legacy, read_shards
from btx_megatron.checkpoints.legacy_layout import (
    EMBEDDING,
    OUTPUT,
    Box,
    Slot,
    boxes,
    cut_of,
    whole_shape,
)
from btx_megatron.checkpoints.names import (
    DENSE,
    DENSE_TO_MOE,
    MAY_BE_ABSENT,
    ROUTER,
    has_expert_axis,
    has_layer_axis,
)
from btx_megatron.checkpoints.pieces import (
    Files,
    Piece,
    TensorInfo,
    bytes_of,
    matrix_shape,
    read_rows,
)
from btx_megatron.errors import UserError

_TIED_ROWS = 64
"""So many rows are compared where a stage keeps a copy of the embeddings."""


class LegacyCheckpoint:
    """The weights of one checkpoint. ``path`` has the tracker in it, or the ``mp_rank_*`` folders themselves.

    Raises UserError, naming file and key, for whatever is missing, unknown, or differs between ranks.
    """

    def __init__(self, path: Path) -> None:
        self.folder = find_legacy(Path(path))
        shards = read_shards(self.folder)
        self.args = shards.args
        """What Megatron saved as its arguments."""
        self.files = Files(self.folder)
        self._grid, self._parts = shards.grid, shards.parts
        try:
            self._drop_tied_output()
            self._check_replicas()
            self.tensors = self._infos()
            self._check_names()
            self._check_args()
        except BaseException:
            self.files.close()
            raise

    def pieces(self, name: str, index: tuple[int, ...]) -> list[Piece]:
        """Where the part of ``name`` at leading indices (layer, expert) lies; they cover it once."""
        slices = self._parts[Slot(name, *index)]
        shape = self.tensors[name].shape[len(index) :]
        return [
            _piece(copies[0], box)
            for number, copies in sorted(slices.items())
            for box in boxes(cut_of(name), shape, number, len(slices))
        ]

    def _drop_tied_output(self) -> None:
        """The last stage of a pipeline keeps a copy of tied embeddings, as its output layer."""
        if getattr(self.args, "untie_embeddings_and_output_weights", True) or Slot(OUTPUT) not in self._parts:
            return
        embedding = self._parts.get(Slot(EMBEDDING), {})
        for number, copies in self._parts.pop(Slot(OUTPUT)).items():
            for copy in copies:
                if number not in embedding or not self._same(embedding[number][0], copy, _TIED_ROWS):
                    raise UserError(
                        f"{self.folder / copy.file}: {copy.key} is not the embedding, but the saved arguments"
                        " say that they are tied; restore the file"
                    )

    def _check_replicas(self) -> None:
        """Raise UserError where ranks hold other shapes or dtypes of one part, or other norms and routers."""
        for slot, slices in self._parts.items():
            first = next(iter(slices.values()))[0]
            for other in (copy for copies in slices.values() for copy in copies):
                self._check_array(other)
                if (other.array.shape, other.array.dtype) != (first.array.shape, first.array.dtype):
                    raise UserError(
                        f"{self.folder / other.file}: {other.key} is {_kind(other)}, but {_kind(first)} in"
                        f" {first.file}; restore the files"
                    )
                if cut_of(slot.name) == "whole" and other is not first and not self._same(first, other):
                    raise UserError(
                        f"{self.folder / other.file}: {other.key} differs from that in {first.file}, and all"
                        " ranks must hold the same; restore the file"
                    )

    def _check_array(self, stored: Stored) -> None:
        shape, stride = stored.array.shape, stored.array.stride
        flat = len(shape) == 1
        row_major = len(shape) == 2 and 1 in (shape[1], stride[1])
        if not (flat or row_major) or min(shape) < 1:
            raise UserError(
                f"{self.folder / stored.file}: {stored.key} is {list(shape)} with strides {list(stride)},"
                " not a row-major matrix; save the checkpoint again"
            )

    def _same(self, first: Stored, second: Stored, at_most: int | None = None) -> bool:
        """Compare two slices bit by bit; where they have many more rows than ``at_most``, some of them."""
        if (first.array.shape, first.array.dtype) != (second.array.shape, second.array.dtype):
            return False
        info = TensorInfo(first.array.shape, first.array.dtype)
        rows, cols = matrix_shape(info.shape)
        spans = [(0, rows)]
        if at_most is not None and rows > at_most:
            spans = [(row, row + 1) for row in range(0, rows, rows // at_most)]
        box = Box(0, 0, rows, cols)
        return all(
            bytes_of(read_rows(self.files, [_piece(first, box)], info, *span))
            == bytes_of(read_rows(self.files, [_piece(second, box)], info, *span))
            for span in spans
        )

    def _infos(self) -> dict[str, TensorInfo]:
        slots: dict[str, list[Slot]] = {}
        for slot in self._parts:
            slots.setdefault(slot.name, []).append(slot)
        return {name: self._info(name, slots[name]) for name in sorted(slots)}

    def _info(self, name: str, slots: list[Slot]) -> TensorInfo:
        """Shape and dtype of a stacked weight, of which every part must be there."""
        leading = tuple(1 + max(numbers) for numbers in zip(*(slot.leading for slot in slots), strict=True))
        if len(slots) != math.prod(leading):
            raise UserError(f"{self.folder}: {name} is missing in some layers or experts; restore the files")
        first = self._part_info(slots[0])
        for slot in slots[1:]:
            if self._part_info(slot) != first:
                raise UserError(
                    f"{self.folder}: {name} has another shape or dtype in {list(slot.leading)} than in"
                    f" {list(slots[0].leading)}; restore the files"
                )
        return TensorInfo((*leading, *first.shape), first.dtype)

    def _part_info(self, slot: Slot) -> TensorInfo:
        cut, slices = cut_of(slot.name), self._parts[slot]
        grid = self._grid
        count = grid.expert_tensor if has_expert_axis(slot.name) else grid.tensor
        missing = set(range(1 if cut == "whole" else count)) - set(slices)
        if missing:
            raise UserError(
                f"{self.folder}: {slot.name} {list(slot.leading)}: tensor ranks {sorted(missing)} lack their"
                " slice; restore the files"
            )
        array = next(iter(slices.values()))[0].array
        if cut != "whole" and len(array.shape) != 2:
            raise UserError(f"{self.folder}: {slot.name} is {list(array.shape)}, not a matrix")
        return TensorInfo(whole_shape(cut, array.shape, len(slices)), array.dtype)

    def _check_names(self) -> None:
        """Every weight of a dense model, or of a MoE, must be there, in every layer."""
        wanted = set(DENSE) - MAY_BE_ABSENT
        if ROUTER in self.tensors:
            wanted = {DENSE_TO_MOE.get(name, name) for name in wanted} | {ROUTER}
        if missing := wanted - set(self.tensors):
            raise UserError(f"{self.folder}: no {', '.join(sorted(missing))} in its files; restore them")
        if unknown := set(self.tensors) - wanted - MAY_BE_ABSENT:
            raise UserError(f"{self.folder}: {', '.join(sorted(unknown))} beside a router; restore the files")
        layers = {info.shape[0] for name, info in self.tensors.items() if has_layer_axis(name)}
        if len(layers) > 1:
            raise UserError(f"{self.folder}: some weights are missing in some layers; restore the files")
        fc1, fc2 = (DENSE_TO_MOE[name] if ROUTER in self.tensors else name for name in _FEED_FORWARD)
        if self.tensors[fc1].shape[-2] != 2 * self.tensors[fc2].shape[-1]:
            raise UserError(f"{self.folder}: its feed-forward has no gate; only SwiGLU models are read")

    def _check_args(self) -> None:
        """What the saved arguments say of the model must be what the files hold."""
        rows, cols = self.tensors[EMBEDDING].shape
        found = {"padded_vocab_size": rows, "hidden_size": cols}
        for name, info in self.tensors.items():
            found |= {"num_layers": info.shape[0]} if has_layer_axis(name) else {}
            found |= {"num_experts": info.shape[1]} if has_expert_axis(name) else {}
        for name, size in found.items():
            said: Any = getattr(self.args, name, None)
            if said is not None and said != size:
                raise UserError(
                    f"{self.folder}: its files hold {name} {size}, its saved arguments say {said};"
                    " restore the files"
                )


_FEED_FORWARD = ("decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight")


def _piece(stored: Stored, box: Box) -> Piece:
    """The block of a part that a slice holds."""
    array = stored.array
    step = array.stride[0] if array.shape[0] > 1 else box.cols
    offset = array.offset + box.at * step * array.dtype.itemsize
    stride = None if step == box.cols else step
    return Piece(stored.file, offset, box.rows, box.cols, box.row, box.col, stride)


def _kind(stored: Stored) -> str:
    return f"{list(stored.array.shape)} {str(stored.array.dtype).removeprefix('torch.')}"
