import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpora import random_words, small_recipe, write_files

from btx_megatron.data.folder import read_statistics, token_prefix
from btx_megatron.data.indexed import IndexedTokens
from btx_megatron.data.prepare import first_bytes, prepare, tokenizer_path
from btx_megatron.data.tokenizer import Tokenizer
from btx_megatron.errors import UserError
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import parse_recipe

SIDES = ("train", "held_out")


def recipe_of(**paths: Path) -> Recipe:
    domains = [{"name": name, "sources": [{"path": str(path)}]} for name, path in paths.items()]
    tree: dict[str, Any] = {"data": {"domains": domains, "num_workers": 1}, "tokenizer": {"vocab_size": 280}}
    return parse_recipe(tree)


def quietly(recipe: Recipe, folder: Path) -> dict[str, Any]:
    return prepare(recipe, folder, lambda phase, done, total: None)


def texts(folder: Path, side: str, domain: str, source: str = "text") -> list[str]:
    tokens = IndexedTokens(token_prefix(folder, side, domain, source))
    tokenizer = Tokenizer(tokenizer_path(folder))
    return [tokenizer.decode(tokens[i][:-1].tolist()) for i in range(len(tokens))]


def test_statistics_say_what_lies_on_disk(data_folder: Path) -> None:
    statistics = read_statistics(data_folder)
    assert statistics["vocab_size"] == 600
    assert statistics["padded_vocab_size"] == 640
    assert {name: list(sources) for name, sources in statistics["domains"].items()} == {
        "formats": ["json", "email"],
        "loops": ["asyncio"],
    }
    for domain, sources in statistics["domains"].items():
        for source, counts in sources.items():
            for side in SIDES:
                written = texts(data_folder, side, domain, source)
                index = token_prefix(data_folder, side, domain, source).with_suffix(".idx")
                assert counts[side] == {
                    "documents": len(written),
                    "bytes": sum(len(text.encode()) for text in written),
                    "tokens": IndexedTokens(index.with_suffix("")).total_tokens,
                    "idx_sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
                }
            held, train = counts["held_out"]["bytes"], counts["train"]["bytes"]
            assert 0 < held < 0.35 * train


def test_preparing_again_gives_the_same_bytes_and_workers_do_not_matter(
    data_folder: Path, tmp_path: Path
) -> None:
    quietly(small_recipe(num_workers=2), tmp_path)
    files = sorted(p.relative_to(data_folder) for p in data_folder.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / file).read_bytes() == (data_folder / file).read_bytes(), file


def test_no_text_is_on_both_sides_even_of_two_domains(tmp_path: Path) -> None:
    shared = {f"{i}.txt": random_words(i, 100) for i in range(40)}
    copies = {f"copy/{name}": text for name, text in shared.items()}
    extra = {f"extra{i}.txt": random_words(100 + i, 100) for i in range(20)}
    one = write_files(tmp_path / "one", {**shared, **copies})
    two = write_files(tmp_path / "two", {**{f"b{n}": t for n, t in shared.items()}, **extra})
    statistics = quietly(recipe_of(one=one, two=two), tmp_path / "data")
    assert statistics["domains"]["one"]["text"]["duplicates"] == 40
    train, held_out = (
        [text for domain in ("one", "two") for text in texts(tmp_path / "data", side, domain)]
        for side in SIDES
    )
    assert len(train) + len(held_out) == 40 + 60
    assert held_out
    assert not set(train) & set(held_out)


def test_progress_ends_complete(tmp_path: Path) -> None:
    source = write_files(tmp_path / "text", {f"{i}.txt": random_words(i, 100) for i in range(30)})
    recipe = recipe_of(one=source)
    recipe.data.domains[0].sources[0].max_bytes = 5000
    told: dict[str, list[tuple[int, int]]] = {}
    prepare(recipe, tmp_path / "data", lambda phase, *at: told.setdefault(phase, []).append(at))
    assert list(told) == ["read", "tokenizer", "tokenize"]
    for steps in told.values():
        assert steps == sorted(steps)
        assert len({total for _, total in steps}) == 1
        assert steps[-1][0] == steps[-1][1]


def test_a_source_of_one_document_is_refused(tmp_path: Path) -> None:
    source = write_files(tmp_path / "text", {"a.txt": "once", "b.txt": "once"})
    with pytest.raises(
        UserError, match=r"'one', source 'text': no document to .* two different ones .* gave 1"
    ):
        quietly(recipe_of(one=source), tmp_path / "data")


def test_a_missing_source_is_found_before_any_is_read(tmp_path: Path) -> None:
    bad = write_files(tmp_path / "bad", {"a.txt": b"\xff", "b.txt": "b"})
    with pytest.raises(UserError, match=r"'two'.*no such file or folder"):
        quietly(recipe_of(one=bad, two=tmp_path / "none"), tmp_path / "data")


def test_a_given_tokenizer_is_taken(data_folder: Path, tmp_path: Path) -> None:
    recipe = small_recipe()
    recipe.tokenizer.tokenizer_model = str(tokenizer_path(data_folder))
    recipe.tokenizer.vocab_size = 17  # ignored
    assert quietly(recipe, tmp_path) == read_statistics(data_folder)


def test_training_text_is_cut_at_a_character(tmp_path: Path) -> None:
    from btx_megatron.data.document import Document, text_digest

    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path, text in zip(paths, ["abc", "äöü", "never"], strict=True):
        path.write_text(text, encoding="utf-8")
    raw = [path.read_bytes() for path in paths]
    documents = [Document(p.name, p, len(r), text_digest(r)) for p, r in zip(paths, raw, strict=True)]
    assert list(first_bytes(documents, 6)) == ["abc", "ä"]
    assert list(first_bytes(documents, 9)) == ["abc", "äöü"]


def test_a_folder_that_was_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"statistics\.json: no prepared data here; run `btx prepare`"):
        read_statistics(tmp_path)


def test_preparing_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, json, btx_megatron.data.prepare, btx_megatron.data.held_out;"
        "print(json.dumps(sorted(m for m in sys.modules if m in ('torch', 'megatron'))))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(answer.stdout) == []
