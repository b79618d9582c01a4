"""Hugging Face folders, Llama and Mixtral, as an index of pieces: safetensors files, one or many.

The tables below say which rows of which of their tensors make up a part of ours. Rotary embeddings need no
permutation: both rotate halves.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.hf_config import from_hf, to_hf
from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, LAYERS, ROUTER
from btx_megatron.checkpoints.pieces import (
    Files,
    Index,
    Piece,
    TensorInfo,
    bytes_of,
    dtype_name,
    indices_of,
    part_info,
    read_rows,
)
from btx_megatron.checkpoints.safetensors_files import CODES, Stored, read_headers, read_json
from btx_megatron.checkpoints.tokenizer_files import write_tokenizer
from btx_megatron.durable import sync, write_durably
from btx_megatron.errors import UserError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5_000_000_000

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# ours -> theirs, where one tensor is one tensor; {} is the layer
_SAME = {
    _EMBEDDING: "model.embed_tokens.weight",
    _OUTPUT: "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    LAYERS + "self_attention.linear_qkv.layer_norm_weight": "model.layers.{}.input_layernorm.weight",
    LAYERS + "self_attention.linear_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    LAYERS + "mlp.linear_fc1.layer_norm_weight": "model.layers.{}.post_attention_layernorm.weight",
    LAYERS + "pre_mlp_layernorm.weight": "model.layers.{}.post_attention_layernorm.weight",
    LAYERS + "mlp.linear_fc2.weight": "model.layers.{}.mlp.down_proj.weight",
    LAYERS + "mlp.experts.experts.linear_fc2.weight": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
    ROUTER: "model.layers.{}.block_sparse_moe.gate.weight",
}
# ours -> theirs, gate rows and up rows
_GATED = {
    LAYERS + "mlp.linear_fc1.weight": (
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ),
    LAYERS + "mlp.experts.experts.linear_fc1.weight": (
        "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
        "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    ),
}
_THEIR_EMBEDDING, _THEIR_OUTPUT = _SAME[_EMBEDDING], _SAME[_OUTPUT]
_TIED_ROWS = 64  # compared where a tied model stores its head, too
_QKV = LAYERS + "self_attention.linear_qkv.weight"
_QKV_PARTS = tuple(f"model.layers.{{}}.self_attn.{letter}_proj.weight" for letter in "qkv")


@dataclass(frozen=True)
class Segment:
    """Rows of one of their tensors, and where they lie in our part."""

    tensor: str
    first: int
    rows: int
    at: int


def segments(name: str, index: Index, rows: int, config: ModelConfig) -> Iterator[Segment]:
    """What our part of ``rows`` rows is made of. The QKV matrix is packed by groups: queries, key, value."""
    if name in _GATED:
        for half, tensor in enumerate(_GATED[name]):
            yield Segment(tensor.format(*index), 0, rows // 2, half * (rows // 2))
    elif name == _QKV:
        width = config.kv_channels
        queries = config.num_attention_heads // config.num_query_groups * width
        at = 0
        for group in range(config.num_query_groups):
            for tensor, count in zip(_QKV_PARTS, (queries, width, width), strict=True):
                yield Segment(tensor.format(*index), group * count, count, at)
                at += count
    else:
        yield Segment(_SAME[name].format(*index), 0, rows, 0)


def our_tensors(config: ModelConfig, vocabulary: int, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """The weights of a model in our names."""
    head = config.num_attention_heads * config.kv_channels
    sizes = {"L": config.num_layers, "V": vocabulary, "H": config.hidden_size, "F": config.ffn_hidden_size}
    sizes |= {"2F": 2 * sizes["F"], "D": head, "Q": head + 2 * config.num_query_groups * config.kv_channels}
    tensors = {}
    for name, (kind, legend) in DENSE.items():
        if name == _OUTPUT and config.tied:
            continue
        shape = tuple(sizes[letter] for letter in legend.split())
        if config.num_experts is None:
            tensors[name] = TensorInfo(shape, dtype)
            continue
        if kind == "feed_forward":
            shape = (shape[0], config.num_experts, *shape[1:])
        tensors[DENSE_TO_MOE.get(name, name)] = TensorInfo(shape, dtype)
    if config.num_experts is not None:
        tensors[ROUTER] = TensorInfo((sizes["L"], config.num_experts, sizes["H"]), dtype)
    return dict(sorted(tensors.items()))


# reading


class HuggingFaceCheckpoint:
    """The weights of a folder with ``config.json`` and safetensors files.

    Raises UserError for a file that is missing or damaged, a model that is no plain Llama or Mixtral, and a
    tensor that is missing, unknown, or of another shape than the configuration says.
    """

    def __init__(self, path: Path) -> None:
        self.folder = Path(path)
        raw = read_json(self.folder / CONFIG)
        self.config = from_hf(raw, str(self.folder / CONFIG))
        self.files = Files(self.folder)
        self._stored = self._read_headers()
        self._check_config()
        self._check_tied()
        first = self._stored.get("model.norm.weight") or next(iter(self._stored.values()))
        vocabulary = self._stored[_THEIR_EMBEDDING].shape[0]
        self.tensors = our_tensors(self.config, vocabulary, first.dtype)
        self._account()

    def _read_headers(self) -> dict[str, Stored]:
        stored = read_headers(self.folder, INDEX, WEIGHTS)
        return {key: value for key, value in stored.items() if not key.endswith("rotary_emb.inv_freq")}

    def _check_config(self) -> None:
        """Vocabulary and depth are those of the files, before anything is done as often as they say."""
        embedding, said = self._stored.get(_THEIR_EMBEDDING), self.config
        if embedding is None:
            raise UserError(f"{self.folder}: {_THEIR_EMBEDDING} is missing; restore the files")
        if embedding.shape[:1] != (said.vocab_size,):
            raise UserError(
                f"{self.folder / CONFIG}: vocab_size is {said.vocab_size}, {_THEIR_EMBEDDING} is "
                f"{list(embedding.shape)}; correct it"
            )
        if said.num_layers * (said.num_experts or 1) > len(self._stored):
            raise UserError(
                f"{self.folder / CONFIG}: num_hidden_layers is {said.num_layers}, of which "
                f"{len(self._stored)} tensors are not enough; correct it"
            )

    def _check_tied(self) -> None:
        """Some writers store the head of a tied model, too: then it must be the embedding."""
        head = self._stored.get(_THEIR_OUTPUT)
        if not self.config.tied or head is None:
            return
        if not self._same_rows(head, self._stored[_THEIR_EMBEDDING]):
            raise UserError(
                f"{self.folder}: {_THEIR_OUTPUT} is not the embedding, and {CONFIG} says that they are tied; "
                "correct tie_word_embeddings"
            )
        del self._stored[_THEIR_OUTPUT]

    def _same_rows(self, one: Stored, other: Stored) -> bool:
        """Compare two matrices; where they have many rows, about ``_TIED_ROWS`` of them."""
        if (one.shape, one.dtype) != (other.shape, other.dtype) or len(one.shape) != 2:
            return False
        (rows, cols), info = one.shape, TensorInfo(one.shape, one.dtype)

        def row_of(place: Stored, row: int) -> memoryview:
            piece = Piece(place.file, place.offset, rows, cols)
            return bytes_of(read_rows(self.files, [piece], info, row, row + 1))

        return all(
            row_of(one, row) == row_of(other, row) for row in range(0, rows, max(1, rows // _TIED_ROWS))
        )

    def _account(self) -> None:
        """Every tensor of theirs is used once, whole, and is what the configuration says."""
        used: dict[str, int] = {}
        for name, info in self.tensors.items():
            for index in indices_of(name, info):
                part = part_info(info, index)
                for segment in segments(name, index, part.shape[0], self.config):
                    found = self._stored.get(segment.tensor)
                    if found is None:
                        raise UserError(f"{self.folder}: {segment.tensor} is missing; restore the files")
                    dims = len(found.shape)
                    if (found.dtype, dims, found.shape[1:]) != (info.dtype, len(part.shape), part.shape[1:]):
                        raise UserError(
                            f"{self.folder}: {segment.tensor} is {_shown(found.shape, found.dtype)}; the "
                            f"model needs rows of {_shown(part.shape[1:], info.dtype)}"
                        )
                    used[segment.tensor] = used.get(segment.tensor, 0) + segment.rows
        for name, found in self._stored.items():
            if name not in used:
                raise UserError(f"{self.folder}: no rule for {name}; a plain Llama or Mixtral is needed")
            if used[name] != found.shape[0]:
                raise UserError(
                    f"{self.folder}: {name} has {found.shape[0]} rows, {CONFIG} says {used[name]}; correct it"
                )

    def pieces(self, name: str, index: Index) -> list[Piece]:
        """Where the part of ``name`` at leading indices (layer, expert) lies."""
        info = part_info(self.tensors[name], index)
        cols = info.shape[1] if len(info.shape) == 2 else 1
        return [
            _piece(
                self._stored[segment.tensor].file,
                self._stored[segment.tensor].offset,
                segment,
                cols,
                info.dtype,
            )
            for segment in segments(name, index, info.shape[0], self.config)
        ]


def _piece(file: str, offset: int, segment: Segment, cols: int, dtype: torch.dtype) -> Piece:
    return Piece(file, offset + segment.first * cols * dtype.itemsize, segment.rows, cols, row=segment.at)


def _shown(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {dtype_name(dtype)}"


# writing


class HuggingFaceLayout:
    """A folder to be, laid out and preallocated: Llama, or Mixtral with the classic names.

    ``tensors`` are ours, the vocabulary without Megatron's padding. ``folder`` must be new or empty.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
        self.folder, self.config, self.tensors = folder, config, dict(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        self.dtype = self.tensors[_EMBEDDING].dtype
        self.files = Files(folder, os.O_RDWR | os.O_CREAT)
        shapes = self._their_shapes()
        self._places: dict[str, tuple[str, int]] = {}
        self._size = 0
        shards = _cut_in_shards(shapes, self.dtype)
        for number, names in enumerate(shards):
            file = WEIGHTS if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            self._lay_out(file, {name: shapes[name] for name in names})

    def _their_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, info in self.tensors.items():
            for index in indices_of(name, info):
                part_rows, *cols = part_info(info, index).shape
                for segment in segments(name, index, part_rows, self.config):
                    rows = shapes.get(segment.tensor, (0,))[0]
                    shapes[segment.tensor] = (max(rows, segment.first + segment.rows), *cols)
        return dict(sorted(shapes.items(), key=lambda item: _reading_order(item[0])))

    def _lay_out(self, file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + torch.Size(shape).numel() * self.dtype.itemsize
            header[name] = {"dtype": CODES[self.dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        self.files.preallocate(file, begin + end)
        self.files.write(file, 0, struct.pack("<Q", len(text)) + text)
        self._size += end
        for name in shapes:
            self._places[name] = (file, begin + header[name]["data_offsets"][0])

    def pieces(self, name: str, index: Index) -> list[Piece]:
        """Where to write the part of ``name`` at leading indices (layer, expert)."""
        info = part_info(self.tensors[name], index)
        cols = info.shape[1] if len(info.shape) == 2 else 1
        return [
            _piece(*self._places[segment.tensor], segment, cols, info.dtype)
            for segment in segments(name, index, info.shape[0], self.config)
        ]

    def finish(self, tokenizer_files: Mapping[str, bytes], approximate: Sequence[str] = ()) -> None:
        """Bring the weights to disk; then the index, the tokenizer, and ``config.json`` last.

        ``approximate``: what of the model Mixtral cannot say, for whoever reads ``config.json``.
        """
        self.files.sync()
        self.files.close()
        files = {file for file, _ in self._places.values()}
        if len(files) > 1:
            weight_map = {name: file for name, (file, _) in self._places.items()}
            index = {"metadata": {"total_size": self._size}, "weight_map": weight_map}
            write_durably(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        write_tokenizer(self.folder, tokenizer_files)
        content = to_hf(self.config, self.tensors[_EMBEDDING].shape[0], dtype_name(self.dtype))
        if approximate:
            content["btx_approximate"] = list(approximate)
        write_durably(self.folder / CONFIG, json.dumps(content, indent=2) + "\n")
        sync(self.folder)


def _reading_order(name: str) -> tuple[int, str]:
    """Layer by layer, as a model is loaded: embedding first, head last."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return int(parts[2]) + 1, name
    return (0 if name == _SAME[_EMBEDDING] else 1 << 30), name


def _cut_in_shards(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if used and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
