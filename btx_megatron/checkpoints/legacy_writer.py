"""Legacy checkpoints, laid out before they are written: every rank's file, and where each weight goes in it.

    layout = LegacyLayout(CKPT / "release", tensors, args, 2, 1, 4)
    write_rows(layout.files, layout.pieces(name, index), 0, part)      for every part, in any order
    layout.finish()

Files are made in their whole length, with headers and arguments, before the first weight is written: a full
disk shows at once. The tracker is the caller's to write, last.

Keys are those of the build that will load the file: ``args.transformer_impl`` "local" gives the names of
Megatron's local build, anything else Transformer Engine's, and ``args.moe_grouped_gemm`` one grouped module
for a rank's experts. Megatron loads these files with ``load_state_dict`` and, where keys are missing, goes on
without them: the wrong names would leave norms at their initial values.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from btx_megatron.checkpoints.legacy_layout import (
    EMBEDDING,
    FILE,
    FINAL_NORM,
    OUTPUT,
    Grid,
    Rank,
    Slot,
    boxes,
    cut_of,
    key_of,
    slice_shape,
)
from btx_megatron.checkpoints.names import ROUTER, has_expert_axis, has_layer_axis
from btx_megatron.checkpoints.pieces import Files, Piece, TensorInfo
from btx_megatron.checkpoints.torch_zip import PlannedArray, plan_object
from btx_megatron.durable import sync
from btx_megatron.errors import UserError

_NOT_OF_THIS_LAYOUT = (
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "virtual_pipeline_model_parallel_size",
)
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


class LegacyLayout:
    """The files of a checkpoint to be, preallocated in ``folder`` (``CKPT/release``, new or empty).

    ``tensors``: stacked names, as LegacyCheckpoint gives them; no output layer means that the embeddings are
    tied. ``args``: Megatron's arguments of the model; the parallel sizes in them are replaced by those given.
    Raises UserError where the model cannot be cut like this, OSError where the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        args: Any,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        expert_parallel: int = 1,
    ) -> None:
        self.folder, self.tensors = folder, dict(tensors)
        self._grid = Grid(tensor_parallel, pipeline_parallel, expert_parallel, tensor_parallel)
        check_sizes(self.tensors, args, self._grid)
        self.args = _args_for(args, self._grid, tied=OUTPUT not in self.tensors)
        self.files = Files(folder, os.O_RDWR)
        self._pieces: dict[Slot, list[Piece]] = {}
        try:
            for rank in self._grid.ranks():
                self._lay_out(rank)
        except BaseException:
            self.files.close()
            raise

    def pieces(self, name: str, index: tuple[int, ...]) -> list[Piece]:
        """Every place that the part of ``name`` at leading indices (layer, expert) must be written to.

        Unlike a reader's pieces they may overlap: a weight that several ranks hold has a place in each of
        their files, all in this one list, and ``write_rows`` fills them all.
        """
        return self._pieces[Slot(name, *index)]

    def finish(self) -> None:
        """Bring everything to disk and close the files."""
        self.files.sync()
        self.files.close()
        for rank in self._grid.ranks():
            sync(self.folder / self._grid.folder(rank))
        sync(self.folder)

    def _lay_out(self, rank: Rank) -> None:
        """Make the rank's file in its whole length and note what goes where."""
        model: OrderedDict[str, PlannedArray] = OrderedDict()
        held: list[tuple[Slot, PlannedArray]] = []
        for key, slot in self._held(rank):
            info, (_, slices) = self.tensors[slot.name], self._grid.slice_of(rank, has_expert_axis(slot.name))
            shape = slice_shape(cut_of(slot.name), info.shape[len(slot.leading) :], slices)
            model[key] = PlannedArray(info.dtype, shape)
            held.append((slot, model[key]))
        content = {"args": self.args, "checkpoint_version": 3.0, "iteration": 0, "model": model}
        plan = plan_object(content)
        file = f"{self._grid.folder(rank)}/{FILE}"
        self._make(file, plan.length, plan.blobs)
        for slot, array in held:
            self._pieces.setdefault(slot, []).extend(
                self._pieces_in(file, plan.offsets[id(array)], slot, rank)
            )

    def _make(self, file: str, length: int, blobs: list[tuple[int, bytes]]) -> None:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb"):
            pass
        self.files.preallocate(file, length)
        for offset, blob in blobs:
            self.files.write(file, offset, blob)

    def _pieces_in(self, file: str, offset: int, slot: Slot, rank: Rank) -> Iterator[Piece]:
        info = self.tensors[slot.name]
        number, slices = self._grid.slice_of(rank, has_expert_axis(slot.name))
        for box in boxes(cut_of(slot.name), info.shape[len(slot.leading) :], number, slices):
            start = offset + box.at * box.cols * info.dtype.itemsize
            yield Piece(file, start, box.rows, box.cols, box.row, box.col)

    def _held(self, rank: Rank) -> Iterator[tuple[str, Slot]]:
        """The keys of the rank's file, each with the part that lies under it."""
        last = self._grid.pipeline - 1
        if rank.pipeline == 0:
            yield EMBEDDING, Slot(EMBEDDING)
        for name, info in self.tensors.items():
            if has_layer_axis(name):
                yield from self._held_of_layers(rank, name, info)
        if rank.pipeline == last:
            yield FINAL_NORM, Slot(FINAL_NORM)
            if OUTPUT in self.tensors:
                yield OUTPUT, Slot(OUTPUT)
            elif last > 0:  # tied: the last stage keeps a copy of the embeddings
                yield OUTPUT, Slot(EMBEDDING)

    def _held_of_layers(self, rank: Rank, name: str, info: TensorInfo) -> Iterator[tuple[str, Slot]]:
        layers = info.shape[0] // self._grid.pipeline
        experts = info.shape[1] // self._grid.expert if has_expert_axis(name) else None
        local = getattr(self.args, "transformer_impl", None) == "local"
        grouped = bool(getattr(self.args, "moe_grouped_gemm", False))
        for layer in range(layers):
            whole = rank.pipeline * layers + layer
            for expert in range(experts) if experts is not None else (None,):
                key = key_of(Slot(name, layer, expert), local, grouped)
                number = None if expert is None or experts is None else rank.expert * experts + expert
                yield key, Slot(name, whole, number)


