"""What a router of ``MixOptions.router_init`` centroid or ridge is made from: a text of each source."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from btx_megatron.errors import UserError
from btx_megatron.mixing.plan import FROM_TEXT, MixOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class RouterText:
    """Texts on disk, for ``btx mix`` without a recipe."""

    texts: Mapping[str, Path]
    """A text file of each source."""
    tokenizer: Path | None = None
    """``tokenizer.json`` or a SentencePiece model; None: the one beside the first source."""

    @property
    def names(self) -> Collection[str]:
        """Sources that have a text."""
        return self.texts.keys()


@dataclass(frozen=True)
class RouterTokens:
    """Tokens, from the prepared data of a run."""

    tokens: Mapping[str, NDArray[np.int64]]
    """Token ids [n] of each source, at least two."""

    @property
    def names(self) -> Collection[str]:
        """Sources that have a text."""
        return self.tokens.keys()


def check_router_text(
    sources: Mapping[str, Path], options: MixOptions, text: RouterText | RouterTokens | None
) -> None:
    """Raise UserError unless every source has a text where the router needs one, and none has elsewhere."""
    if options.router_init not in FROM_TEXT:
        if text is not None:
            raise UserError(
                f"--router-text has no effect with --router-init {options.router_init}; leave it out"
            )
        return
    missing = [name for name in sources if text is None or name not in text.names]
    if missing:
        raise UserError(
            f"--router-init {options.router_init} needs a text of every expert; "
            f"give --router-text {missing[0]}=FILE"
        )
    assert text is not None
    unknown = [name for name in text.names if name not in sources]
    if unknown:
        raise UserError(f"--router-text {unknown[0]}: no such expert; there are {', '.join(sources)}")
