"""Documents that share a file: JSON lines, plain and packed, and Parquet."""

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest
from corpora import json_lines, random_words, write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_megatron.data import corpus as corpus_module
from btx_megatron.data import json_lines as json_lines_module
from btx_megatron.data import parquet as parquet_module
from btx_megatron.data import records as limits
from btx_megatron.data.corpus import Collection, collect, locate
from btx_megatron.data.folder import token_prefix
from btx_megatron.data.indexed import IndexedTokens
from btx_megatron.data.prepare import prepare, tokenizer_path
from btx_megatron.data.tokenizer import Tokenizer
from btx_megatron.data.workers import Workers
from btx_megatron.errors import UserError
from btx_megatron.recipe import Data, Source
from btx_megatron.recipe_file import parse_recipe

TEXTS = [random_words(i, 30) for i in range(200)]


def read(path: Path, workers: int = 1, on_bad_document: Any = "stop", **source: Any) -> Collection:
    described = Source(path=str(path), **source)
    with Workers(workers) as pool:
        data = Data(on_bad_document=on_bad_document)
        return collect(locate(described, "d", 1), described, "d", data, pool, lambda done: None)


def texts(collection: Collection) -> list[str]:
    return [document.text for document in collection.documents]


def zstandard(raw: bytes) -> bytes:
    return pytest.importorskip("pyarrow").Codec("zstd").compress(raw, asbytes=True)


def write_parquet(path: Path, columns: dict[str, Any], row_group_size: int = 7) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def test_a_line_is_a_document_in_the_files_order(tmp_path: Path) -> None:
    write_files(
        tmp_path, {"a.jsonl": json_lines(TEXTS[:50]), "b.txt": "plain", "c/d.jsonl": json_lines(["x"])}
    )
    found = read(tmp_path)
    assert sorted(texts(found)) == sorted([*TEXTS[:50], "plain", "x"])
    lines = [document for document in found.documents if document.name == "a.jsonl"]
    assert [document.text for document in lines] == TEXTS[:50]
    assert [document.size for document in lines] == [len(text.encode()) for text in TEXTS[:50]]


