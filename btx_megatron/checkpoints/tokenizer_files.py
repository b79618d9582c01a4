"""The files of a tokenizer, and what else of a model is no weight: found in every format, carried to all.

    HF/tokenizer.json, generation_config.json, ...      beside the weights
    CKPT/tokenizer/tokenizer.json, ...                  beside the tracker of a Megatron checkpoint
    RUN/data/tokenizer/tokenizer.model                  of the run whose stage the checkpoint is

A folder CKPT/tokenizer is itself what ``transformers.AutoTokenizer`` and Megatron-LM's HuggingFaceTokenizer
take. A run's SentencePiece model travels with a ``tokenizer.json`` that cuts text in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btx_megatron.checkpoints import sentencepiece_json
from btx_megatron.checkpoints.tracker import TRACKER
from btx_megatron.durable import write_durably
from btx_megatron.errors import UserError

FOLDER = "tokenizer"
JSON, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
GENERATION = "generation_config.json"
NAMES = (
    JSON, MODEL, CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", GENERATION,
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """What lies beside a checkpoint's weights."""

    folder: Path
    """Where, for messages."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Content by name."""
    of_run: bool = False
    """It is the tokenizer of the run that the checkpoint is a stage of."""
    note: str | None = None
    """What is not equal to the tokenizer that the run used."""

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file. Raises UserError where there is none."""
        return parse_object(self.files[name], self.folder / name)


def find_tokenizer(folder: Path) -> TokenizerFiles:
    """The files that belong to the checkpoint whose weights lie in ``folder``; none are no error.

    Raises UserError for a run's tokenizer that is damaged.
    """
    beside = folder.parent / FOLDER
    if (folder / "config.json").exists():
        return _read(folder)
    if (folder.parent / TRACKER).exists() and beside.is_dir():
        return _read(beside)
    is_stage = folder.parent.name == "checkpoints"  # RUN/STAGE/checkpoints/iter_0000100
    for above in folder.absolute().parents if is_stage else ():
        if (above / "recipe.yaml").exists():
            return _of_run(above / "data" / FOLDER)
    return TokenizerFiles(folder)


def write_tokenizer(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files into a folder, which is made where there are some."""
    if files:
        folder.mkdir(exist_ok=True)
    for name, content in files.items():
        write_durably(folder / name, content)


def special_ids(found: TokenizerFiles) -> tuple[int | None, int | None]:
    """The numbers of bos and eos as ``tokenizer_config.json`` names the tokens; None for one without.

    Raises UserError for files that are no JSON.
    """
    if JSON not in found.files or CONFIG not in found.files:
        return None, None
    config, tokenizer = found.json(CONFIG), found.json(JSON)
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    numbers = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    numbers |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    bos, eos = (_content(config.get(key)) for key in ("bos_token", "eos_token"))
    return numbers.get(bos), numbers.get(eos)


def parse_object(content: bytes, where: Path) -> dict[str, Any]:
    """The object of a JSON text. Raises UserError where there is none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); restore it") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: holds no JSON object; restore it")
    return found


def json_text(content: Mapping[str, Any]) -> bytes:
    """A JSON file as Hugging Face writes it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _read(folder: Path) -> TokenizerFiles:
    files = {}
    for name in NAMES:
        try:
            files[name] = (folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read ({error.strerror}); restore it") from None
    return TokenizerFiles(folder, files)


def _of_run(folder: Path) -> TokenizerFiles:
    """Of a run that has a SentencePiece model alone: with what transformers needs to cut text as it did."""
    found = _read(folder)
    if JSON in found.files:
        # without a class transformers takes Llama's for its model type, and builds it anew in its own way
        plain = {CONFIG: json_text({"tokenizer_class": "PreTrainedTokenizerFast"})}
        return TokenizerFiles(folder, plain | found.files, of_run=True)
    if MODEL not in found.files:
        return TokenizerFiles(folder, found.files, of_run=True)
    model = sentencepiece_json.parse(found.files[MODEL], str(folder / MODEL))
    config = json_text(sentencepiece_json.tokenizer_config(model))
    reason = sentencepiece_json.why_not_equal(model)
    if reason is not None:
        note = f"{folder / MODEL}: {reason}, which {JSON} cannot say exactly: only the model file is written"
        return TokenizerFiles(folder, {**found.files, CONFIG: config}, of_run=True, note=note)
    made = {JSON: json_text(sentencepiece_json.tokenizer_json(model)), CONFIG: config}
    return TokenizerFiles(folder, {**found.files, **made}, of_run=True)


def _content(token: Any) -> Any:
    """Tokens are written as text, or as an object with their flags."""
    return token.get("content") if isinstance(token, dict) else token
