"""What a Hugging Face ``tokenizer.json`` and the files beside it say, without the package that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from btx_megatron.errors import UserError

FILE, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"


def tokenizer_json(path: str | Path) -> Path:
    """The ``tokenizer.json`` that a file or a folder names."""
    path = Path(path)
    return path / FILE if path.is_dir() else path


def json_vocab_size(path: Path) -> int:
    """``vocab_size`` of a ``tokenizer.json``, without the package. Raises UserError if it is none."""
    return max(json_vocabulary(path).values()) + 1


def json_vocabulary(path: Path) -> dict[str, int]:
    """Number of every token, added ones too, without the package. Raises UserError if it is none."""
    return tokens_in(read_text(path), path)


def tokens_in(text: str | bytes, where: Path) -> dict[str, int]:
    """Number of every token in the text of a ``tokenizer.json``. Raises UserError if it is none."""
    try:
        content = json.loads(text)
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram's: pairs of a token and its score
            vocabulary = {token: number for number, (token, *_) in enumerate(vocabulary)}
        numbers = vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        max(numbers.values())
        return {token: int(number) for token, number in numbers.items()}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: not a Hugging Face tokenizer; name a {FILE}") from None


def special_names(path: Path) -> dict[str, str]:
    """The special tokens (``eos_token``, ``bos_token``, ...) that lie beside a ``tokenizer.json``."""
    names = {}
    for key, value in json_object(path.with_name(CONFIG)).items():
        token = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(token, str):
            names[key] = token
    return names


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(read_text(path))
    except ValueError:
        raise UserError(f"{path}: not JSON; restore it, or take it away") from None
    return content if isinstance(content, dict) else {}


def read_text(path: Path) -> str:
    """The text of a tokenizer's file. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: tokenizer cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a Hugging Face tokenizer; name a {FILE}") from None
