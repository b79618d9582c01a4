"""The tokenizers of a mix's sources: found to be one, or made one; the files of the result's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.pieces import Source
from btx_megatron.checkpoints.tokenizer_files import (
    CONFIG,
    GENERATION,
    JSON,
    MODEL,
    TokenizerFiles,
    find_tokenizer,
    json_text,
    special_ids,
)
from btx_megatron.errors import UserError
from btx_megatron.mixing.vocabulary_union import (
    VocabularyUnion,
    check_rows,
    parse_vocabulary,
    unite,
)

_EMBEDDING = "embedding.word_embeddings.weight"
_SPECIAL_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_NAMES_NUMBERS = ("ids", "sep", "cls", "pad_id", "forced_decoder_ids")
_NUMBERS_OF_TOKENS = ("token_id", "token_ids", "suppress_tokens")  # how such keys end


@dataclass(frozen=True)
class ResultTokenizer:
    """What the result's tokenizer is."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Content by name."""
    union: VocabularyUnion | None = None
    """Where experts have tokens of their own."""
    special: tuple[int | None, int | None] = (None, None)
    """Numbers of bos and eos, of a run's tokenizer; a checkpoint from elsewhere says them itself."""
    note: str | None = None
    """What is not exactly the sources'."""

    def completed(self, config: ModelConfig | None) -> ModelConfig | None:
        """The configuration with what the tokenizer knows of the model."""
        if config is None:
            return None
        if config.bos_token_id is None and config.eos_token_id is None:
            config = replace(config, bos_token_id=self.special[0], eos_token_id=self.special[1])
        return replace(config, vocab_size=self.union.size) if self.union is not None else config

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        facts: dict[str, Any] = {"vocabulary": self.union.table()} if self.union is not None else {}
        return facts | ({"tokenizer_note": self.note} if self.note is not None else {})


def shared_tokenizer(sources: Mapping[str, Source], hint: bool) -> ResultTokenizer:
    """The one tokenizer of all sources; of each file the first.

    Raises UserError where the same word has not the same number in all of them, with a ``hint`` at
    ``--tokenizer union`` where that can help.
    """
    files: dict[str, bytes] = {}
    seen: dict[str, tuple[str, TokenizerFiles, str]] = {}
    of_run: TokenizerFiles | None = None
    compared = False  # that somebody has both
    for name, source in sources.items():
        found = find_tokenizer(source.folder)
        of_run = of_run or (found if found.of_run else None)
        compared = compared or {JSON, MODEL} <= set(found.files)
        for file, content in found.files.items():
            files.setdefault(file, content)
            if file not in (JSON, MODEL):
                continue
            digest = hashlib.sha256(content).hexdigest()
            first, of_first, expected = seen.setdefault(file, (name, found, digest))
            if digest != expected:
                union = hint and file == JSON and _can_be_united(of_first, found)
                ways = "; they differ in added tokens alone: keep them all with --tokenizer union"
                whose = f"the {first[1:-1]}" if first.startswith("(") else f"expert {first}"
                raise UserError(
                    f"{found.folder / file}: another tokenizer than {whose}'s; experts must share one "
                    f"tokenizer{ways if union else ''}"
                )
    note = of_run.note if of_run is not None else None
    if len(seen) == 2 and not compared:
        note = note or f"one source has {JSON} alone, another {MODEL} alone: not known to be the same"
    return ResultTokenizer(
        files, special=special_ids(of_run) if of_run is not None else (None, None), note=note
    )


def _can_be_united(one: TokenizerFiles, other: TokenizerFiles) -> bool:
    try:
        unite({name: _vocabulary(found) for name, found in (("one", one), ("other", other))})
    except UserError:
        return False
    return True


def _vocabulary(found: TokenizerFiles) -> Any:
    return parse_vocabulary(found.json(JSON), str(found.folder / JSON))


