"""The files of a legacy checkpoint, opened: which slice of which weight lies where.

Every rank's file is read once, without its tensors. What it calls layer 0 or expert 0 gets the number that it
has in the whole model. Nothing is skipped in silence: a key that is no known weight, a rank without a file, a
file from another layout are errors that name file and key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from btx_megatron.checkpoints.legacy_layout import (
    FILE,
    Grid,
    Rank,
    Slot,
    cut_of,
    first_layers,
    grid_of,
    is_state,
    parse_key,
)
from btx_megatron.checkpoints.names import has_expert_axis
from btx_megatron.checkpoints.torch_zip import StoredArray, read_object
from btx_megatron.checkpoints.tracker import find_checkpoint
from btx_megatron.errors import UserError

_OLDEST = 2.0
"""First version with today's order of q/k/v rows: checkpointing.py, fix_query_key_value_ordering."""
_MODEL_KEY = re.compile(r"model\d*")


@dataclass(frozen=True)
class Stored:
    """A slice of a part in a file."""

    file: str
    """Relative to the checkpoint's folder."""
    key: str
    array: StoredArray


Chunk = dict[Slot, Stored]
"""A model chunk of one file; slots have the file's own numbers."""


@dataclass(frozen=True)
class Shards:
    """All files of a checkpoint."""

    args: SimpleNamespace
    """As Megatron saved them."""
    grid: Grid
    parts: dict[Slot, dict[int, list[Stored]]] = field(default_factory=dict)
    """Part -> number of the slice -> where it lies: in more than one file if ranks hold the same slice."""


def find_legacy(path: Path) -> Path:
    """The folder with the ``mp_rank_*`` folders: ``path`` itself, or the one that its tracker names.

    Raises UserError if there is none.
    """
    folder = path if any(path.glob("mp_rank_*")) else find_checkpoint(path)
    if not any(folder.glob(f"mp_rank_*/{FILE}")):
        raise UserError(f"{folder}: no legacy Megatron checkpoint there (no mp_rank_*/{FILE})")
    return folder


def read_shards(folder: Path) -> Shards:
    """Open every rank's file. Raises UserError: see the module's text."""
    any_file = min(folder.glob(f"mp_rank_*/{FILE}"))
    args = _args_of(_read(any_file), any_file)
    grid = grid_of(args, str(any_file))
    shards = Shards(args, grid)
    chunks = _read_chunks(folder, grid)
    first = first_layers(_layer_counts(folder, grid, chunks))
    for rank, of_rank in chunks.items():
        for slot, stored in _placed(folder, rank, of_rank, first):
            number, _ = grid.slice_of(rank, has_expert_axis(slot.name))
            copies = shards.parts.setdefault(slot, {})
            copies.setdefault(0 if cut_of(slot.name) == "whole" else number, []).append(stored)
    return shards


def _read(path: Path) -> dict[str, Any]:
    content = read_object(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint; restore the file")
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < _OLDEST:
        raise UserError(f"{path}: checkpoint_version {version} is too old; load and save it in Megatron-LM")
    return content


def _args_of(content: dict[str, Any], path: Path) -> SimpleNamespace:
    args = content.get("args")
    if not isinstance(args, SimpleNamespace):
        raise UserError(f"{path}: holds no arguments (args), which tell how the model is cut; save it again")
    if getattr(args, "moe_mlp_glu_interleave_size", None):
        raise UserError(
            f"{path}: gate and up rows are interleaved (moe_mlp_glu_interleave_size); not supported"
        )
    return args


def _read_chunks(folder: Path, grid: Grid) -> dict[Rank, list[Chunk]]:
    chunks = {}
    for rank in grid.ranks():
        file = f"{grid.folder(rank)}/{FILE}"
        content = _read(folder / file)
        if grid_of(_args_of(content, folder / file), str(folder / file)) != grid:
            raise UserError(
                f"{folder / file}: was saved under another layout than the rest; restore the file"
            )
        chunks[rank] = _chunks_of(folder, file, content, grid.virtual)
    extra = {path.parent.name for path in folder.glob(f"mp_rank_*/{FILE}")} - set(map(grid.folder, chunks))
    if extra:
        raise UserError(f"{folder / min(extra)}: not of the layout that the saved arguments tell; remove it")
    return chunks


def _chunks_of(folder: Path, file: str, content: dict[str, Any], virtual: int) -> list[Chunk]:
    expected = ["model"] if virtual == 1 else [f"model{number}" for number in range(virtual)]
    found = {key for key in content if isinstance(key, str) and _MODEL_KEY.fullmatch(key)}
    if found != set(expected):
        names = ", ".join(sorted(found)) or "no model"
        raise UserError(f"{folder / file}: holds {names}, not {', '.join(expected)}; restore the file")
    return [_chunk(folder, file, content[key]) for key in expected]


def _chunk(folder: Path, file: str, state: Any) -> Chunk:
    if not isinstance(state, dict):
        raise UserError(f"{folder / file}: its model is a {type(state).__name__}; restore the file")
    moe = any(".mlp.router." in str(key) for key in state)
    chunk: Chunk = {}
    for key, value in state.items():
        if is_state(str(key)):
            continue
        slot = parse_key(str(key), moe)
        if slot is None or not isinstance(value, StoredArray):
            raise UserError(f"{folder / file}: {key} is not a weight known here{_hint(str(key))}")
        if slot in chunk:
            raise UserError(
                f"{folder / file}: {key} and {chunk[slot].key} are the same weight; restore the file"
            )
        chunk[slot] = Stored(file, str(key), value)
    return chunk


def _hint(key: str) -> str:
    if re.search(r"\.mlp\.experts\.weight[12]$", key):
        return ": old grouped experts lie transposed; load and save it with sequential experts"
    if key == "language_model":
        return ": a model from before Megatron-Core; convert it in Megatron-LM first"
    return "; only Llama-shaped models without biases are read"


def _layer_counts(folder: Path, grid: Grid, chunks: dict[Rank, list[Chunk]]) -> dict[tuple[int, int], int]:
    """Layers in each (chunk, stage); every rank of a stage must hold the same ones."""
    counts: dict[tuple[int, int], int] = {}
    for rank, of_rank in chunks.items():
        for number, chunk in enumerate(of_rank):
            layers = {slot.layer for slot in chunk if slot.layer is not None}
            count = counts.setdefault((number, rank.pipeline), len(layers))
            if layers != set(range(count)):
                raise UserError(
                    f"{folder / grid.folder(rank) / FILE}: holds layers {sorted(layers)} of its stage, where"
                    f" {count} from 0 on are expected; restore the file"
                )
    return counts


def _placed(
    folder: Path, rank: Rank, chunks: list[Chunk], first: dict[tuple[int, int], int]
) -> Iterator[tuple[Slot, Stored]]:
    """What a file holds, with layers and experts numbered as in the whole model."""
    for number, chunk in enumerate(chunks):
        experts = {slot.expert for slot in chunk if slot.expert is not None}
        if experts != set(range(len(experts))):
            file = next(iter(chunk.values())).file
            raise UserError(f"{folder / file}: holds experts {sorted(experts)} of its rank; restore the file")
        for slot, stored in chunk.items():
            layer = None if slot.layer is None else first[number, rank.pipeline] + slot.layer
            expert = None if slot.expert is None else rank.expert * len(experts) + slot.expert
            yield Slot(slot.name, layer, expert), stored
