"""What a killed ``prepare`` had finished: small records in ``.resume`` of its folder, gone at its end.

A step is finished once its record lies there, and the record says from what it was made (its key: hashes
of all that went in). A step whose key is another now is done again, so neither a changed recipe nor
changed text can meet old results; a record is written after its files are on disk. The bytes at the end
are those of a run without interruption.

Steps are: a source read (records: its documents, without their text), the tokenizer, and one side of a
source tokenized. Docstrings, whose text is kept in memory, are always read again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from btx_megatron import __version__
from btx_megatron.data.corpus import Collection, Located
from btx_megatron.data.document import Document, Place
from btx_megatron.durable import sync, write_durably
from btx_megatron.recipe import Data, Source

FOLDER = ".resume"
_COUNTS = ("skipped", "empty", "duplicates")


class Finished:
    """The records of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER

    def load(self, step: str, key: str) -> dict[str, Any] | None:
        """What the step gave, if it was finished from the same things; ``step`` is a relative path.

        Any other record is removed: the step's files are about to be replaced.
        """
        try:
            record = json.loads(self._path(step).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            record = {}
        if record.get("key") == key:
            return record["result"]
        self._path(step).unlink()
        return None

    def save(self, step: str, key: str, result: dict[str, Any], files: Iterable[Path] = ()) -> None:
        """Write that a step is finished, once ``files`` are on disk."""
        for file in files:
            sync(file)
        self._path(step).parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._path(step), json.dumps({"key": key, "result": result}))

    def load_collection(self, step: str, key: str, found: list[Located]) -> Collection | None:
        """The documents of a source that was read."""
        counts = self.load(step, key)
        if counts is None:
            return None
        try:
            table = np.load(self._array(step), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        documents = [_document(found[row["file"]], row) for row in table]
        return Collection(documents, **counts)

    def save_collection(self, step: str, key: str, found: list[Located], collection: Collection) -> None:
        """Write down the documents of a source."""
        numbers = {located.path: number for number, located in enumerate(found)}
        table = np.array([_row(numbers[d.path], d) for d in collection.documents], dtype=_ROW)
        self._array(step).parent.mkdir(parents=True, exist_ok=True)
        with self._array(step).open("wb") as file:
            np.save(file, table)
        self.save(step, key, {name: getattr(collection, name) for name in _COUNTS}, [self._array(step)])

    def clear(self) -> None:
        """Remove all records: everything is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, step: str) -> Path:
        return self._folder / f"{step}.json"

    def _array(self, step: str) -> Path:
        return self._folder / f"{step}.npy"


_ROW = np.dtype([("file", "<i8"), ("start", "<i8"), ("length", "<i8"), ("size", "<i8"), ("digest", "V16")])
_WHOLE_FILE = -1  # as length


def _row(file: int, document: Document) -> tuple[int, int, int, int, bytes]:
    place = document.place
    start, length = (place.start, place.length) if place else (0, _WHOLE_FILE)
    return file, start, length, document.size, document.digest


def _document(located: Located, row: Any) -> Document:
    place = None
    if row["length"] != _WHOLE_FILE:
        assert located.format in ("jsonl", "parquet")
        place = Place(located.format, located.text_key, int(row["start"]), int(row["length"]))
    return Document(located.name, located.path, int(row["size"]), row["digest"].tobytes(), place=place)


def hash_of(*parts: Any) -> str:
    """Hash of plain values, and of the version of this package."""
    return hashlib.sha256(json.dumps([__version__, *parts], sort_keys=True).encode()).hexdigest()


def reading_key(found: list[Located], source: Source, data: Data) -> str | None:
    """What the reading of a source depends on; None where it is not to be recorded."""
    if any(located.format == "docstrings" for located in found):
        return None
    chosen = {name: value for name, value in asdict(source).items() if name != "weight"}
    files = [(d.name, str(d.path), d.format, d.size, _changed(d.path)) for d in found]
    return hash_of(chosen, data.random_seed, data.on_bad_document, files)


def documents_key(documents: list[Document], *more: Any) -> str:
    """Hash of the documents' texts, in order, and of ``more``."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.digest)
    return hash_of(digest.hexdigest(), *more)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