def check_sizes(tensors: Mapping[str, TensorInfo], args: Any, grid: Grid) -> None:
    """Raise UserError unless every rank gets an equal share."""
    for name, info in tensors.items():
        if has_layer_axis(name) and info.shape[0] % grid.pipeline:
            raise UserError(f"{info.shape[0]} layers do not divide by --target-pipeline-model-parallel-size")
        if has_expert_axis(name) and info.shape[1] % grid.expert:
            raise UserError(f"{info.shape[1]} experts do not divide by --target-expert-model-parallel-size")
        shape = info.shape[has_layer_axis(name) + has_expert_axis(name) :]
        try:
            slice_shape(cut_of(name), shape, grid.tensor)
        except ValueError as error:
            pad = "give --make-vocab-size-divisible-by 128, or " if name in (EMBEDDING, OUTPUT) else ""
            raise UserError(
                f"{name} {list(shape)}: {error}; {pad}choose another tensor-parallel size"
            ) from None
    if grid.expert > 1 and ROUTER not in tensors:
        raise UserError(
            f"--target-expert-model-parallel-size {grid.expert}: a dense model has no experts to spread; "
            "leave it out"
        )
    heads = getattr(args, "num_attention_heads", grid.tensor)
    groups = getattr(args, "num_query_groups", None) or heads
    if heads % grid.tensor or (groups % grid.tensor and grid.tensor % groups):
        raise UserError(
            f"{heads} heads in {groups} groups do not divide by tensor-parallel size {grid.tensor}"
        )


def _args_for(args: Any, grid: Grid, tied: bool) -> Namespace:
    """Megatron's arguments with this layout in them; objects that are no plain values are left out."""
    values = {name: value for name, value in vars(args).items() if _plain(value)}
    values |= dict.fromkeys(_NOT_OF_THIS_LAYOUT)
    values |= {
        "tensor_model_parallel_size": grid.tensor,
        "pipeline_model_parallel_size": grid.pipeline,
        "expert_model_parallel_size": grid.expert,
        "expert_tensor_parallel_size": grid.tensor,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "untie_embeddings_and_output_weights": not tied,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
    }
    return Namespace(**values)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(_plain(key) and _plain(item) for key, item in value.items())
    return type(value) in _PLAIN