def united_tokenizer(sources: Mapping[str, Source], config: ModelConfig | None) -> ResultTokenizer:
    """The tokenizer with the added tokens of all sources. Raises UserError where they do not fit together."""
    tokenizers = {name: find_tokenizer(source.folder) for name, source in sources.items()}
    for name, found in tokenizers.items():
        if JSON not in found.files:
            raise UserError(
                f"--tokenizer union: expert {name} ({found.folder}) has no {JSON}; every expert needs one"
            )
    union = unite({name: _vocabulary(found) for name, found in tokenizers.items()})
    check_rows(union, {name: source.tensors[_EMBEDDING].shape[0] for name, source in sources.items()})
    first, *others = tokenizers.values()
    _check_model_files(tokenizers)
    content = first.json(JSON)
    kept: dict[str, Any] = {key: content.get(key) for key in ("post_processor", "padding")}
    if GENERATION in first.files:
        kept[GENERATION] = first.json(GENERATION)
    if config is not None:
        kept["config.json"] = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    _check_numbers(kept, union, next(iter(sources)))
    files = {name: file for found in reversed(others) for name, file in found.files.items()} | first.files
    if GENERATION not in first.files:
        files.pop(GENERATION, None)  # its numbers are another's
    files[JSON] = json_text({**content, "added_tokens": list(union.added)})
    return ResultTokenizer(files | _merged(files, tokenizers, union), union)


def _check_model_files(tokenizers: Mapping[str, TokenizerFiles]) -> None:
    """A SentencePiece model beside it is the same in all that have one."""
    models = {found.files[MODEL]: found.folder for found in tokenizers.values() if MODEL in found.files}
    if len(models) > 1:
        one, other, *_ = models.values()
        raise UserError(f"--tokenizer union: {one / MODEL} and {other / MODEL} differ; {JSON} alone may")


def _check_numbers(content: Mapping[str, Any], union: VocabularyUnion, first: str) -> None:
    """Raise UserError where a file of the first expert names a token by a number that it will not have."""
    moved = union.moved[0]
    for file, value in content.items():
        for number in _numbers(value):
            if number in moved:
                raise UserError(
                    f"--tokenizer union: expert {first}'s {file} names the token {moved[number]!r} by its "
                    f"number {number}, which becomes {union.numbers[moved[number]]}; give its tokens numbers "
                    "without holes, or put another expert first"
                )


def _numbers(value: Any, named: bool = False) -> Iterator[int]:
    """Numbers of tokens, as the keys above them tell."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            wanted = key in _NAMES_NUMBERS or str(key).endswith(_NUMBERS_OF_TOKENS)
            yield from _numbers(item, wanted)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, named)
    elif named and isinstance(value, int) and not isinstance(value, bool):
        yield value


def _merged(
    files: Mapping[str, bytes], tokenizers: Mapping[str, TokenizerFiles], union: VocabularyUnion
) -> dict[str, bytes]:
    """The other files that speak of added tokens: the first's of each, with the others' tokens."""
    merged: dict[str, bytes] = {}
    for name in (CONFIG, _SPECIAL_MAP):
        contents = [found.json(name) for found in tokenizers.values() if name in found.files]
        if contents:
            content = contents[0] | {key: tokens for key in _LISTS if (tokens := _all_tokens(contents, key))}
            if any("added_tokens_decoder" in one for one in contents):
                content["added_tokens_decoder"] = {
                    str(token["id"]): {key: flag for key, flag in token.items() if key != "id"}
                    for token in union.added
                }
            merged[name] = json_text(content)
    if _ADDED in files:
        merged[_ADDED] = json_text(union.numbers)
    return merged


def _all_tokens(contents: list[dict[str, Any]], key: str) -> list[Any]:
    """A list of special tokens, each once; none where the first has named ones, which stay."""
    tokens: dict[str, Any] = {}
    for content in contents if not isinstance(contents[0].get(key), dict) else []:
        of_one = content.get(key)
        for token in of_one if isinstance(of_one, list) else []:
            tokens.setdefault(token["content"] if isinstance(token, dict) else str(token), token)
    return list(tokens.values())
