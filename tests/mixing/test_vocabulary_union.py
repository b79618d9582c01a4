"""The union of vocabularies: numbers, rows, and everything that must not be united."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from btx_megatron.errors import UserError
from btx_megatron.mixing.average import mean
from btx_megatron.mixing.vocabulary_union import (
    VocabularyUnion,
    check_rows,
    parse_vocabulary,
    unite,
    united_rows,
)

BASE = ("a", "b", "c", "ab")


def token(content: str, number: int, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **plain, **flags}


def tokenizer(*added: dict[str, Any], base: Sequence[str] = BASE, **model: Any) -> dict[str, Any]:
    vocabulary = {content: number for number, content in enumerate(base)}
    return {
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], **model},
    }


def united(*tokenizers: dict[str, Any]) -> VocabularyUnion:
    names = "xyzuvw"
    return unite(
        {name: parse_vocabulary(content, name) for name, content in zip(names, tokenizers, strict=False)}
    )


def plain_mean(tensors: Iterable[Tensor], members: Sequence[int]) -> Tensor:
    return mean(tensors)


def read(matrix: Tensor) -> Any:
    return lambda start, stop: matrix[start:stop]


def test_tokens_of_two_are_numbered_one_behind_the_other_and_a_shared_one_once() -> None:
    union = united(
        tokenizer(token("<x>", 4), token("<shared>", 5)),
        tokenizer(token("<shared>", 4), token("<y>", 5), token("<y2>", 6)),
    )
    assert dict(union.numbers) == {"<x>": 4, "<shared>": 5, "<y>": 6, "<y2>": 7}
    assert [(entry["id"], entry["content"]) for entry in union.added] == [
        (4, "<x>"), (5, "<shared>"), (6, "<y>"), (7, "<y2>"),
    ]  # fmt: skip
    assert union.table() == [
        {"rows": [0, 4], "from": {"x": 0, "y": 0}},
        {"rows": [4, 5], "from": {"x": 4}},
        {"rows": [5, 6], "from": {"x": 5, "y": 4}},
        {"rows": [6, 8], "from": {"y": 5}},
    ]
    assert union.moved == ({}, {4: "<shared>", 5: "<y>", 6: "<y2>"})


def test_tokens_that_all_added_alike_are_common() -> None:
    both = [token("<pad>", 4), token("<sep>", 5)]
    union = united(tokenizer(*both, token("<x>", 6)), tokenizer(*both), tokenizer(*both, token("<z>", 6)))
    assert dict(union.numbers) == {"<pad>": 4, "<sep>": 5, "<x>": 6, "<z>": 7}
    assert union.table()[0] == {"rows": [0, 6], "from": {"x": 0, "y": 0, "z": 0}}
    assert united(tokenizer(*both), tokenizer(*both)).table() == [{"rows": [0, 6], "from": {"x": 0, "y": 0}}]


def test_no_hole_is_left_where_all_added_one_token_behind_others() -> None:
    union = united(
        tokenizer(token("<x>", 4), token("<end>", 9)), tokenizer(token("<y>", 5), token("<end>", 9))
    )
    assert dict(union.numbers) == {"<x>": 4, "<end>": 5, "<y>": 6}
    assert union.moved[0] == {9: "<end>"}


def test_added_tokens_of_the_model_itself_keep_their_numbers() -> None:
    union = united(tokenizer(token("c", 2), token("<x>", 4)), tokenizer(token("<y>", 4)))
    assert dict(union.numbers) == {"<x>": 4, "<y>": 5}
    assert [entry["content"] for entry in union.added] == ["c", "<x>", "<y>"]


def test_a_unigram_vocabulary_is_a_list() -> None:
    listed = [["a", -1.0], ["b", -2.0]]
    model = {"type": "Unigram", "vocab": listed}
    one, other = tokenizer(token("<x>", 2)) | {"model": model}, tokenizer() | {"model": model}
    assert united(one, other).size == 3
    scored = {**model, "vocab": [["a", -1.0], ["b", -2.5]]}
    with pytest.raises(UserError, match=r"experts x and y: vocab differs; only added tokens may differ"):
        united(one, tokenizer() | {"model": scored})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (tokenizer(base=("a", "b", "ab", "c")), r"experts x and y: token 'c' is number 2 and 3"),
        (tokenizer(base=(*BASE, "d")), r"token 'd' is in one of them alone"),
        (tokenizer(merges=[["b", "a"]]), r"merges differs"),
        (tokenizer() | {"normalizer": {"type": "NFC"}}, r"normalizer differs"),
        (
            tokenizer(token("<x>", 4, lstrip=True)),
            r"added token '<x>': lstrip is False in expert x, True in e",
        ),
        (tokenizer(token("<x>", 4, special=False)), r"added token '<x>': special is True in expert x, False"),
    ],
)
def test_what_differs_beyond_added_tokens_is_named(other: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        united(tokenizer(token("<x>", 4)), other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tokenizer(token("<x>", 2)), r"T: added token '<x>' has the number 2, which is 'c'"),
        (tokenizer(token("c", 7)), r"T: added token 'c' has the number 7"),
        (
            tokenizer(token("<x>", 4), token("<y>", 4)),
            r"T: added token '<y>' has the number 4, which is '<x>'",
        ),
        (tokenizer(token("<x>", 4), token("<x>", 5)), r"T: added token '<x>' has the number 5.*twice"),
        (tokenizer(vocab={"a": 0, "b": 0}), r"T: token 'b' has the number 0, which is no number or 'a'"),
        ({"model": {"vocab": {}}}, r"T: has no model.vocab"),
        ({"a": 1}, r"T: has no model.vocab"),
        (tokenizer({"id": 4}), r"T: no tokenizer of Hugging Face's form"),
        (tokenizer(merges=5), r"T: no tokenizer of Hugging Face's form"),
    ],
)
def test_a_number_that_means_two_things_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_vocabulary(content, "T")


def test_the_two_ways_to_write_a_merge_are_one() -> None:
    old = tokenizer(token("<x>", 4), merges=["a b"], byte_fallback=False, dropout=None)
    assert united(old, tokenizer()).size == 5


def test_an_embedding_without_the_row_is_named() -> None:
    union = united(tokenizer(token("<x>", 4)), tokenizer(token("<y>", 4), token("<z>", 5)))
    check_rows(union, {"x": 5, "y": 6})
    with pytest.raises(UserError, match=r"expert y has 5 rows in its embedding and a token of number 5"):
        check_rows(union, {"x": 5, "y": 5})
    with pytest.raises(UserError, match=r"expert x has 3 rows in its embedding and a token of number 3"):
        check_rows(union, {"x": 3, "y": 6})


CONTENTS = [f"<{letter}>" for letter in "pqrstuv"]


@st.composite
def sources(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to five tokenizers, whose added tokens may be anywhere behind the model's, in any order."""
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        contents = draw(st.lists(st.sampled_from(CONTENTS), unique=True, max_size=5))
        first = len(BASE) + draw(st.integers(0, 1))
        numbers = draw(
            st.lists(
                st.integers(first, first + 8), unique=True, min_size=len(contents), max_size=len(contents)
            )
        )
        drawn.append(tokenizer(*(token(*pair) for pair in zip(contents, numbers, strict=True))))
    return drawn


