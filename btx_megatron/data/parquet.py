"""Parquet: a document a row, its text in one column. Needs pyarrow (the extra ``parquet``).

The unit of reading is a row group, decoded whole (this column alone) and kept by the process that read it
last: that bounds the memory, and makes reading rows again in order one more pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from btx_megatron.data.records import Record, status
from btx_megatron.errors import UserError


def import_pyarrow(path: Path) -> Any:
    """The package, or a UserError that names the file that needs it."""
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(
            f"{path}: reading it needs pyarrow; install it with pip install 'btx-megatron[parquet]'"
        ) from None


def parts(path: Path) -> list[tuple[int, int]]:
    """Ranges of rows, one a row group. Raises UserError for what is no Parquet file."""
    starts = _row_groups(path, status(path).st_mtime_ns)
    return [(start, stop) for start, stop in pairwise(starts) if stop > start]


def records(path: Path, key: str, start: int, stop: int) -> Iterator[Record]:
    """Rows [start, stop) of column ``key``, which are one row group."""
    changed = status(path).st_mtime_ns
    column = _column(path, changed, key, _group_of(_row_groups(path, changed), start))
    for row in range(start, stop):
        try:
            yield Record(row, 1, _text(column, row - start))
        except UnicodeDecodeError as error:
            yield Record(row, 1, None, f"is not UTF-8 text (byte {error.start}); convert it")


def text_at(path: Path, key: str, start: int, length: int) -> str:
    """The text of row ``start``. Raises ValueError if there is no such row now."""
    changed = status(path).st_mtime_ns
    starts = _row_groups(path, changed)
    group = _group_of(starts, start)
    return _text(_column(path, changed, key, group), start - starts[group])


def _text(column: Any, row: int) -> str:
    """A text; a null is empty. Raises UnicodeDecodeError, a ValueError."""
    return column[row].as_py() or ""


def _group_of(starts: list[int], row: int) -> int:
    """The row group that holds a row. Raises ValueError if there is no such row."""
    for group, (start, stop) in enumerate(pairwise(starts)):
        if start <= row < stop:
            return group
    raise ValueError(f"no row {row}")


@lru_cache(maxsize=8)
def _row_groups(path: Path, changed: int) -> list[int]:
    """First row of each row group, and at the end the number of rows."""
    metadata = _file(path, changed).metadata
    starts = [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return starts


@lru_cache(maxsize=1)
def _file(path: Path, changed: int) -> Any:
    pyarrow = import_pyarrow(path)
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from None


@lru_cache(maxsize=1)
def _column(path: Path, changed: int, key: str, group: int) -> Any:
    """One column of one row group, decoded."""
    pyarrow = import_pyarrow(path)
    file = _file(path, changed)
    names = file.schema_arrow.names
    if key not in names:
        raise UserError(f"{path}: has no column '{key}', only {', '.join(names)}; correct text_key")
    if names.count(key) > 1:
        raise UserError(f"{path}: has {names.count(key)} columns '{key}'; rename one, or correct text_key")
    kind = file.schema_arrow.field(key).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not any(check(value) for check in _string_checks(pyarrow.types)):
        raise UserError(f"{path}: column '{key}' holds {kind}, not strings; correct text_key")
    try:
        return file.read_row_group(group, columns=[key], use_threads=False).column(0)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from None


def _string_checks(types: Any) -> list[Any]:
    return [types.is_string, types.is_large_string, types.is_string_view]


def _damaged(path: Path, error: Exception) -> UserError:
    why = " ".join(str(error).split())[:200]
    return UserError(f"{path}: not a whole Parquet file ({why}); copy it again or exclude it")
