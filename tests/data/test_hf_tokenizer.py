"""A Hugging Face tokenizer in the data pipeline, against the package and against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from btx_megatron import recipe
from btx_megatron.data.hf_tokenizer import HuggingFaceTokenizer
from btx_megatron.data.tokenizer import cached_tokenizer, open_tokenizer, take_tokenizer
from btx_megatron.errors import UserError
from btx_megatron.tokenizer_json import json_vocab_size

TEXTS = ["a fox", "  the   fox\n\tsees a fox.", "Füchse 🦊 \u2581", "one <end> two", ""]


def train(path: Path, algorithm: str = "bpe", config: dict[str, object] | None = None) -> Path:
    """A byte-level tokenizer in ``path``, trained on a little text."""
    if algorithm == "bpe":
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        model = tokenizers.Tokenizer(tokenizers.models.Unigram())
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    model.add_special_tokens(["<end>", "<begin>"])
    model.enable_truncation(3)  # what a file may hold, and a corpus must not suffer
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", model.token_to_id("<begin>"))]
    )
    path.mkdir(parents=True)
    model.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings if config is None else config))
    return path / "tokenizer.json"


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_ids_are_transformers_without_special_tokens(tmp_path: Path, algorithm: str) -> None:
    file = train(tmp_path / "t", algorithm)
    mine, theirs = open_tokenizer(file), AutoTokenizer.from_pretrained(tmp_path / "t")
    assert isinstance(mine, HuggingFaceTokenizer)
    assert mine.encode(TEXTS) == [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert mine.vocab_size == len(theirs) == json_vocab_size(file)
    assert mine.eod == mine.eos == theirs.eos_token_id
    assert mine.bos == -1
    assert len(mine.encode(["fox " * 50])[0]) > 3


def test_the_text_comes_back(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(train(tmp_path / "t"))
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == TEXTS


def test_taken_with_its_config_or_with_a_token_that_the_recipe_names(tmp_path: Path) -> None:
    train(tmp_path / "t")
    target = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    settings = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "t")}
    take_tokenizer(recipe.Tokenizer(**settings), target)  # type: ignore[arg-type]
    first = open_tokenizer(target)
    take_tokenizer(recipe.Tokenizer(**settings, eod_token="<begin>"), target)  # type: ignore[arg-type]
    second = open_tokenizer(target)
    assert second.eod == first.eod + 1
    assert first.sha256 != second.sha256  # another end of document, other token files
    assert cached_tokenizer(target, second.sha256).eod == second.eod
    cached_tokenizer.cache_clear()
    with pytest.raises(UserError, match="changed while the data"):
        cached_tokenizer(target, first.sha256)


@pytest.mark.parametrize("several", [False, True])
def test_the_end_of_a_text_for_generation_ends_a_document(tmp_path: Path, several: bool) -> None:
    file = train(tmp_path / "t", config={})
    number = open_tokenizer(file).encode(["<begin>"])[0][0]
    generation = {"eos_token_id": [number, number - 1] if several else number}
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps(generation))
    wanted = recipe.Tokenizer(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t"))
    take_tokenizer(wanted, tmp_path / "taken" / "tokenizer.json")
    assert open_tokenizer(tmp_path / "taken" / "tokenizer.json").eod == number


@pytest.mark.parametrize(
    ("config", "eod_token", "message"),
    [
        (
            {},
            None,
            r"no eos_token in tokenizer_config\.json beside it, no eos_token_id in generation_config\.json",
        ),
        (None, "<stop>", "tokenizer.eod_token '<stop>': .* has no such token"),
    ],
)
def test_no_end_of_document_is_told(
    tmp_path: Path, config: dict[str, object] | None, eod_token: str | None, message: str
) -> None:
    train(tmp_path / "t", config=config)
    wanted = recipe.Tokenizer(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "t"), eod_token=eod_token
    )
    with pytest.raises(UserError, match=message):
        take_tokenizer(wanted, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [None, b"{}", b"\xff\xfe", b"[1, 2]", b'{"model": {"type": "BPE"}}'])
def test_what_is_no_tokenizer_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    for read in (open_tokenizer, json_vocab_size):
        with pytest.raises(
            UserError, match=r"tokenizer.json: (not a Hugging Face tokenizer|.*cannot be read)"
        ):
            read(path)
