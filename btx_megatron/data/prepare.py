"""The stage ``prepare``: the text of the domains becomes a tokenizer and token files.

    tokenizer/tokenizer.model                        (or tokenizer.json and tokenizer_config.json)
    train/DOMAIN/SOURCE_text_document.{bin,idx}      what models train on
    held_out/DOMAIN/SOURCE_text_document.{bin,idx}   what they are evaluated on
    statistics.json                                  what the stage returns

The tokenizer is trained on training documents alone, so nothing held out has shaped any model.

A killed stage goes on where it was, source by source (see resume).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx_megatron.data.corpus import Collection, collect, locate, where
from btx_megatron.data.document import Document
from btx_megatron.data.folder import STATISTICS, token_prefix
from btx_megatron.data.indexed import bin_path, idx_path
from btx_megatron.data.resume import Finished, documents_key, reading_key
from btx_megatron.data.split import Sides, Splitter
from btx_megatron.data.tokenize import tokenize
from btx_megatron.data.tokenizer import open_tokenizer, take_tokenizer, train_tokenizer
from btx_megatron.data.workers import Workers
from btx_megatron.errors import UserError
from btx_megatron.estimate import padded_vocab_size
from btx_megatron.recipe import Domain, Recipe, Source
from btx_megatron.tokenizer_json import FILE

Progress = Callable[[str, int, int], None]

SIDES = ("train", "held_out")


@dataclass(frozen=True)
class Prepared:
    """One source, read and split."""

    domain: Domain
    source: Source
    collection: Collection
    sides: Sides


def tokenizer_path(data_folder: Path) -> Path:
    """The tokenizer of a prepared data folder: Hugging Face's or SentencePiece's."""
    folder = data_folder / "tokenizer"
    return folder / FILE if (folder / FILE).exists() else folder / "tokenizer.model"


def _new_tokenizer_path(recipe: Recipe, data_folder: Path) -> Path:
    """Where the recipe's tokenizer goes; another kind's, of an attempt with another recipe, is removed."""
    hugging_face = recipe.tokenizer.tokenizer_type == "HuggingFaceTokenizer"
    wanted, other = (FILE, "tokenizer.model") if hugging_face else ("tokenizer.model", FILE)
    (data_folder / "tokenizer" / other).unlink(missing_ok=True)
    return data_folder / "tokenizer" / wanted


def prepare(recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write tokenizer and token files below ``folder``; ``progress(phase, done, total)`` follows.

    Phases: ``read`` (bytes of files), ``tokenizer`` (0 or 1), ``tokenize`` (bytes of text). Returns
    ``vocab_size``, ``padded_vocab_size`` and ``domains[domain][source]``: ``skipped``, ``empty``,
    ``duplicates``, and for ``train`` and ``held_out`` ``documents``, ``bytes``, ``tokens`` and the
    index's ``idx_sha256``. Raises UserError for whatever is wrong with a source or the tokenizer.
    """
    finished = Finished(folder)
    with Workers(recipe.data.num_workers) as workers:
        prepared = _read_sources(recipe, workers, finished, progress)
        progress("tokenizer", 0, 1)
        _make_tokenizer(recipe, prepared, _new_tokenizer_path(recipe, folder), finished)
        progress("tokenizer", 1, 1)
        domains = _tokenize_sources(prepared, folder, workers, finished, progress)
    vocab_size = open_tokenizer(tokenizer_path(folder)).vocab_size
    padded = padded_vocab_size(vocab_size, recipe.model.make_vocab_size_divisible_by)
    statistics = {"vocab_size": vocab_size, "padded_vocab_size": padded, "domains": domains}
    text = json.dumps(statistics, indent=2) + "\n"
    _remove_others(folder, domains)
    (folder / STATISTICS).write_text(text, encoding="utf-8")
    finished.clear()
    return statistics


