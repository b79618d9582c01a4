"""A SentencePiece model as a ``tokenizer.json``, which cuts every text into the same tokens.

SentencePiece writes a space as U+2581 and looks a character without a piece up byte by byte. Here the pieces
get their real spaces back, so that no text needs to be rewritten and a U+2581 of the text is a character like
any other, spelled in bytes, as ``data.tokenizer`` spells it. (What transformers makes of a ``.model`` file
itself takes that sign for a space.)

Of BPE every way to make a piece of two becomes a merge; of two merges the one of the better piece comes
first, as in SentencePiece. Of a unigram model the scores are taken over; where two ways to cut a text are
equally likely up to rounding, the other one may be chosen. A model file is a Protocol Buffer, of which the
few fields that matter are read here: field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from btx_megatron.errors import UserError

_SPACE_SIGN = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True)
class Piece:
    """A token: its text with U+2581 for a space, its score, and what kind it is."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a ``.model`` file says."""

    pieces: tuple[Piece, ...]
    """Number i is the i-th."""
    algorithm: int
    byte_fallback: bool
    bos: str
    eos: str
    normalizes: bool
    """Characters are replaced by others."""
    dummy_prefix: bool
    """Text is read with a space in front."""
    removes_spaces: bool
    escapes_spaces: bool

    def control(self, text: str) -> str | None:
        """``text`` where it is a control token."""
        return text if any(piece.text == text and piece.kind == _CONTROL for piece in self.pieces) else None


def parse(content: bytes, where: str) -> SentencePieceModel:
    """Read a ``.model`` file. Raises UserError where it is none."""
    try:
        return _parse(content)
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, struct.error):
        raise UserError(f"{where}: not a SentencePiece model; restore the file") from None


def _parse(content: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(content):
        if number == 1:
            of = dict(_fields(value))
            score = struct.unpack("<f", of[2])[0] if 2 in of else 0.0
            pieces.append(Piece(of[1].decode(), score, of.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceModel(
        tuple(pieces),
        algorithm=trainer.get(3, _UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        bos=trainer.get(46, b"<s>").decode(),
        eos=trainer.get(47, b"</s>").decode(),
        normalizes=bool(normalizer.get(2)),
        dummy_prefix=bool(normalizer.get(3, 1)),
        removes_spaces=bool(normalizer.get(4, 1)),
        escapes_spaces=bool(normalizer.get(5, 1)) and not trainer.get(24, 0),
    )


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a Protocol Buffer's message: number and value; fixed sizes and lengths as bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        if key & 7 == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            length, at = _varint(content, at)
        else:
            length = {1: 8, 5: 4}[key & 7]
        if at + length > len(content):
            raise ValueError("cut short")
        yield key >> 3, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def why_not_equal(model: SentencePieceModel) -> str | None:
    """What of a model ``tokenizer_json`` cannot say; None: nothing."""
    kinds = {piece.kind for piece in model.pieces}
    scores = [piece.score for piece in model.pieces if piece.kind == _NORMAL and len(piece.text) > 1]
    if model.normalizes:
        return "it normalises text"
    if model.removes_spaces:
        return "it removes spaces"
    if not model.escapes_spaces:
        return "it treats spaces in a way of its own"
    if not model.byte_fallback or sum(piece.kind == _BYTE for piece in model.pieces) != 256:
        return "it has no byte pieces"
    if model.algorithm not in (_BPE, _UNIGRAM) or not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        return "it has user-defined pieces, or another algorithm than bpe and unigram"
    if model.algorithm == _BPE and len(set(scores)) < len(scores):
        return "pieces of it have one score"
    return None


def tokenizer_json(model: SentencePieceModel) -> dict[str, Any]:
    """``tokenizer.json`` of a model of which ``why_not_equal`` says None."""
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(number, piece.text)
            for number, piece in enumerate(model.pieces)
            if piece.kind in (_UNKNOWN, _CONTROL)
        ],
        "normalizer": _dummy_prefix() if model.dummy_prefix else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model) if model.algorithm == _BPE else _unigram(model),
    }


def tokenizer_config(model: SentencePieceModel) -> dict[str, Any]:
    """``tokenizer_config.json``: no bos or eos is added, and "</s>" in a text is text, as in training."""
    unknown = next((piece.text for piece in model.pieces if piece.kind == _UNKNOWN), None)
    special = {
        "bos_token": model.control(model.bos),
        "eos_token": model.control(model.eos),
        "unk_token": unknown,
    }
    exact = why_not_equal(model) is None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast" if exact else "LlamaTokenizer",
        **{key: token for key, token in special.items() if token is not None},
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


def _added_token(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


def _dummy_prefix() -> dict[str, Any]:
    """A space in front of the text, and (as in ``data.tokenizer``) of what follows a U+2581."""
    replaced = (
        ("\\A (?=" + _SPACE_SIGN + ")", ""),
        (f"{_SPACE_SIGN}(?=[^{_SPACE_SIGN}])", _SPACE_SIGN + " "),
    )
    return {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": " "},
            *({"type": "Replace", "pattern": {"Regex": old}, "content": new} for old, new in replaced),
        ],
    }


def _names(model: SentencePieceModel) -> list[str]:
    """The tokens by number, with real spaces."""
    return [
        piece.text.replace(_SPACE_SIGN, " ") if piece.kind == _NORMAL else piece.text
        for piece in model.pieces
    ]


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    names = _names(model)
    scores = {
        name: piece.score for name, piece in zip(names, model.pieces, strict=True) if piece.kind == _NORMAL
    }
    merges = [
        [name[:cut], name[cut:]]
        for name in sorted(scores, key=lambda name: -scores[name])
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next((piece.text for piece in model.pieces if piece.kind == _UNKNOWN), None),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {name: number for number, name in enumerate(names)},
        "merges": merges,
    }


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    """The names of byte and control pieces are no text, so these must cost more than any other spelling."""
    longest = max(len(piece.text) for piece in model.pieces if piece.kind != _NORMAL)
    worst = min((piece.score for piece in model.pieces if piece.kind == _NORMAL), default=0.0)
    never = (longest + 2) * min(worst, -1.0)
    vocabulary = [
        [name, piece.score if piece.kind == _NORMAL else never]
        for name, piece in zip(_names(model), model.pieces, strict=True)
    ]
    unknown = next((n for n, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN), None)
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": True}
