"""One vocabulary for experts that added tokens of their own: which number a token gets, whose a row is.

    common    the model's vocabulary, and the added tokens that follow it with one number in all experts
    further   every other added token, in the experts' order, each once, from the next number on

A common row is averaged over all experts, to the bit as in a plain mix; a further one over those that have
the token, wherever it lies in each of them. Rows of an expert that are no token (padding behind its last one)
are left out. Everything here works on parsed ``tokenizer.json`` files and knows no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from btx_megatron.errors import UserError

Rows = Callable[[int, int], Tensor]
Average = Callable[[Iterable[Tensor], Sequence[int]], Tensor]
"""Average of tensors, which come one by one; with the numbers of the experts that they are from."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_REWRITES = ("normalizer", "pre_tokenizer")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one ``tokenizer.json``."""

    tokens: Mapping[str, int]
    """Those of the model."""
    added: Mapping[str, Mapping[str, Any]]
    """Entries of ``added_tokens`` by content, in order of numbers; some are tokens of the model, too."""
    cutting: Mapping[str, Any]
    """Everything else that decides how a text is cut."""


@dataclass(frozen=True)
class Run:
    """Rows of the result that the same experts have, one after the other in each."""

    start: int
    stop: int
    members: tuple[tuple[int, int], ...]
    """Number of an expert, and its row that is the first."""


@dataclass(frozen=True)
class VocabularyUnion:
    """The vocabulary of all experts together."""

    names: tuple[str, ...]
    """The experts."""
    runs: tuple[Run, ...]
    """They cover the rows 0 to ``size`` in order."""
    added: tuple[Mapping[str, Any], ...]
    """``added_tokens`` of the result."""
    numbers: Mapping[str, int]
    """Of every added token that is none of the model's."""
    moved: tuple[Mapping[int, str], ...]
    """Of each expert: its numbers that are another's in the result, and their tokens."""

    @property
    def size(self) -> int:
        """Rows of the result."""
        return self.runs[-1].stop

    def table(self) -> list[dict[str, Any]]:
        """For the manifest: rows of the result, and the first row of each expert that has them."""
        return [
            {"rows": [run.start, run.stop], "from": {self.names[who]: row for who, row in run.members}}
            for run in self.runs
        ]


def parse_vocabulary(tokenizer: Mapping[str, Any], where: str) -> Vocabulary:
    """Read a ``tokenizer.json``. Raises UserError where a token has two numbers, or a number two tokens."""
    try:
        return _parse(tokenizer, where)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(f"{where}: no tokenizer of Hugging Face's form; restore it") from None


def _parse(tokenizer: Mapping[str, Any], where: str) -> Vocabulary:
    model = tokenizer.get("model")
    stored = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(stored, list):  # Unigram's, with scores
        stored = {str(entry[0]): number for number, entry in enumerate(stored)}
    if not isinstance(model, dict) or not isinstance(stored, dict) or not stored:
        raise UserError(f"{where}: has no model.vocab; a Hugging Face tokenizer is needed")
    contents = _by_number(stored, where)
    added: dict[str, Mapping[str, Any]] = {}
    for entry in sorted(tokenizer.get("added_tokens") or [], key=lambda entry: int(entry["id"])):
        content, number = str(entry["content"]), int(entry["id"])
        other = contents.setdefault(number, content)
        if other != content or stored.get(content, number) != number or content in added:
            raise UserError(
                f"{where}: added token {content!r} has the number {number}, which is {other!r}, or is there "
                "twice; one number is one token"
            )
        added[content] = entry
    cutting = {**{key: _plain(model, key) for key in model}, **{key: tokenizer.get(key) for key in _REWRITES}}
    return Vocabulary(stored, added, {key: value for key, value in cutting.items() if value})


def _by_number(tokens: Mapping[str, int], where: str) -> dict[int, str]:
    contents: dict[int, str] = {}
    for content, number in tokens.items():
        if not isinstance(number, int) or number < 0 or number in contents:
            raise UserError(
                f"{where}: token {content!r} has the number {number}, which is no number or "
                f"{contents.get(number)!r}, too; restore it"
            )
        contents[number] = content
    return contents


def _plain(model: Mapping[str, Any], key: str) -> Any:
    """A merge is written as a pair, or as two words; null and false are the same as nothing."""
    if key == "merges":
        return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model[key]]
    return None if key == "vocab" and isinstance(model[key], dict) else model[key]


def difference(one: Vocabulary, other: Vocabulary) -> str | None:
    """What keeps two vocabularies apart, beside numbers and flags of added tokens; None: nothing."""
    if one.tokens != other.tokens:
        for content, number in one.tokens.items():
            if other.tokens.get(content) != number:
                return f"token {content!r} is number {number} and {other.tokens.get(content, 'none')}"
        return f"token {min(set(other.tokens) - set(one.tokens))!r} is in one of them alone"
    for key in sorted({*one.cutting, *other.cutting}):
        if one.cutting.get(key) != other.cutting.get(key):
            return f"{key} differs"
    return None


