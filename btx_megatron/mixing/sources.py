"""The sources of a mix, opened and compared: what they say of their models, and their tokenizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import config_of, open_checkpoint
from btx_megatron.checkpoints.megatron_args import SaysNothing
from btx_megatron.checkpoints.pieces import Source
from btx_megatron.checkpoints.stream import Watched
from btx_megatron.errors import UserError
from btx_megatron.mixing.plan import BASE, TokenizerOf
from btx_megatron.mixing.source_tokenizers import ResultTokenizer, shared_tokenizer, united_tokenizer


@dataclass
class Opened:
    """The sources of a mix, opened and found to fit together."""

    sources: dict[str, Watched]
    base: Watched | None
    config: ModelConfig | None
    """None where no source says what model it is; then it cannot leave its format."""
    tokenizer: ResultTokenizer

    @property
    def all(self) -> dict[str, Watched]:
        """Sources and base by name."""
        return {**self.sources, **({BASE: self.base} if self.base is not None else {})}


def open_sources(
    paths: Mapping[str, Path], base: Path | None, tokenizer: TokenizerOf | None = None
) -> Opened:
    """Open the sources and compare what they say of their models. Raises UserError where they differ.

    ``tokenizer`` is that of MixOptions; None where only one will do.
    """
    sources = {name: Watched(open_checkpoint(path)) for name, path in paths.items()}
    watched_base = Watched(open_checkpoint(base)) if base is not None else None
    opened = Opened(sources, watched_base, None, ResultTokenizer())
    checked = {name: watched.source for name, watched in opened.all.items()}
    configs = {name: config for name, source in checked.items() if (config := _config(source)) is not None}
    first = next(iter(configs), "")
    for second, other in configs.items():
        if difference := configs[first].difference(other):
            raise _not_of_one_model(first, second, difference)
    config = next(iter(configs.values()), None)
    if tokenizer == "union":
        opened.tokenizer = united_tokenizer({name: checked[name] for name in sources}, config)
    else:
        opened.tokenizer = shared_tokenizer(checked, hint=tokenizer is not None)
        known = {name: of for name, of in configs.items() if of.vocab_size is not None}
        first = next(iter(known), "")
        for second, other in known.items():
            if other.vocab_size != known[first].vocab_size:
                difference = "vocab_size", known[first].vocab_size, other.vocab_size
                raise _not_of_one_model(first, second, difference)
        if config is not None and known:
            config = replace(config, vocab_size=known[first].vocab_size)
    opened.config = opened.tokenizer.completed(config)
    return opened


def _not_of_one_model(first: str, second: str, difference: tuple[str, Any, Any]) -> UserError:
    key, there, here = difference
    return UserError(
        f"{key} is {there} in expert {first} and {here} in expert {second}: "
        "experts must be branches of one model"
    )


def source_bytes(source: Source) -> int:
    """What all weights of a checkpoint take."""
    return sum(math.prod(info.shape) * info.dtype.itemsize for info in source.tensors.values())


def _config(source: Source) -> ModelConfig | None:
    try:
        return config_of(source)
    except SaysNothing:
        return None