def test_another_key_and_a_format_that_the_name_does_not_tell(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.json": json_lines(TEXTS[:3], key="content")})
    assert texts(read(tmp_path, format="jsonl", text_key="content")) == TEXTS[:3]
    assert len(read(tmp_path).documents) == 1
    assert len(read(tmp_path, format="text").documents) == 1


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_lines(tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}[suffix]
    raw = json_lines(TEXTS).encode()
    middle = raw.index(b"\n", len(raw) // 2) + 1
    packed = pack(raw[:middle]) + pack(raw[middle:])  # as tools that append write it: one after the other
    write_files(tmp_path, {f"a.jsonl{suffix}": packed})
    found = read(tmp_path, workers=1)
    assert texts(found) == TEXTS
    assert [document.text for document in reversed(found.documents)] == TEXTS[::-1]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_packed_file_that_is_cut_short_is_named(tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}[suffix]
    packed = pack(json_lines(TEXTS).encode())
    for content in (packed[: len(packed) // 2], b"no such packing"):
        write_files(tmp_path, {f"a.jsonl{suffix}": content})
        with pytest.raises(UserError, match=r"a\.jsonl\.\w+: (damaged|cannot be read)") as caught:
            read(tmp_path, on_bad_document="skip")
        assert "\n" not in str(caught.value)


def test_rows_of_parquet(tmp_path: Path) -> None:
    columns = {"id": list(range(200)), "text": [*TEXTS[:100], "", None, *TEXTS[102:]]}
    write_parquet(tmp_path / "a.parquet", columns)
    found = read(tmp_path)
    assert texts(found) == TEXTS[:100] + TEXTS[102:]
    assert found.empty == 2
    assert texts(read(tmp_path, workers=2)) == texts(found)


def test_a_row_group_may_be_empty(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tables = [
        pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        for texts in (["a"], [], ["b", "c"], [])
    ]
    with parquet.ParquetWriter(tmp_path / "a.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    assert parquet.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups > 2
    assert texts(read(tmp_path)) == ["a", "b", "c"]


def test_columns_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"id": [1, 2], "body": ["a", "b"]})
    with pytest.raises(UserError, match=r"a\.parquet: has no column 'text', only id, body; correct text_key"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"a\.parquet: column 'id' holds int64, not strings"):
        read(tmp_path, text_key="id")
    assert texts(read(tmp_path, text_key="body")) == ["a", "b"]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: has 2 columns 'text'; rename one"):
        read(tmp_path)


def test_parquet_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": TEXTS})
    whole = path.read_bytes()
    for content in (b"", b"junk", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.parquet: not a whole Parquet file") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    for name in ("a.parquet", "a.jsonl.zst"):
        folder = write_files(tmp_path / name, {name: b"PAR1"})
        with monkeypatch.context() as patched:
            patched.setattr(parquet_module.importlib, "import_module", missing)
            with pytest.raises(UserError, match=rf"{name}: reading it needs pyarrow; .*\[parquet\]"):
                read(folder)


BAD_LINES: list[tuple[bytes, str]] = [
    (b"not json", r"is not JSON \(Expecting value, character 1\)"),
    (b'{"text": "a"', r"is not JSON"),
    (b'{"body": "a", "id": 1}', r"has no key 'text', only body, id; correct text_key"),
    (b"{}", r"has no key 'text', only none"),
    (b'{"text": 5}', r"has a 'text' that is no string but int"),
    (b'{"text": null}', r"has a 'text' that is no string but NoneType"),
    (b'["text"]', r"is a JSON list, not an object"),
    (b'{"text": "\xff"}', r"is not UTF-8 text \(byte 10 of the line\)"),
    (b'{"text": "\\ud800"}', r"is not UTF-8 text \(half a pair of surrogates at 0\)"),
    (b"[" * 200_000, r"is not JSON that can be read \(RecursionError\)"),
    (b'{"n": ' + b"1" * 5000 + b"}", r"is not JSON that can be read \(ValueError\)"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES, ids=[why[:30] for _, why in BAD_LINES])
def test_a_bad_line_is_named_or_skipped(
    tmp_path: Path, line: bytes, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines_module, "PART_BYTES", 500)  # the number counts on over the parts
    good = [json_lines([text]).encode() for text in TEXTS[:20]]
    write_files(tmp_path, {"a.jsonl": b"".join([*good[:17], line + b"\n", *good[17:]])})
    with pytest.raises(
        UserError, match=rf"source 'text': .*a\.jsonl:18 {why}.*on_bad_document=skip"
    ) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    found = read(tmp_path, on_bad_document="skip")
    assert (texts(found), found.skipped) == (TEXTS[:20], 1)


@settings(max_examples=60)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=30, unique=True
    ),
    st.integers(1, 200),
    st.booleans(),
)
def test_parts_of_a_file_give_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], part: int, ends: bool
) -> None:
    expected = [text for text in lines if text.strip()]
    raw = json_lines(lines)
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text(raw if ends else raw.removesuffix("\n"), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_lines_module, "PART_BYTES", part)
        if not expected:
            with pytest.raises(UserError, match="no text"):
                read(path)
            return
        found = read(path)
    assert texts(found) == expected
    assert found.empty == len(lines) - len(expected)


def test_a_document_that_is_too_large_is_bad_and_never_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(json_lines_module, "PART_BYTES", 700)
    giant = json_lines(["x" * 100_000])
    some = json_lines(["y" * 1500])  # the line may be read, the text is too long
    write_files(tmp_path, {"a.jsonl": json_lines(TEXTS[:3]) + giant + json_lines(TEXTS[3:5]) + some})
    with pytest.raises(
        UserError, match=r"a\.jsonl:4 is a document of 100,0\d\d bytes, and 1,000 is the most"
    ):
        read(tmp_path)
    found = read(tmp_path, on_bad_document="skip")
    assert (texts(found), found.skipped) == (TEXTS[:5], 2)
    (tmp_path / "a.jsonl").unlink()
    write_files(tmp_path, {"b.txt": "z" * 1001, "c.txt": "fine"})
    with pytest.raises(UserError, match=r"b\.txt is a document of 1,001 bytes"):
        read(tmp_path)


def test_empty_shards_are_fine_and_only_empty_ones_are_not(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jsonl": "", "b.jsonl": "\n\n", "c.jsonl.gz": gzip.compress(b"")})
    with pytest.raises(UserError, match=r"no text in .*2 documents are empty, 0 were skipped"):
        read(tmp_path)
    write_files(tmp_path, {"e.jsonl": json_lines(TEXTS[:2])})
    assert texts(read(tmp_path)) == TEXTS[:2]


def test_parquet_without_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d.parquet", {"text": TEXTS[:0]})
    write_files(tmp_path, {"e.txt": "text"})
    assert texts(read(tmp_path)) == ["text"]


def test_max_bytes_stops_within_a_file(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.jsonl": json_lines(TEXTS)})
    size = sum(len(text) for text in TEXTS[:10])
    assert texts(read(tmp_path, max_bytes=size)) == TEXTS[:10]
    assert texts(read(tmp_path, max_bytes=size - 1)) == TEXTS[:10]


def test_a_line_that_changes_after_it_was_counted_is_an_error(tmp_path: Path) -> None:
    path = write_files(tmp_path, {"a.jsonl": json_lines(TEXTS[:9])}) / "a.jsonl"
    document = read(path).documents[4]
    for raw in (json_lines(TEXTS[20:29]), "short", json_lines(TEXTS[:4])):
        path.write_text(raw)
        with pytest.raises(UserError, match=r"a\.jsonl: changed while the data was being prepared"):
            _ = document.text


def test_workers_and_the_size_of_parts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {f"{i}.jsonl": json_lines(TEXTS[20 * i : 20 * i + 20]) for i in range(10)})
    alone = read(tmp_path)
    assert read(tmp_path, workers=2) == alone
    monkeypatch.setattr(json_lines_module, "PART_BYTES", 300)
    assert read(tmp_path, workers=1) == alone


def test_no_text_is_on_both_sides_whatever_the_formats(tmp_path: Path) -> None:
    """The same 60 texts as files, as lines, as packed lines and as rows, in four sources of two domains."""
    shared = TEXTS[:60]
    write_files(tmp_path / "files", {f"{i}.txt": text for i, text in enumerate(shared)})
    write_files(tmp_path / "lines", {"a.jsonl": json_lines(shared[::-1]) + json_lines(TEXTS[60:80])})
    packed = gzip.compress(json_lines(shared, key="body").encode())
    write_files(tmp_path / "packed", {"renamed.jsonl.gz": packed})
    sources: list[dict[str, Any]] = [
        {"name": n, "path": str(tmp_path / n)} for n in ("files", "lines", "packed")
    ]
    sources[2]["text_key"] = "body"
    try:
        write_parquet(tmp_path / "rows" / "a.parquet", {"text": shared})
        sources.append({"name": "rows", "path": str(tmp_path / "rows")})
    except pytest.skip.Exception:
        pass
    domains = [{"name": "one", "sources": sources[:2]}, {"name": "two", "sources": sources[2:]}]
    tree = {"data": {"domains": domains, "num_workers": 1}, "tokenizer": {"vocab_size": 300}}
    prepare(parse_recipe(tree), tmp_path / "data", lambda *step: None)
    tokenizer = Tokenizer(tokenizer_path(tmp_path / "data"))
    sides: dict[str, set[str]] = {"train": set(), "held_out": set()}
    for side, seen in sides.items():
        for domain in domains:
            for source in domain["sources"]:
                tokens = IndexedTokens(token_prefix(tmp_path / "data", side, domain["name"], source["name"]))
                assert len(tokens)
                seen |= {tokenizer.decode(tokens[i][:-1].tolist()) for i in range(len(tokens))}
    assert sides["held_out"]
    assert not sides["train"] & sides["held_out"]
    assert sides["train"] | sides["held_out"] == set(TEXTS[:80])


def test_the_format_goes_by_the_name() -> None:
    names = {
        "a.jsonl": "jsonl",
        "a.JSONL.GZ": "jsonl",
        "a.b.jsonl.zst": "jsonl",
        "a.parquet": "parquet",
        "a.txt": "text",
        "a.gz": "text",
        "jsonl": "text",
        "a.jsonl.txt": "text",
    }
    for name, expected in names.items():
        assert corpus_module._format(Path(name), Source()) == expected, name
    assert corpus_module._format(Path("a.parquet"), Source(format="text")) == "text"
