"""The stage ``prepare``: the text of the domains becomes a tokenizer and token files.

    tokenizer/tokenizer.model
    train/DOMAIN/SOURCE_text_document.{bin,idx}      what models train on
    held_out/DOMAIN/SOURCE_text_document.{bin,idx}   what they are evaluated on
    statistics.json                                  what the stage returns

The tokenizer is trained on training documents alone, so nothing held out has shaped any model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btx_megatron.data.corpus import Collection, Document, collect, locate, where
from btx_megatron.data.indexed import idx_path
from btx_megatron.data.split import Sides, Splitter
from btx_megatron.data.tokenize import tokenize
from btx_megatron.data.tokenizer import Tokenizer, padded_vocab_size, take_tokenizer, train_tokenizer
from btx_megatron.data.workers import Workers
from btx_megatron.errors import UserError
from btx_megatron.recipe import Domain, Recipe, Source

Progress = Callable[[str, int, int], None]

STATISTICS = "statistics.json"
SIDES = ("train", "held_out")


@dataclass(frozen=True)
class Prepared:
    """One source, read and split."""

    domain: Domain
    source: Source
    collection: Collection
    sides: Sides


def tokenizer_path(data_folder: Path) -> Path:
    """The tokenizer of a prepared data folder."""
    return data_folder / "tokenizer" / "tokenizer.model"


def token_prefix(data_folder: Path, side: str, domain: str, source: str) -> Path:
    """Path of a source's token files without ``.bin`` and ``.idx``; ``side``: train or held_out."""
    return data_folder / side / domain / f"{source}_text_document"


def read_statistics(data_folder: Path) -> dict[str, Any]:
    """What ``prepare`` returned for this folder. Raises UserError if it is not a prepared one."""
    try:
        return json.loads((data_folder / STATISTICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{data_folder / STATISTICS}: no prepared data here; run `btx prepare`") from None


def prepare(recipe: Recipe, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write tokenizer and token files below ``folder``; ``progress(phase, done, total)`` follows.

    Phases: ``read`` (documents), ``tokenizer`` (0 or 1), ``tokenize`` (bytes of text). Returns
    ``vocab_size``, ``padded_vocab_size`` and ``domains[domain][source]``: ``skipped``, ``empty``,
    ``duplicates``, and for ``train`` and ``held_out`` ``documents``, ``bytes``, ``tokens`` and the
    index's ``idx_sha256``. Raises UserError for whatever is wrong with a source or the tokenizer.
    """
    with Workers(recipe.data.num_workers) as workers:
        prepared = _read_sources(recipe, workers, progress)
        progress("tokenizer", 0, 1)
        _make_tokenizer(recipe, prepared, tokenizer_path(folder))
        progress("tokenizer", 1, 1)
        domains = _tokenize_sources(prepared, folder, workers, progress)
    vocab_size = Tokenizer(tokenizer_path(folder)).vocab_size
    padded = padded_vocab_size(vocab_size, recipe.model.make_vocab_size_divisible_by)
    statistics = {"vocab_size": vocab_size, "padded_vocab_size": padded, "domains": domains}
    text = json.dumps(statistics, indent=2) + "\n"
    (folder / STATISTICS).write_text(text, encoding="utf-8")
    return statistics


def _read_sources(recipe: Recipe, workers: Workers, progress: Progress) -> list[Prepared]:
    """Every source read and split; missing ones are found before the first document is read."""
    data = recipe.data
    sources = [(domain, source) for domain in data.domains for source in domain.sources]
    found = [locate(source, domain.name, data.random_seed) for domain, source in sources]
    total, before = sum(map(len, found)), 0
    splitter = Splitter(data.held_out_fraction, data.random_seed)
    prepared = []
    for (domain, source), documents in zip(sources, found, strict=True):

        def report(done: int, before: int = before) -> None:
            progress("read", before + done, total)

        collection = collect(documents, source, domain.name, data, workers, report)
        before += len(documents)  # those beyond max_bytes are done with, too
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


def _make_tokenizer(recipe: Recipe, prepared: list[Prepared], path: Path) -> None:
    if recipe.tokenizer.tokenizer_model is not None:
        take_tokenizer(recipe.tokenizer, path)
    else:
        train_tokenizer(_tokenizer_texts(recipe, prepared), recipe.tokenizer, path)


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
    prepared: list[Prepared], folder: Path, workers: Workers, progress: Progress
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

            prefix = token_prefix(folder, side, item.domain.name, item.source.name)
            documents = getattr(item.sides, side)
            counts = tokenize(documents, prefix, tokenizer_path(folder), workers, report)
            before += counts.bytes
            digest = hashlib.sha256(idx_path(prefix).read_bytes()).hexdigest()
            entry[side] = {**dataclasses.asdict(counts), "idx_sha256": digest}
        domains.setdefault(item.domain.name, {})[item.source.name] = entry
    return domains
