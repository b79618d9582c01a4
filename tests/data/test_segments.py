"""Text cut into segments gives the tokens of the text in one."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from corpora import random_words
from hypothesis import example, given, settings
from hypothesis import strategies as st

from btx_megatron.data import segments as segments_module
from btx_megatron.data.segments import Segments
from btx_megatron.data.tokenizer import Tokenizer

CODE = "".join(
    Path(__file__).with_name(f"test_{n}.py").read_text() for n in ("segments", "corpus", "prepare")
)


def trained(**options: Any) -> bytes:
    model = io.BytesIO()
    settings = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": 2**30,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CODE, random_words(1, 3000)]), model_writer=model, **settings
    )
    return model.getvalue()


MODELS: dict[str, dict[str, Any]] = {
    "as_trained_here": {"add_dummy_prefix": False, "split_digits": True},
    "llama": {"add_dummy_prefix": True},
    "with_symbols": {"user_defined_symbols": ["\n", "\n\n", "def "]},
    "spaces_within": {"add_dummy_prefix": False, "split_by_whitespace": False},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> bytes:
    return trained(**MODELS[request.param])


line = st.sampled_from(
    [*CODE.splitlines(), "", " ", "\t", "    x", "ünï", "\r", "\u2581a", "\U0001f600", "a" * 50]
)


@settings(max_examples=200)
@given(
    parts=st.lists(st.one_of(line, st.sampled_from([" ", "  ", "\n", "\n\n"])), max_size=40),
    segment=st.integers(1, 60),
)
@example(parts=["a", " ", " ", "b", " "], segment=1)
@example(parts=["a\u2581", " ", "b"], segment=1)
def test_segments_together_give_the_tokens_of_the_text(model: bytes, parts: list[str], segment: int) -> None:
    text = "".join(parts)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    segments = Segments(model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segments_module, "SEGMENT", segment)
        cut = segments.cut(text)
    assert [token for ids in pieces.encode(cut) for token in ids] == pieces.encode(text)


@pytest.mark.parametrize("name", ["as_trained_here", "llama"])
def test_long_text_is_cut(name: str) -> None:
    segments = Segments(trained(**MODELS[name]))
    assert segments.cuts
    assert len(segments.cut(CODE)) > len(CODE) / 1000


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
        {"user_defined_symbols": ["def f"]},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_models_for_which_that_is_not_sure_are_given_the_whole_text(options: dict[str, Any]) -> None:
    assert Segments(trained(**options)).cut(CODE) == [CODE]


def test_the_tokenizer_cuts_and_gives_what_sentencepiece_gives(tmp_path: Path) -> None:
    for name, options in MODELS.items():
        model = trained(**options)
        (tmp_path / f"{name}.model").write_bytes(model)
        tokenizer = Tokenizer(tmp_path / f"{name}.model")
        whole = sentencepiece.SentencePieceProcessor(model_proto=model)
        texts = [CODE.replace("\u2581", ""), "", "short", random_words(2, 2000)]
        assert tokenizer.encode(texts) == whole.encode(texts)
