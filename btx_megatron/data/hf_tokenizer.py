"""A Hugging Face ``tokenizer.json``, with what Megatron's datasets ask of a tokenizer.

Read by the package ``tokenizers`` (extra ``hf``); transformers is not needed. Ids are those of
``AutoTokenizer(...)(text, add_special_tokens=False)``: a text that spells a special token gets its id.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from btx_megatron.errors import UserError
from btx_megatron.tokenizer_json import (
    CONFIG,
    FILE,
    GENERATION,
    json_object,
    json_vocabulary,
    read_text,
    special_names,
)


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` and, beside it, the ``tokenizer_config.json`` that names its special tokens.

    Raises UserError if ``path`` is no such file, or the package that reads it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if find_spec("tokenizers") is None:
            raise UserError(f"{path}: needs the package tokenizers; install the extra 'hf'")
        import tokenizers

        content = read_text(self.path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # what the package raises is no narrower
            raise UserError(f"{path}: not a Hugging Face tokenizer ({error}); name a {FILE}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._names = special_names(self.path)
        identity = json.dumps([content, self._names], sort_keys=True)
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()
        self._numbers = self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without bos and eos."""
        # one by one: the package's batches take threads, and here a process has one core
        return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text, special tokens spelled out or left out: those of the file, and those that are named."""
        if skip_special_tokens:
            named = {self._numbers.get(name) for name in self._names.values()}
            ids = [token for token in ids if token not in named]
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @property
    def vocab_size(self) -> int:
        """The largest id and one, added tokens counted, without padding."""
        return max(self._numbers.values()) + 1

    @property
    def eod(self) -> int:
        """Ends every document: the eos token. Raises UserError where the tokenizer names none."""
        if self.eos < 0:
            raise UserError(
                f"{self.path}: no eos_token in {CONFIG} beside it; name the token that ends a document with "
                "tokenizer.eod_token"
            )
        return self.eos

    @property
    def eos(self) -> int:
        """End of sequence; -1 if there is none."""
        return self._numbers.get(self._names.get("eos_token", ""), -1)

    @property
    def bos(self) -> int:
        """Begin of sequence; no document has it; -1 if there is none."""
        return self._numbers.get(self._names.get("bos_token", ""), -1)

    @property
    def prefix(self) -> list[int]:
        """What the file itself puts before a text, as a bos token; documents here never have it."""
        whole, plain = (
            self._tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False)
        )
        return whole[: len(whole) - len(plain)] if plain and whole[-len(plain) :] == plain else []

    @property
    def pad(self) -> int:
        """-1, which no text holds: Megatron's GPTDataset masks the loss of every pad token."""
        return -1

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What distinguishes this tokenizer in the key of Megatron's dataset cache."""
        return OrderedDict({"class": type(self).__name__, "sha256": self.sha256})


def take_hf_tokenizer(source: Path, eod_token: str | None, folder: Path) -> None:
    """Check a tokenizer and write it to ``folder``; ``eod_token`` becomes its eos token.

    Raises UserError where there is no token that ends a document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = read_text(source)
    config = json_object(source.with_name(CONFIG))
    wanted = eod_token or special_names(source).get("eos_token") or _generation_eos(source)
    if wanted is not None:
        config["eos_token"] = wanted
    (folder / FILE).write_text(content, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    taken = HuggingFaceTokenizer(folder / FILE)
    if eod_token is not None and taken.eos < 0:
        raise UserError(f"tokenizer.eod_token '{eod_token}': {source} has no such token")
    if taken.eos < 0:
        raise UserError(
            f"{source}: no eos_token in {CONFIG} beside it, no eos_token_id in {GENERATION}; name the token "
            "that ends a document with tokenizer.eod_token"
        )


def _generation_eos(source: Path) -> str | None:
    """The token that ends a text for ``generate``, of several the first; None where nothing says it."""
    wanted = json_object(source.with_name(GENERATION)).get("eos_token_id")
    wanted = wanted[0] if isinstance(wanted, list) and wanted else wanted
    numbers = json_vocabulary(source) if wanted is not None else {}
    return next((token for token, number in numbers.items() if number == wanted), None)
