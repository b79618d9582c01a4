"""One SentencePiece tokenizer for all models: trained on the union of the domains, or given.

What is trained keeps every byte: no normalisation, no added space, runs of spaces, tabs and newlines
are text like any other, and what has no piece is spelled in byte pieces. Only so can a language model
learn code. Special ids are Llama's: unk 0, bos 1, eos 2, no pad.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from btx_megatron import recipe
from btx_megatron.data.hf_tokenizer import HuggingFaceTokenizer, take_hf_tokenizer
from btx_megatron.data.segments import Segments
from btx_megatron.errors import UserError
from btx_megatron.tokenizer_json import tokenizer_json

SPACE_SIGN = "\u2581"  # SentencePiece's own sign for a space: as text it would come back as one
UNKNOWN_SIGN = "\u2585"  # its sign for unknown: a training text that has it would be left out, whole
TRAINING_THREADS = 4  # a constant, because it is written into the model file


class Tokenizer:
    """A SentencePiece model, with what Megatron's datasets ask of a tokenizer.

    Raises UserError if ``path`` is not a SentencePiece model with an end-of-sentence piece.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: tokenizer model cannot be read ({error.strerror})") from None
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(f"{path}: not a SentencePiece model; name a .model file") from None
        if self._pieces.eos_id() < 0:
            raise UserError(f"{path}: has no end-of-sentence piece, which must end every document")
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._space_sign_ids = _byte_pieces(self._pieces, SPACE_SIGN)
        self._model = model

    @functools.cached_property
    def _segments(self) -> Segments:
        """Made when the first text is encoded: reading 32,000 pieces takes a tenth of a second."""
        return Segments(self._model)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without bos and eos."""
        if self._space_sign_ids is None or not any(SPACE_SIGN in text for text in texts):
            return self._encode_plain(texts)
        return [self._encode_around_space_signs(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text; bos and eos are no part of it, and unknown ones are not with ``skip_special_tokens``.

        For a tokenizer trained here ``decode(encode([text])[0]) == text``.
        """
        unknown = self._pieces.unk_id() if skip_special_tokens else None
        return self._pieces.decode([token for token in ids if token != unknown])

    @property
    def vocab_size(self) -> int:
        """Pieces, without padding."""
        return self._pieces.get_piece_size()

    @property
    def eod(self) -> int:
        """Ends every document: SentencePiece's eos."""
        return self._pieces.eos_id()

    @property
    def eos(self) -> int:
        """End of sentence."""
        return self._pieces.eos_id()

    @property
    def bos(self) -> int:
        """Begin of sentence; no document has it."""
        return self._pieces.bos_id()

    @property
    def prefix(self) -> list[int]:
        """What the file itself puts before a text: nothing."""
        return []

    @property
    def pad(self) -> int:
        """-1, which no text holds: Megatron's GPTDataset masks the loss of every pad token."""
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What distinguishes this tokenizer in the key of Megatron's dataset cache."""
        return OrderedDict({"class": type(self).__name__, "sha256": self.sha256})

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        cut = [self._segments.cut(text) for text in texts]
        # One thread: as many cores as there are processes are used, and no more.
        encoded = iter(self._pieces.encode([segment for text in cut for segment in text], num_threads=1))
        return [list(itertools.chain.from_iterable(itertools.islice(encoded, len(t)))) for t in cut]

    def _encode_around_space_signs(self, text: str) -> list[int]:
        parts = self._encode_plain(text.split(SPACE_SIGN))
        sign = self._space_sign_ids or []
        return parts[0] + [token for part in parts[1:] for token in itertools.chain(sign, part)]


AnyTokenizer = Tokenizer | HuggingFaceTokenizer


def open_tokenizer(path: Path) -> AnyTokenizer:
    """The tokenizer in a file: a ``.json`` is Hugging Face's, all else SentencePiece's. Raises UserError."""
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else Tokenizer(path)


@functools.lru_cache(maxsize=1)
def cached_tokenizer(path: Path, sha256: str) -> AnyTokenizer:
    """The tokenizer at ``path``, read once by a process that encodes many documents.

    ``sha256`` is that of the model file: without it another model, later at the same path, would not
    be seen. Raises UserError if the file is not that one.
    """
    tokenizer = open_tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise UserError(f"{path}: changed while the data was being prepared; run it again")
    return tokenizer


def train_tokenizer(texts: Iterable[str], config: recipe.Tokenizer, path: Path) -> None:
    """Train ``config.vocab_size`` pieces on ``texts`` and write the model to ``path``.

    Raises UserError, naming tokenizer.vocab_size, where the text has too few different pieces for it
    or it is too small for the characters and bytes.
    """
    model = io.BytesIO()
    reserved = re.compile(f"[{SPACE_SIGN}{UNKNOWN_SIGN}]")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(reserved.sub(" ", text) for text in texts),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            num_threads=TRAINING_THREADS,
            max_sentence_length=2**30,  # bytes, the most there is: a "sentence" is a whole document
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), config) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def take_tokenizer(config: recipe.Tokenizer, path: Path) -> None:
    """Check ``config.tokenizer_model`` and copy it to ``path``, its special tokens' names beside it."""
    assert config.tokenizer_model is not None
    if config.tokenizer_type == "HuggingFaceTokenizer":
        take_hf_tokenizer(tokenizer_json(config.tokenizer_model), config.eod_token, path.parent)
        return
    try:
        Tokenizer(config.tokenizer_model)
    except UserError as error:
        raise UserError(f"tokenizer.tokenizer_model: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config.tokenizer_model, path)


def _byte_pieces(pieces: sentencepiece.SentencePieceProcessor, text: str) -> list[int] | None:
    """Ids that spell ``text`` in byte pieces; None if the model has none."""
    ids = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode("utf-8")]
    return ids if all(pieces.is_byte(token) for token in ids) else None


def _training_error(message: str, config: recipe.Tokenizer) -> Exception:
    too_many = re.search(r"Vocabulary size too high.*?<= (\d+)", message, re.DOTALL)
    if too_many:
        fix = f"the text holds no more than {too_many[1]}; lower it, or give more text"
    elif "vocab" in message.lower():
        fix = "it has no room for the bytes and characters of the text; raise it"
    else:
        return RuntimeError(f"SentencePiece could not be trained: {message}")
    return UserError(f"tokenizer.vocab_size: {config.vocab_size} pieces cannot be trained: {fix}")