def unite(vocabularies: Mapping[str, Vocabulary]) -> VocabularyUnion:
    """The union of experts' vocabularies, in their order.

    Raises UserError, naming the expert and the token, where the models' vocabularies are not the same, or one
    token has different flags.
    """
    names, (first, *_) = tuple(vocabularies), vocabularies.values()
    for name, vocabulary in vocabularies.items():
        found = difference(first, vocabulary)
        if found is not None:
            raise UserError(f"--tokenizer union: experts {names[0]} and {name}: {found}; {_NEEDED}")
    entries = _entries(vocabularies)
    common = _common_rows(list(vocabularies.values()))
    further = [
        content
        for content, entry in entries.items()
        if content not in first.tokens and not _is_common(content, vocabularies, common)
    ]
    numbers = {
        content: int(entry["id"])
        for content, entry in entries.items()
        if content not in first.tokens and content not in set(further)
    }
    numbers |= {content: common + place for place, content in enumerate(further)}
    everyone = tuple((who, 0) for who in range(len(names)))
    owners = [_owners(content, vocabularies) for content in further]
    added = ({**entry, "id": numbers.get(content, entry["id"])} for content, entry in entries.items())
    return VocabularyUnion(
        names,
        tuple(_joined(Run(0, common, everyone), common, owners)),
        tuple(sorted(added, key=lambda entry: entry["id"])),
        numbers,
        tuple(_moved(vocabulary, numbers) for vocabulary in vocabularies.values()),
    )


_NEEDED = "only added tokens may differ"


def _entries(vocabularies: Mapping[str, Vocabulary]) -> dict[str, Mapping[str, Any]]:
    """Every added token, in the experts' order, as the first that has it writes it."""
    entries: dict[str, Mapping[str, Any]] = {}
    owner: dict[str, str] = {}
    for name, vocabulary in vocabularies.items():
        for content, entry in vocabulary.added.items():
            there = entries.setdefault(content, entry)
            owner.setdefault(content, name)
            for flag in _FLAGS:
                if bool(there.get(flag)) != bool(entry.get(flag)):
                    raise UserError(
                        f"--tokenizer union: added token {content!r}: {flag} is {bool(there.get(flag))} in "
                        f"expert {owner[content]}, {bool(entry.get(flag))} in expert {name}; make them equal"
                    )
    return entries


def _common_rows(vocabularies: Sequence[Vocabulary]) -> int:
    """Rows up to the last token of the model, and the added ones right behind it that all have alike."""
    shared = set.intersection(
        *({(content, int(entry["id"])) for content, entry in of.added.items()} for of in vocabularies)
    )
    numbers = {number for _, number in shared}
    rows = max(vocabularies[0].tokens.values()) + 1
    while rows in numbers:
        rows += 1
    return rows


def _is_common(content: str, vocabularies: Mapping[str, Vocabulary], common: int) -> bool:
    entries = [of.added.get(content) for of in vocabularies.values()]
    numbers = {None if entry is None else int(entry["id"]) for entry in entries}
    return len(numbers) == 1 and all(number is not None and number < common for number in numbers)


def _owners(content: str, vocabularies: Mapping[str, Vocabulary]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (who, int(of.added[content]["id"]))
        for who, of in enumerate(vocabularies.values())
        if content in of.added
    )


def _joined(first: Run, at: int, owners: Sequence[tuple[tuple[int, int], ...]]) -> Iterator[Run]:
    """``first``, and the rows behind it, each with its members: as few runs as there can be."""
    run = first
    for row, members in enumerate(owners, start=at):
        length = run.stop - run.start
        if members == tuple((who, begin + length) for who, begin in run.members):
            run = Run(run.start, row + 1, run.members)
        else:
            yield run
            run = Run(row, row + 1, members)
    yield run


def _moved(vocabulary: Vocabulary, numbers: Mapping[str, int]) -> dict[int, str]:
    return {
        int(entry["id"]): content
        for content, entry in vocabulary.added.items()
        if numbers.get(content, int(entry["id"])) != int(entry["id"])
    }


def check_rows(union: VocabularyUnion, rows: Mapping[str, int]) -> None:
    """Raise UserError where an expert's embedding (``rows`` by name) has no row for one of its tokens."""
    for run in union.runs:
        for who, first in run.members:
            name, needed = union.names[who], first + run.stop - run.start
            if rows[name] < needed:
                raise UserError(
                    f"--tokenizer union: expert {name} has {rows[name]} rows in its embedding and a token of "
                    f"number {needed - 1}; resize its embedding"
                )


def united_rows(union: VocabularyUnion, inputs: Sequence[Rows], average: Average) -> Rows:
    """Rows of the result [stop - start, hidden] from those of the experts, ``inputs`` in their order."""

    def rows(start: int, stop: int) -> Tensor:
        parts = []
        for run in union.runs:
            first, last = max(start, run.start), min(stop, run.stop)
            if first < last:
                skipped, length = first - run.start, last - first
                begins = [(inputs[who], row + skipped) for who, row in run.members]
                tensors = (read(begin, begin + length) for read, begin in begins)
                parts.append(average(tensors, [who for who, _ in run.members]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return rows
