import struct
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_megatron.data.indexed import HEADER, IndexedTokens, IndexedWriter, bin_path, idx_path, token_dtype
from btx_megatron.errors import UserError

DOCUMENTS = [[5, 1, 2], [2], [7, 65000, 9, 9, 2], [3, 2]]


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=dtype), [len(document)])
    return prefix


@pytest.mark.parametrize("vocab_size", [256, 4096, 65499, 65500, 65536, 128256])
def test_files_are_those_of_megatrons_builder(
    tmp_path: Path, megatron_datasets: ModuleType, vocab_size: int
) -> None:
    import torch

    dtype = token_dtype(vocab_size)
    assert dtype == megatron_datasets.DType.optimal_dtype(vocab_size)
    documents = [[token % vocab_size for token in document] for document in DOCUMENTS]
    write(tmp_path / "ours_text_document", documents, dtype)
    theirs = megatron_datasets.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        theirs.add_document(torch.tensor(document), [len(document)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        ours = (tmp_path / f"ours_text_document.{kind}").read_bytes()
        assert ours == (tmp_path / f"theirs.{kind}").read_bytes()


def test_several_documents_may_be_added_at_once(tmp_path: Path) -> None:
    write(tmp_path / "one", DOCUMENTS)
    with IndexedWriter(tmp_path / "many", np.dtype(np.uint16)) as writer:
        for part in (DOCUMENTS[:3], DOCUMENTS[3:]):
            writer.add(np.concatenate([np.array(d, np.uint16) for d in part]), [len(d) for d in part])
    for path in (bin_path, idx_path):
        assert path(tmp_path / "one").read_bytes() == path(tmp_path / "many").read_bytes()


@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=20), st.integers(0, 100))
def test_what_is_written_is_read(documents: list[list[int]], count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokens = IndexedTokens(write(Path(folder) / "a", documents))
        assert [tokens[i].tolist() for i in range(len(tokens))] == documents
        assert tokens.first(count).tolist() == [t for d in documents for t in d][:count]
        assert tokens.total_tokens == sum(map(len, documents))


def test_nothing_appears_before_all_is_written(tmp_path: Path) -> None:
    def interrupted() -> None:
        with IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
            writer.add(np.array([1, 2], np.uint16), [2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_type_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="int64"),
        IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer,
    ):
        writer.add(np.array([70000]), [1])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.idx: cannot be read"):
        IndexedTokens(tmp_path / "a")
    bin_path(write(tmp_path / "a", DOCUMENTS)).unlink()
    with pytest.raises(UserError, match=r"a\.bin: cannot be read"):
        IndexedTokens(tmp_path / "a")


@pytest.mark.parametrize("path", [bin_path, idx_path])
def test_a_truncated_file_is_refused(tmp_path: Path, path: Any) -> None:
    file = path(write(tmp_path / "a", DOCUMENTS))
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.idx: broken index"):
            IndexedTokens(tmp_path / "a")


def test_crafted_indices_are_refused(tmp_path: Path) -> None:
    index = idx_path(write(tmp_path / "a", DOCUMENTS))
    whole = index.read_bytes()
    lengths, offsets, starts = HEADER.size, HEADER.size + 4 * 4, HEADER.size + 12 * 4
    for at, value, why in [
        (0, b"X", "begin like"),
        (9, struct.pack("<Q", 2), "version"),
        (17, b"\x06", "token type 6"),
        (18, struct.pack("<Q", 2**63), "where its header says"),
        (26, struct.pack("<Q", 0), "where its header says"),
        (lengths, struct.pack("<i", -1), "negative"),
        (lengths, struct.pack("<i", 2**31 - 1), "outside"),
        (offsets, struct.pack("<q", -2), "outside"),
        (offsets, struct.pack("<q", 2**63 - 1), "outside"),
        (offsets + 24, struct.pack("<q", 20), "outside"),
        (starts, struct.pack("<q", 1), "cover"),
        (starts + 8, struct.pack("<q", -7), "cover"),
        (starts + 32, struct.pack("<q", 5), "cover"),
    ]:
        index.write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(UserError, match=why):
            IndexedTokens(tmp_path / "a")


@settings(max_examples=200)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_no_corruption_leads_outside_the_file(at: int, junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder) / "a", DOCUMENTS)
        index = idx_path(prefix)
        whole = index.read_bytes()
        index.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
        try:
            tokens = IndexedTokens(prefix)
        except UserError:
            return
        assert all(len(tokens[i]) == tokens.lengths[i] for i in range(len(tokens)))
