"""The stage ``cluster`` of c-BTM: the training documents of all domains, dealt out to clusters.

    train/cluster0/text_text_document.{bin,idx}     token files, as prepare writes them; what experts train on
    clusters.json, clusters.npz                     the clusters (see cluster_files)
    statistics.json                                 as prepare's, and what domains the text is from
    tokenizer/                                      the run's

Every training document goes to one cluster, whole and in its order; no held-out document to any. Labels of
domains play no part in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from btx_megatron.data.folder import STATISTICS, read_statistics, token_prefix
from btx_megatron.data.indexed import IndexedTokens, IndexedWriter, Tokens, idx_path
from btx_megatron.data.prepare import tokenizer_path
from btx_megatron.data.tokenizer import AnyTokenizer, open_tokenizer
from btx_megatron.ensembles.balanced import Labels
from btx_megatron.ensembles.cluster_files import load_clusters, save_clusters
from btx_megatron.ensembles.clusters import Clusters, deal, fit_clusters
from btx_megatron.errors import UserError
from btx_megatron.recipe import Recipe

TEXT_TOKENS = 8192
"""What is looked at of a document: its first tokens."""


def cluster_documents(recipe: Recipe, data_folder: Path, folder: Path) -> None:
    """Write the stage's files. Raises UserError where there are fewer documents than clusters."""
    wanted, names = recipe.clusters, recipe.cluster_names
    statistics = read_statistics(data_folder)
    texts = _Texts(data_folder, statistics["domains"], open_tokenizer(tokenizer_path(data_folder)))
    if len(texts) < len(names):
        raise UserError(
            f"clusters.number {len(names)}: there are {len(texts)} training documents; lower it, or give more"
        )
    clusters = fit_clusters(texts, len(names), wanted.random_seed, wanted.dimensions)
    labels = deal(clusters, texts, wanted.random_seed)
    _write_tokens(texts, labels, names, folder)
    save_clusters(clusters, folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(data_folder / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    content = {
        "vocab_size": statistics["vocab_size"],
        "padded_vocab_size": statistics["padded_vocab_size"],
        "domains": {name: {"text": {"train": _counts(folder, name)}} for name in names},
        "documents_of": _documents_of(texts, labels, names),
    }
    (folder / STATISTICS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_found(folder: Path) -> tuple[Clusters, dict[str, dict[str, int]]]:
    """The clusters of a finished stage, and how many documents of each domain (by name) each of them has."""
    return load_clusters(folder), read_statistics(folder)["documents_of"]


def _write_tokens(texts: _Texts, labels: Labels, names: list[str], folder: Path) -> None:
    dtype = texts.tokens(0).dtype
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(token_prefix(folder, "train", name, "text"), dtype))
            for name in names
        ]
        for number, label in enumerate(labels.tolist()):
            tokens = texts.tokens(number)
            writers[label].add(tokens, [len(tokens)])


def _counts(folder: Path, name: str) -> dict[str, Any]:
    prefix = token_prefix(folder, "train", name, "text")
    written = IndexedTokens(prefix)
    digest = hashlib.sha256(idx_path(prefix).read_bytes()).hexdigest()
    return {"documents": len(written), "tokens": written.total_tokens, "idx_sha256": digest}


def _documents_of(texts: _Texts, labels: Labels, names: list[str]) -> dict[str, dict[str, int]]:
    pairs = Counter(zip(labels.tolist(), (place.domain for place in texts.places), strict=True))
    return {name: {d: n for (k, d), n in pairs.items() if k == label} for label, name in enumerate(names)}


@dataclass(frozen=True)
class _Place:
    domain: str
    reader: IndexedTokens
    number: int


class _Texts(Sequence[str]):
    """The beginnings of all training documents, decoded when they are asked for: a corpus need not fit."""

    def __init__(self, data_folder: Path, domains: dict[str, Any], tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer
        self.places = [
            _Place(domain, reader, number)
            for domain, sources in domains.items()
            for source in sources
            for reader in [IndexedTokens(token_prefix(data_folder, "train", domain, source))]
            for number in range(len(reader))
        ]

    def tokens(self, number: int) -> Tokens:
        """A whole document, its eod at the end."""
        place = self.places[number]
        return place.reader[place.number]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return self._tokenizer.decode(self.tokens(number)[:-1][:TEXT_TOKENS].tolist())
