"""Documents to token files, over processes: the same bytes whatever the number of processes.

A task is a run of consecutive documents of about half a megabyte; the workers read and encode, this
process writes their results in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btx_megatron.data.document import Document
from btx_megatron.data.indexed import IndexedWriter, Tokens, token_dtype
from btx_megatron.data.tokenizer import cached_tokenizer, open_tokenizer
from btx_megatron.data.workers import Workers

TASK_BYTES = 512 * 1024


@dataclass(frozen=True)
class Counts:
    """What one pair of token files holds; ``tokens`` with the eod of each document."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class _Task:
    documents: list[Document]
    tokenizer: Path
    sha256: str
    dtype: np.dtype[Any]


def tokenize(
    documents: Iterable[Document],
    prefix: Path,
    tokenizer: Path,
    workers: Workers,
    progress: Callable[[int], None],
) -> Counts:
    """Write ``PREFIX.bin`` and ``PREFIX.idx``: documents in order, the eod token after each.

    ``progress`` is told the bytes of text done so far. Raises UserError for a document that can no
    longer be read as it was.
    """
    model = open_tokenizer(tokenizer)
    dtype = token_dtype(model.vocab_size)
    tasks = (_Task(run, tokenizer, model.sha256, dtype) for run in _runs(documents))
    count = size = total = 0
    with IndexedWriter(prefix, dtype) as writer:
        for tokens, lengths, task_bytes in workers.map(_encode, tasks):
            writer.add(tokens, lengths)
            count, size, total = count + len(lengths), size + task_bytes, total + len(tokens)
            progress(size)
    return Counts(documents=count, bytes=size, tokens=total)


def _runs(documents: Iterable[Document]) -> Iterator[list[Document]]:
    run: list[Document] = []
    size = 0
    for document in documents:
        run.append(document)
        size += document.size
        if size >= TASK_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run


def _encode(task: _Task) -> tuple[Tokens, list[int], int]:
    """Tokens of a task's documents end to end, the length of each, and their bytes of text."""
    tokenizer = cached_tokenizer(task.tokenizer, task.sha256)
    encoded = tokenizer.encode([document.text for document in task.documents])
    arrays = [np.array([*ids, tokenizer.eod], dtype=task.dtype) for ids in encoded]
    lengths = [len(tokens) for tokens in arrays]
    return np.concatenate(arrays), lengths, sum(document.size for document in task.documents)
