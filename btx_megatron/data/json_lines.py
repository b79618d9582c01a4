"""JSON lines, plain or packed: one object a line, whose ``text_key`` holds the text of a document.

A plain file is read in ranges of a few megabytes, by several processes; a line belongs to the range in
which it begins. A packed one (.gz, .bz2, .xz, .zst) can only be read from its start, so it is one range,
and an address in it counts bytes of the unpacked text. To read documents again in the file's order is
then one more pass over it, because each process keeps its last file open and only moves forward.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from btx_megatron.data import records as limits
from btx_megatron.data.records import Record, status, too_large
from btx_megatron.data.zstandard import open_zstandard
from btx_megatron.errors import UserError

PART_BYTES = 4 * 1024 * 1024
PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": open_zstandard,
}
"""Opens a packed file for reading bytes, by its suffix."""
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)  # bz2 raises OSError


def parts(path: Path) -> list[tuple[int, int]]:
    """Ranges of bytes; one, without end, for a packed file."""
    if path.suffix in PACKED:
        return [(0, 2**63)]
    size = status(path).st_size
    return [(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]


def records(path: Path, key: str, start: int, stop: int) -> Iterator[Record]:
    """The lines that begin in bytes [start, stop). Raises UserError for a file that cannot be read."""
    try:
        with _open(path) as file:
            at = _first_line(file, start, stop)
            while at < stop and (line := _read_line(file)):
                yield (
                    _parse(line, at, key)
                    if isinstance(line, bytes)
                    else Record(at, line, None, too_large(line))
                )
                at += len(line) if isinstance(line, bytes) else line
    except (OSError, *_DAMAGED) as error:
        raise _unreadable(path, error) from None


def text_at(path: Path, key: str, start: int, length: int) -> str:
    """The text of the line that was found there. Raises ValueError if there is another one now."""
    try:
        file = _kept_open(path, status(path).st_mtime_ns)
        file.seek(start)
        record = _parse(file.read(length), start, key)
    except (OSError, *_DAMAGED) as error:
        raise _unreadable(path, error) from None
    if record.text is None:
        raise ValueError(record.problem)
    return record.text


def _first_line(file: IO[bytes], start: int, stop: int) -> int:
    """Move to the first line that begins in [start, stop); ``stop`` if none does."""
    if start == 0:
        return 0
    file.seek(start - 1)
    rest = file.readline(stop - start + 1)  # of a line that began before, without reading all of a giant
    return start - 1 + len(rest) if rest.endswith(b"\n") else stop


def _read_line(file: IO[bytes]) -> bytes | int:
    """The next line; of one that is too long, and is not kept, its length in bytes."""
    limit = 2 * limits.MAX_DOCUMENT_BYTES  # the other keys, and escapes
    line = file.readline(limit)
    if len(line) < limit or line.endswith(b"\n"):
        return line
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(limit)
        length += len(line)
    return length


def _parse(line: bytes, start: int, key: str) -> Record:
    text, problem = _text_of(line, key)
    return Record(start, len(line), text, problem)


def _text_of(line: bytes, key: str) -> tuple[str | None, str | None]:
    if not line.strip():
        return "", None
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 text (byte {error.start} of the line); convert it"
    except json.JSONDecodeError as error:
        return None, f"is not JSON ({error.msg}, character {error.pos + 1}); mend it"
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        return None, f"is not JSON that can be read ({type(error).__name__}); mend it"
    if not isinstance(value, dict):
        return None, f"is a JSON {type(value).__name__}, not an object with a key '{key}'; mend it"
    if key not in value:
        return None, f"has no key '{key}', only {', '.join(sorted(value)) or 'none'}; correct text_key"
    text = value[key]
    if not isinstance(text, str):
        return None, f"has a '{key}' that is no string but {type(text).__name__}; correct text_key"
    return text, None


def _open(path: Path) -> IO[bytes]:
    return PACKED[path.suffix](path) if path.suffix in PACKED else path.open("rb", buffering=1 << 18)


@lru_cache(maxsize=1)
def _kept_open(path: Path, changed: int) -> IO[bytes]:
    """The file that this process read last; ``changed`` (its time) makes a new file of that name another."""
    return _open(path) if path.suffix in PACKED else io.BufferedReader(path.open("rb", buffering=0), 1 << 18)


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, gzip.BadGzipFile):
        return UserError(f"{path}: cannot be read ({error.strerror}); mend or exclude it")
    why = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: damaged ({why}); copy it again or exclude it")
