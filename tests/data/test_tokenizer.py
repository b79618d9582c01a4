import shutil
from pathlib import Path

import pytest
import sentencepiece
from corpora import random_words
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron import recipe
from btx_megatron.data.tokenizer import (
    Tokenizer,
    cached_tokenizer,
    take_tokenizer,
    train_tokenizer,
)
from btx_megatron.errors import UserError
from btx_megatron.estimate import padded_vocab_size


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file)


awkward = st.sampled_from(
    ["\u2581", "\u2585", "\t", "\n", "  ", "\r\n", "\0", "<s>", "</s>", "<0x0A>", "\ufeff"]
)
text = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), awkward)).map("".join)


@given(st.lists(text, max_size=4))
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    special = {0, tokenizer.bos, tokenizer.eos, tokenizer.pad}
    assert not special & {token for ids in encoded for token in ids}


def test_code_comes_back_exactly_and_indentation_is_cheap(tokenizer: Tokenizer) -> None:
    code = "def f(x):\n\tif x:\n        return  [ 1,\t2 ]\r\n\n\n    # ▁ done  \n"
    [ids] = tokenizer.encode([code])
    assert tokenizer.decode(ids) == code
    assert len(tokenizer.encode(["\n        return"])[0]) <= 4


def test_ids_are_llamas(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (1, 2, 2, -1)
    assert tokenizer.vocab_size == 600


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(["20240101"])[0]) == 8


def test_training_is_repeatable_and_unigram_works(tmp_path: Path) -> None:
    texts = [random_words(i, 2000) for i in range(4)]
    for kind in ("bpe", "unigram"):
        config = recipe.Tokenizer(vocab_size=400, model_type=kind)  # type: ignore[arg-type]
        models = []
        for i in range(2):
            train_tokenizer(texts, config, tmp_path / kind / f"{i}.model")
            models.append((tmp_path / kind / f"{i}.model").read_bytes())
        assert models[0] == models[1]
        trained = Tokenizer(tmp_path / kind / "0.model")
        assert trained.decode(trained.encode(texts[:1])[0]) == texts[0]


@pytest.mark.parametrize(("vocab_size", "fix"), [(5000, "holds no more than"), (200, "raise it")])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, vocab_size: int, fix: str) -> None:
    config = recipe.Tokenizer(vocab_size=vocab_size)
    with pytest.raises(UserError, match=rf"tokenizer\.vocab_size: {vocab_size} pieces .*{fix}") as caught:
        train_tokenizer([random_words(1, 300)], config, tmp_path / "m.model")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.model").exists()


def test_a_given_model_is_copied(tmp_path: Path, tokenizer_file: Path) -> None:
    take_tokenizer(recipe.Tokenizer(tokenizer_model=str(tokenizer_file)), tmp_path / "a" / "tokenizer.model")
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()


def test_a_given_model_that_is_missing_broken_or_without_eos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.model").write_bytes(b"not a model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([random_words(1, 500)]),
        model_prefix=str(tmp_path / "no_eos"),
        vocab_size=30,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    for name, why in [
        ("none", "cannot be read"),
        ("broken", "not a SentencePiece"),
        ("no_eos", "end-of-sent"),
    ]:
        config = recipe.Tokenizer(tokenizer_model=str(tmp_path / f"{name}.model"))
        with pytest.raises(UserError, match=rf"tokenizer\.tokenizer_model: .*{name}\.model.*{why}"):
            take_tokenizer(config, tmp_path / "out.model")


def test_another_model_at_the_same_path_is_not_mistaken(tmp_path: Path, tokenizer_file: Path) -> None:
    path = Path(shutil.copy(tokenizer_file, tmp_path / "m.model"))
    before = Tokenizer(path)
    cached_tokenizer(path, before.sha256)
    train_tokenizer([random_words(1, 2000)], recipe.Tokenizer(vocab_size=400), path)
    after = Tokenizer(path)
    assert cached_tokenizer(path, after.sha256).vocab_size == 400
    with pytest.raises(UserError, match="changed"):
        cached_tokenizer(path, before.sha256)
    assert before.unique_identifiers != after.unique_identifiers


@given(st.integers(1, 200_000), st.integers(1, 2048))
def test_padded_vocabulary(vocab_size: int, multiple: int) -> None:
    padded = padded_vocab_size(vocab_size, multiple)
    assert padded % multiple == 0
    assert vocab_size <= padded < vocab_size + multiple
