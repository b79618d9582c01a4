"""A SentencePiece model's ``tokenizer.json`` cuts every text as our data pipeline does."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from btx_megatron import recipe
from btx_megatron.checkpoints.sentencepiece_json import parse, tokenizer_config, tokenizer_json, why_not_equal
from btx_megatron.data.tokenizer import Tokenizer, train_tokenizer
from btx_megatron.errors import UserError

TEXT = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
SIGN = "\u2581"
ODD = [
    "", " ", "    x", "\tx\n\n  y \r\n", f"a{SIGN}b", f" {SIGN} ", f"{SIGN}{SIGN}a ",
    "🙂👩\u200d👩\u200d👧 é漢\u2028\x00", "<s></s><unk>", "<0x0A><0xE2>", "12 345",
    "def f(x):\n        return  x",
]  # fmt: skip
WORDS = sorted({word for text in TEXT for word in text.split(" ")})
TEXTS = st.lists(st.sampled_from([*ODD, *WORDS]) | st.text(max_size=8), max_size=12).map("".join)


def given_model(path: Path, **options: Any) -> Path:
    """As somebody else trains one."""
    model = io.BytesIO()
    wanted = {"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True}
    wanted |= {"remove_extra_whitespaces": False, "vocab_size": 600, "minloglevel": 2}
    lines = (line for text in TEXT for line in text.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **(wanted | options)
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("bpe", "unigram"):
        train_tokenizer(TEXT, recipe.Tokenizer(vocab_size=600, model_type=kind), folder / f"{kind}.model")  # type: ignore[arg-type]
    given_model(folder / "prefixed.model")
    return {path.stem: path for path in folder.iterdir()}


def both(path: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    model = parse(path.read_bytes(), str(path))
    assert why_not_equal(model) is None
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(model)))
    theirs.encode_special_tokens = tokenizer_config(model)["split_special_tokens"]
    return Tokenizer(path), theirs


@pytest.mark.parametrize("name", ["bpe", "unigram", "prefixed"])
def test_odd_texts_and_whole_files_are_cut_alike(models: dict[str, Path], name: str) -> None:
    ours, theirs = both(models[name])
    for text in [*ODD, *TEXT]:
        ids = ours.encode([text])[0]
        assert theirs.encode(text).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    assert theirs.get_vocab_size() == ours.vocab_size


@pytest.mark.parametrize("name", ["bpe", "prefixed"])
@given(text=TEXTS)
@example(text=f"  {SIGN}  {SIGN}\n")
@settings(max_examples=200)
def test_any_text_is_cut_alike(models: dict[str, Path], name: str, text: str) -> None:
    ours, theirs = both_cached(models[name])
    assert theirs.encode(text).ids == ours.encode([text])[0]


_CACHE: dict[Path, tuple[Tokenizer, tokenizers.Tokenizer]] = {}


def both_cached(path: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    if path not in _CACHE:
        _CACHE[path] = both(path)
    return _CACHE[path]


def test_special_tokens_are_named_by_the_configuration(models: dict[str, Path]) -> None:
    ours, theirs = both(models["bpe"])
    config = tokenizer_config(parse(models["bpe"].read_bytes(), ""))
    assert theirs.token_to_id(config["bos_token"]) == ours.bos
    assert theirs.token_to_id(config["eos_token"]) == ours.eos
    assert {id for id, token in theirs.get_added_tokens_decoder().items() if token.special} == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"byte_fallback": False}, "it has no byte pieces"),
        ({"user_defined_symbols": ["<sep>"]}, "it has user-defined pieces"),
        ({"treat_whitespace_as_suffix": True}, "it treats spaces in a way of its own"),
        ({"model_type": "char"}, "it has user-defined pieces, or another algorithm"),
    ],
)
def test_what_cannot_be_said_is_told(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    path = given_model(tmp_path / "m.model", **options)
    found = why_not_equal(parse(path.read_bytes(), str(path)))
    assert found is not None
    assert reason in found


def test_without_bos_none_is_named(tmp_path: Path) -> None:
    model = parse(given_model(tmp_path / "m.model", bos_id=-1).read_bytes(), "")
    assert "bos_token" not in tokenizer_config(model)
    assert tokenizer_config(model)["eos_token"] == "</s>"


def test_a_damaged_model_is_one_error(models: dict[str, Path]) -> None:
    content = models["bpe"].read_bytes()
    for damaged in (b"", b"not a model", content[:-7], content[:100] + b"\xff" * 40 + content[140:]):
        with pytest.raises(UserError, match=r"M: not a SentencePiece model; restore the file"):
            parse(damaged, "M")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_model_or_one_error(content: bytes) -> None:
    with contextlib.suppress(UserError):
        parse(content, "M")
