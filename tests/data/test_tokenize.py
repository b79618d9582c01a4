from pathlib import Path

import numpy as np
import pytest
from corpora import random_words, write_files

from btx_megatron.data import tokenize as tokenize_module
from btx_megatron.data.corpus import collect, locate
from btx_megatron.data.document import Document
from btx_megatron.data.indexed import IndexedTokens, bin_path, idx_path
from btx_megatron.data.tokenize import Counts, tokenize
from btx_megatron.data.tokenizer import Tokenizer
from btx_megatron.data.workers import Workers
from btx_megatron.errors import UserError
from btx_megatron.recipe import Data, Source


@pytest.fixture
def documents(tmp_path: Path) -> list[Document]:
    files: dict[str, str | bytes] = {f"{i}.txt": random_words(i, 50 + 40 * i) for i in range(60)}
    source = Source(path=str(write_files(tmp_path / "text", files)))
    with Workers(1) as workers:
        found = locate(source, "d", 1)
        return collect(found, source, "d", Data(), workers, lambda done: None).documents


def test_each_document_is_its_tokens_and_an_eod(
    tmp_path: Path, documents: list[Document], tokenizer_file: Path
) -> None:
    told: list[int] = []
    with Workers(1) as workers:
        counts = tokenize(documents, tmp_path / "x", tokenizer_file, workers, told.append)
    written, tokenizer = IndexedTokens(tmp_path / "x"), Tokenizer(tokenizer_file)
    assert len(written) == len(documents)
    assert written.dtype == np.uint16
    for i, document in enumerate(documents):
        assert written[i].tolist() == [*tokenizer.encode([document.text])[0], tokenizer.eod]
    size = sum(document.size for document in documents)
    assert counts == Counts(documents=60, bytes=size, tokens=written.total_tokens)
    assert told == sorted(told)
    assert told[-1] == size


def test_the_result_does_not_depend_on_the_number_of_workers_or_the_tasks(
    tmp_path: Path, documents: list[Document], tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for count, task_bytes in [(1, 512 * 1024), (1, 1), (2, 5000)]:
        monkeypatch.setattr(tokenize_module, "TASK_BYTES", task_bytes)
        prefix = tmp_path / f"{count}-{task_bytes}"
        with Workers(count) as workers:
            tokenize(documents, prefix, tokenizer_file, workers, lambda done: None)
        written.append(bin_path(prefix).read_bytes() + idx_path(prefix).read_bytes())
    assert written[0] == written[1] == written[2]


def test_an_error_in_a_worker_is_the_users_and_leaves_nothing(
    tmp_path: Path, documents: list[Document], tokenizer_file: Path
) -> None:
    documents[50].path.write_text("something else")
    with Workers(2) as workers, pytest.raises(UserError, match="changed while"):
        tokenize(documents, tmp_path / "out" / "x", tokenizer_file, workers, lambda done: None)
    assert list((tmp_path / "out").iterdir()) == []
