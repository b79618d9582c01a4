"""Documents: what a source of the recipe names, found, ordered, read and counted.

A source's files are found as names only (``locate``) and then read once (``collect``), in an order that
depends on nothing but their names and ``data.random_seed``: the names are sorted by a keyed hash, so the
order is the same on every machine and a new file does not reshuffle the others. A file is one document;
one of JSON lines or Parquet holds many, which stay in the file's order (Megatron shuffles the samples).

Reading once tells what only the text can tell: not UTF-8, empty, the same text as an earlier
document. The text itself is not kept, so a corpus may be larger than memory: whoever needs it reads
the file again (``Document.text``), and a file that changed in between is an error. Docstrings are
the exception, because parsing a package is slow and its docstrings are small.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from btx_megatron.data import records as limits
from btx_megatron.data.docstrings import module_docstrings, module_name
from btx_megatron.data.document import READERS, Document, Place, RecordFormat, read_bytes, text_digest
from btx_megatron.data.json_lines import PACKED
from btx_megatron.data.records import Record, too_large
from btx_megatron.data.workers import Workers
from btx_megatron.errors import UserError
from btx_megatron.recipe import Data, Source


@dataclass(frozen=True)
class Located:
    """A file that was found but not read: its name within the source, and how to read it."""

    name: str
    path: Path
    format: Literal["text", "docstrings"] | RecordFormat = "text"
    text_key: str = ""
    size: int = 0
    """Bytes of the file."""


@dataclass
class Collection:
    """The documents of one source, in order, and how many were left out, by reason."""

    documents: list[Document] = field(default_factory=list)
    skipped: int = 0
    """Bad ones (not UTF-8, not JSON, without the key, ...), with ``on_bad_document: skip``."""
    empty: int = 0
    """Without text: an empty file or line, a null, a module without docstrings."""
    duplicates: int = 0
    """The same text as an earlier document of this source."""


@dataclass(frozen=True)
class _Part:
    """What one task reads: a file, or the records that begin in a range of it."""

    located: Located
    start: int = 0
    stop: int = 0
    ends_file: bool = True


class _Problem(NamedTuple):
    """Why a document cannot be taken. ``record``: its number within the part, None for a whole file."""

    record: int | None
    why: str


_Outcome = Document | _Problem | None
"""None: a document without text."""


def where(domain: str, source: Source) -> str:
    """How an error names a source of the recipe."""
    return f"data.domains '{domain}', source '{source.name}'"


def locate(source: Source, domain: str, random_seed: int) -> list[Located]:
    """Files of ``source`` in their final order, unread.

    Raises UserError for a path that is missing, a package that is not installed, or patterns that
    match nothing.
    """
    root, docstrings = _root(source, domain)
    files = [(root.name, root)] if root.is_file() else list(_walk(root))
    wanted = [(name, path) for name, path in files if _is_wanted(name, source)]
    if docstrings:
        modules = [path for _, path in wanted if path.suffix == ".py"]
        found = [Located(module_name(root, path), path, "docstrings", size=_size(path)) for path in modules]
    else:
        found = [
            Located(name, path, _format(path, source), source.text_key, _size(path)) for name, path in wanted
        ]
    if not found:
        raise UserError(
            f"{where(domain, source)}: none of the {len(files)} files of {source.path} is a document; "
            f"correct include {source.include} or exclude {source.exclude}"
        )
    return sorted(found, key=lambda document: _keyed_hash(random_seed, document.name))


def collect(
    found: list[Located],
    source: Source,
    domain: str,
    data: Data,
    workers: Workers,
    progress: Callable[[int], None],
) -> Collection:
    """Read documents in order until ``source.max_bytes`` of text is reached.

    ``progress`` is told how many bytes of the files are done. Raises UserError, naming file and line or
    byte, for a document that cannot be read under ``on_bad_document: stop``, and for a source without
    any text.
    """
    collection, size, seen = Collection(), 0, set[bytes]()
    for document, problem in _read_all(found, workers, progress):
        if problem is not None:
            if data.on_bad_document == "stop":
                raise UserError(f"{where(domain, source)}: {problem}, or set data.on_bad_document=skip")
            collection.skipped += 1
        elif document is None:
            collection.empty += 1
        elif document.digest in seen:
            collection.duplicates += 1
        else:
            seen.add(document.digest)
            collection.documents.append(document)
            size += document.size
        if source.max_bytes is not None and size >= source.max_bytes:
            break
    if not collection.documents:
        raise UserError(
            f"{where(domain, source)}: no text in {source.path}: {collection.empty} documents are empty, "
            f"{collection.skipped} were skipped; correct path or include"
        )
    return collection


def _format(path: Path, source: Source) -> Literal["text"] | RecordFormat:
    """As the recipe says, or by the file's name."""
    if source.format != "auto":
        return source.format
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".parquet"]:
        return "parquet"
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return "jsonl" if suffixes[-1:] == [".jsonl"] else "text"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a broken link fails when it is read