@given(sources(), st.integers(0, 3), st.integers(1, 7))
def test_every_token_has_one_row_made_of_its_owners_and_nothing_else_has(
    tokenizers: list[dict[str, Any]], padding: int, step: int
) -> None:
    union = united(*tokenizers)
    owned = [{entry["content"]: entry["id"] for entry in content["added_tokens"]} for content in tokenizers]
    generator = torch.Generator().manual_seed(len(tokenizers))
    matrices = [
        torch.randn(max([*of.values(), len(BASE)]) + 1 + 8 + padding, 3, generator=generator).bfloat16()
        for of in owned
    ]
    rows = united_rows(union, [read(matrix) for matrix in matrices], plain_mean)
    result = torch.cat([rows(start, min(start + step, union.size)) for start in range(0, union.size, step)])
    assert torch.equal(result, rows(0, union.size))  # no cut changes it
    assert torch.equal(result[: len(BASE)], mean(matrix[: len(BASE)] for matrix in matrices))
    every = {content for of in owned for content in of}
    assert set(union.numbers) == every
    assert sorted(union.numbers.values()) == list(range(len(BASE), union.size))  # each once, no holes
    for content, number in union.numbers.items():
        members = [matrix[of[content]] for matrix, of in zip(matrices, owned, strict=True) if content in of]
        assert torch.equal(result[number], mean(members))
    assert union.moved == tuple(
        {number: content for content, number in of.items() if union.numbers[content] != number}
        for of in owned
    )


@given(sources())
def test_further_tokens_come_in_the_order_of_their_first_owners(tokenizers: list[dict[str, Any]]) -> None:
    union = united(*tokenizers)
    everyone = {"from": dict.fromkeys(union.names, 0)}
    assert union.table()[0].items() >= everyone.items()
    common = union.table()[0]["rows"][1]
    seen = [
        entry["content"]
        for content in tokenizers
        for entry in sorted(content["added_tokens"], key=lambda entry: entry["id"])
    ]
    order = [content for content in dict.fromkeys(seen) if union.numbers[content] >= common]
    assert [union.numbers[content] for content in order] == list(range(common, union.size))
