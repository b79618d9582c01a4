"""A document: where its text lies, how long it is, and a hash that stands for it. Not the text itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from btx_megatron.data import json_lines, parquet
from btx_megatron.errors import UserError

RecordFormat = Literal["jsonl", "parquet"]
READERS = {"jsonl": json_lines, "parquet": parquet}
"""The reader of each format with many documents a file; see records."""


@dataclass(frozen=True, slots=True)
class Place:
    """The address of a document within a file of many; see records.Record."""

    format: RecordFormat
    key: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Document:
    """A document that was read once. ``size``: bytes of UTF-8; ``digest``: hash of the text."""

    name: str
    """The file's name within its source; for docstrings the module's."""
    path: Path
    size: int
    digest: bytes
    kept_text: str | None = None
    place: Place | None = None
    """None: the document is the whole file."""

    @property
    def text(self) -> str:
        """The text. Raises UserError if the file is no longer what was counted and split."""
        if self.kept_text is not None:
            return self.kept_text
        try:
            text = self._read()
            if text_digest(text.encode("utf-8")) == self.digest:
                return text
        except ValueError:  # no longer UTF-8, or no longer JSON
            pass
        raise UserError(f"{self.path}: changed while the data was being prepared; run it again")

    def _read(self) -> str:
        if self.place is None:
            return read_bytes(self.path).decode("utf-8")
        place = self.place
        return READERS[place.format].text_at(self.path, place.key, place.start, place.length)


def text_digest(raw: bytes) -> bytes:
    """Hash that stands for a text: equal texts have equal hashes."""
    return hashlib.blake2b(raw, digest_size=16).digest()


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend or exclude it") from None