def _remove_others(folder: Path, domains: dict[str, dict[str, Any]]) -> None:
    """Remove token files of an attempt with another recipe, and half a file of a killed one."""
    prefixes = [
        token_prefix(folder, s, name, source) for s in SIDES for name in domains for source in domains[name]
    ]
    wanted = {path(prefix) for prefix in prefixes for path in (bin_path, idx_path)}
    for side in SIDES:
        for path in sorted((folder / side).rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif path.is_file() and path not in wanted:
                path.unlink()


def _read_sources(recipe: Recipe, workers: Workers, finished: Finished, progress: Progress) -> list[Prepared]:
    """Every source read and split; missing ones are found before the first document is read."""
    data = recipe.data
    sources = [(domain, source) for domain in data.domains for source in domain.sources]
    found = [locate(source, domain.name, data.random_seed) for domain, source in sources]
    total, before = sum(located.size for files in found for located in files), 0
    splitter = Splitter(data.held_out_fraction, data.random_seed)
    prepared = []
    for (domain, source), files in zip(sources, found, strict=True):

        def report(done: int, before: int = before) -> None:
            progress("read", before + done, total)

        step, key = f"read/{domain.name}/{source.name}", reading_key(files, source, data)
        collection = finished.load_collection(step, key, files) if key else None
        if collection is None:
            collection = collect(files, source, domain.name, data, workers, report)
            if key:
                finished.save_collection(step, key, files, collection)
        before += sum(located.size for located in files)  # those beyond max_bytes are done with, too
        progress("read", before, total)
        sides = splitter.split(collection.documents)
        _check_sides(sides, source, domain.name)
        prepared.append(Prepared(domain, source, collection, sides))
    return prepared


def _check_sides(sides: Sides, source: Source, domain: str) -> None:
    for side, documents in (("train on", sides.train), ("hold out", sides.held_out)):
        if not documents:
            count = len(sides.train) + len(sides.held_out)
            raise UserError(
                f"{where(domain, source)}: no document to {side}: it needs two different ones that no "
                f"earlier source has, and path '{source.path}' gave {count}; cut its files or raise max_bytes"
            )


def _make_tokenizer(recipe: Recipe, prepared: list[Prepared], path: Path, finished: Finished) -> None:
    if recipe.tokenizer.tokenizer_model is not None:
        finished.load("tokenizer", "taken")  # removes the record of one that was trained: its file goes
        take_tokenizer(recipe.tokenizer, path)
        return
    documents = [document for item in prepared for document in item.sides.train]
    weights = [item.source.weight for item in prepared]
    key = documents_key(documents, dataclasses.asdict(recipe.tokenizer), recipe.domain_names, weights)
    if finished.load("tokenizer", key) is None or not path.exists():
        train_tokenizer(_tokenizer_texts(recipe, prepared), recipe.tokenizer, path)
        finished.save("tokenizer", key, {}, [path])


def _tokenizer_texts(recipe: Recipe, prepared: list[Prepared]) -> Iterator[str]:
    """Training text of equal bytes from every domain, shared out within it by the sources' weights."""
    share = recipe.tokenizer.training_bytes / len(recipe.data.domains)
    for item in prepared:
        weights = sum(source.weight for source in item.domain.sources)
        yield from first_bytes(item.sides.train, int(share * item.source.weight / weights))


def first_bytes(documents: list[Document], count: int) -> Iterator[str]:
    """Texts of the first documents, ``count`` bytes in all; the last is cut between two characters."""
    for document in documents:
        if count <= 0:
            return
        yield document.text.encode("utf-8")[:count].decode("utf-8", "ignore")
        count -= document.size


def _tokenize_sources(
    prepared: list[Prepared], folder: Path, workers: Workers, finished: Finished, progress: Progress
) -> dict[str, dict[str, Any]]:
    """The ``domains`` of the statistics."""
    total = sum(document.size for item in prepared for document in item.collection.documents)
    before = 0
    domains: dict[str, dict[str, Any]] = {}
    for item in prepared:
        entry: dict[str, Any] = {
            "skipped": item.collection.skipped,
            "empty": item.collection.empty,
            "duplicates": item.collection.duplicates,
        }
        for side in SIDES:

            def report(done: int, before: int = before) -> None:
                progress("tokenize", before + done, total)

            entry[side] = _tokenize_side(item, side, folder, workers, finished, report)
            before += entry[side]["bytes"]
            progress("tokenize", before, total)
        domains.setdefault(item.domain.name, {})[item.source.name] = entry
    return domains


def _tokenize_side(
    item: Prepared,
    side: str,
    folder: Path,
    workers: Workers,
    finished: Finished,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """Token files of one side of a source, or those that an attempt before made from the same texts."""
    documents: list[Document] = getattr(item.sides, side)
    tokenizer = tokenizer_path(folder)
    prefix = token_prefix(folder, side, item.domain.name, item.source.name)
    step = f"tokenize/{side}/{item.domain.name}/{item.source.name}"
    key = documents_key(documents, open_tokenizer(tokenizer).sha256)
    entry = finished.load(step, key)
    if entry is None or not idx_path(prefix).exists() or not bin_path(prefix).exists():
        counts = tokenize(documents, prefix, tokenizer, workers, report)
        digest = hashlib.sha256(idx_path(prefix).read_bytes()).hexdigest()
        entry = {**dataclasses.asdict(counts), "idx_sha256": digest}
        finished.save(step, key, entry, [bin_path(prefix), idx_path(prefix)])
    return entry
