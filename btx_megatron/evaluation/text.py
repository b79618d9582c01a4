"""A user's text as tokens, for what looks at a checkpoint alone: no recipe, no prepared data."""

from __future__ import annotations

from pathlib import Path

from btx_megatron.errors import UserError


def tokenizer_file(folder: Path, given: Path | None, option: str = "--tokenizer") -> Path:
    """``given``, else the tokenizer beside the weights, else that of the run they lie in.

    Raises UserError where there is none; ``option`` is the one that names it.
    """
    if given is not None:
        if not given.is_file():
            raise UserError(f"{given}: no such file; name a tokenizer.json or a SentencePiece model")
        return given
    places = [folder, folder.parent / "tokenizer"]  # of Hugging Face, of Megatron
    beside = [place / name for place in places for name in ("tokenizer.json", "tokenizer.model")]
    of_run = [
        parent / "data" / "tokenizer" / name
        for parent in folder.absolute().parents
        for name in ("tokenizer.json", "tokenizer.model")
    ]
    for path in (*beside, *of_run):
        if path.exists():
            return path
    raise UserError(f"{folder}: no tokenizer beside the weights; name one with {option} PATH")


def encode_file(tokenizer: Path, text: Path) -> list[int]:
    """Token ids of a text file, without bos. Raises UserError for a file that is no text, or of one token."""
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{text}: cannot be read ({error.strerror}); name a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{text}: not UTF-8 (byte {error.start}); name a text file") from None
    from btx_megatron.data.tokenizer import open_tokenizer

    ids = open_tokenizer(tokenizer).encode([content])[0]
    if len(ids) < 2:
        raise UserError(f"{text}: {len(ids)} tokens; a loss needs at least 2")
    return ids
