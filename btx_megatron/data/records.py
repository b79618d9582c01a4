"""A record: one document of a file that holds many (a JSON line, a row of Parquet).

The readers (json_lines, parquet) are modules with the same three functions, so that the corpus need not
know a format:

    parts(path)                      ranges (start, stop) that can be read apart, by several processes
    records(path, key, start, stop)  the records that begin in one range
    text_at(path, key, start, length)  the text of one record again, from its address alone
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from btx_megatron.errors import UserError

MAX_DOCUMENT_BYTES = 2**30
"""Largest document, in bytes of UTF-8: tokenizers and Megatron's index count in 32 bits."""


class Record(NamedTuple):
    """What was found at one address: a text, or why there is none."""

    start: int
    """Byte (of the unpacked file) where the line begins; the row, from 0, in Parquet."""
    length: int
    """Bytes of the line; 1 for a row."""
    text: str | None
    """None where there is a problem."""
    problem: str | None = None
    """What is wrong and what to do, to follow the record's name: ``is not JSON (...); mend it``."""


def status(path: Path) -> os.stat_result:
    """Size and time of a file. Raises UserError if it is not there."""
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or exclude it") from None


def too_large(size: int) -> str:
    """The problem of a document of ``size`` bytes."""
    return f"is a document of {size:,} bytes, and {MAX_DOCUMENT_BYTES:,} is the most; cut it into several"