def _root(source: Source, domain: str) -> tuple[Path, bool]:
    """Folder or file that the path of a source stands for, and whether its docstrings are meant."""
    kind, colon, rest = source.path.partition(":")
    if kind == "package" and colon:
        name, _, below = rest.partition("/")
        root = _package_folder(name, source, domain) / below
    elif kind == "docstrings" and colon:
        name, *below_names = rest.split(".")
        root = _package_folder(name, source, domain).joinpath(*below_names)
    elif kind == "stdlib" and colon:
        root = Path(sysconfig.get_paths()["stdlib"]) / rest
    else:
        root = Path(source.path)
    if not source.path or not root.exists():
        raise UserError(
            f"{where(domain, source)}: path '{source.path}': no such file or folder"
            + (f" ({root})" if str(root) != source.path else "")
            + "; correct the path"
        )
    return root, kind == "docstrings" and bool(colon)


def _package_folder(name: str, source: Source, domain: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise UserError(
            f"{where(domain, source)}: path '{source.path}': Python package '{name}' is not installed; "
            f"install it into this environment or correct the name"
        )
    if not spec.submodule_search_locations:
        raise UserError(
            f"{where(domain, source)}: path '{source.path}': '{name}' is a single module, not a package "
            f"with files; name a package"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _cannot_be_read(error: OSError) -> None:
    raise UserError(
        f"{error.filename}: cannot be read ({error.strerror}); exclude it, or mend its permissions"
    )


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Files below ``root`` with their names relative to it; linked folders are entered, once each."""
    entered: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, onerror=_cannot_be_read, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in files:
            path = Path(folder, name)
            if path.is_file() or path.is_symlink():  # a broken link is found, and fails when read
                yield path.relative_to(root).as_posix(), path


def _is_wanted(name: str, source: Source) -> bool:
    parts = name.split("/")
    included = any(_glob_matches(parts, pattern.split("/")) for pattern in source.include)
    return included and not any(_glob_matches(parts, pattern.split("/")) for pattern in source.exclude)


def _glob_matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a whole relative path matches; ``**`` stands for any number of folders, none included.

    (``PurePath.full_match`` does the same from Python 3.13 on.)
    """
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _glob_matches(parts, pattern[1:]) or (bool(parts) and _glob_matches(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _glob_matches(parts[1:], pattern[1:])


def _keyed_hash(random_seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{random_seed}/".encode() + os.fsencode(name), digest_size=16).digest()


def _read_all(
    found: Iterable[Located], workers: Workers, progress: Callable[[int], None]
) -> Iterator[tuple[Document | None, str | None]]:
    """One pair (document or None where there is no text, problem or None) a document, in order."""
    found = list(found)
    apart = any(located.format != "text" for located in found)  # one read of a file is not worth a task
    parts = (part for located in found for part in _parts(located))
    results = workers.map(_read, parts) if apart else map(_read, parts)
    records = done = 0
    for part, outcomes in results:
        for outcome in outcomes:
            if isinstance(outcome, _Problem):
                line = "" if outcome.record is None else f":{records + outcome.record}"
                yield None, f"{part.located.path}{line} {outcome.why}"
            else:
                yield outcome, None
        if part.ends_file:
            records, done = 0, done + part.located.size
            progress(done)
        else:
            records += len(outcomes)
            progress(done + (part.stop if part.located.format == "jsonl" else 0))  # rows are no bytes


def _parts(located: Located) -> Iterator[_Part]:
    if located.format in ("text", "docstrings"):
        yield _Part(located)
        return
    ranges = READERS[located.format].parts(located.path)
    for start, stop in ranges:
        yield _Part(located, start, stop, ends_file=stop == ranges[-1][1])


def _read(part: _Part) -> tuple[_Part, list[_Outcome]]:
    located = part.located
    if located.format in ("text", "docstrings"):
        return part, [_read_file(located)]
    records = READERS[located.format].records(located.path, located.text_key, part.start, part.stop)
    return part, [_from_record(located, record, number) for number, record in enumerate(records, start=1)]


def _read_file(located: Located) -> _Outcome:
    if located.size > limits.MAX_DOCUMENT_BYTES:
        return _Problem(None, too_large(located.size))
    raw = read_bytes(located.path)
    kept_text = None
    if located.format == "docstrings":
        try:
            kept_text = module_docstrings(raw)
        except ValueError as error:
            return _Problem(None, f"is not a Python module ({error}); leave it out with exclude")
        raw = kept_text.encode("utf-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return _Problem(None, f"is not UTF-8 text (byte {error.start}); convert it")
    if not text.strip():
        return None
    return Document(located.name, located.path, len(raw), text_digest(raw), kept_text)


def _from_record(located: Located, record: Record, number: int) -> _Outcome:
    if record.text is None:
        return _Problem(number, record.problem or "cannot be read")
    if not record.text or record.text.isspace():
        return None
    try:
        raw = record.text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud800"
        return _Problem(number, f"is not UTF-8 text (half a pair of surrogates at {error.start}); mend it")
    if len(raw) > limits.MAX_DOCUMENT_BYTES:
        return _Problem(number, too_large(len(raw)))
    assert located.format in ("jsonl", "parquet")
    place = Place(located.format, located.text_key, record.start, record.length)
    return Document(located.name, located.path, len(raw), text_digest(raw), place=place)
