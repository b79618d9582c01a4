"""Safetensors files by their headers alone: which tensors lie in them, and where.

A file is 8 bytes of length, a JSON header and the values. Headers come from strangers: whatever they say is
held against the file's size, and the tensors must fill it without holes or overlap, as the format demands.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from btx_megatron.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Stored:
    """A tensor of a file."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def length(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UserError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); restore it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; restore it")
    return content


def read_header(folder: Path, name: str) -> dict[str, Stored]:
    """The tensors of one file, by name. Raises UserError for one that is missing or damaged."""
    path = folder / name
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("its header is longer than it is")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        stored = {key: _entry(name, 8 + length, entry) for key, entry in header.items()}
        _check_tiling(stored, 8 + length, size)
        return stored
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); restore it") from None


def _check_tiling(stored: Mapping[str, Stored], begin: int, size: int) -> None:
    """The format allows no holes and no overlap: a header that is wrong anywhere shows here."""
    at = begin
    for offset, length in sorted((entry.offset, entry.length) for entry in stored.values()):
        if offset != at:
            raise ValueError("its tensors overlap, or there is a hole between them")
        at += length
    if at != size:
        raise ValueError("it is cut short, or its header lies")


def _entry(file: str, begin: int, entry: dict[str, Any]) -> Stored:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"values of type {entry['dtype']} are not supported")
    dtype = DTYPES[entry["dtype"]]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("a size is negative, or no number")
    stored = Stored(file, begin + start, shape, dtype)
    if stop - start != stored.length:
        raise ValueError("its header lies about a tensor's size")
    return stored


def read_headers(folder: Path, index: str, single: str) -> dict[str, Stored]:
    """The tensors of a model by name: of the files that its index names, or of the single file without one.

    Raises UserError for a file that is missing or damaged, and for a tensor that two files hold, those beside
    the named ones too: another program may read the other one.
    """
    names = shard_names(folder / index) if (folder / index).exists() else [single]
    stored: dict[str, Stored] = {}
    for name in names:
        found = read_header(folder, name)
        _check_once(folder, stored, found)
        stored |= found
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in names:
            _check_once(folder, stored, _any_header(folder, path.name))
    return stored


def _any_header(folder: Path, name: str) -> dict[str, Stored]:
    """The tensors of a file that need not be read; none where it is none of ours."""
    try:
        return read_header(folder, name)
    except UserError:
        return {}


def _check_once(folder: Path, stored: Mapping[str, Stored], more: Mapping[str, Stored]) -> None:
    for name in sorted(set(stored) & set(more)):
        raise UserError(
            f"{folder}: {name} lies in {stored[name].file} and in {more[name].file}; delete the one that is "
            "not the model's"
        )


def shard_names(index: Path) -> list[str]:
    """The files that an index (``model.safetensors.index.json``) names. Raises UserError."""
    weight_map = read_json(index).get("weight_map")
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not files or not all(isinstance(file, str) for file in files):
        raise UserError(f"{index}: its weight_map does not name a file for every tensor; restore it")
    return sorted({Path(file).name for file in files})
