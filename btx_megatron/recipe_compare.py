"""The recipe's ``compare``: what ``btx compare`` trains, and what is expected of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LEAST_LOAD = "least_load"
"""What a prediction may speak of beside a domain's loss and the mean."""

TASK = "task:"
"""Before the name of a task, of which a prediction may speak, too."""


@dataclass
class Prediction:
    """What is expected of two rows, written down before anything runs."""

    claim: str = ""
    """In words, as the report repeats it."""
    rows: list[str] = field(default_factory=list)
    """Two rows of the comparison's table: names of variants, or of other models, as ``expert:math``."""
    expect: Literal["lower", "higher", "equal"] = "lower"
    """The first row's value beside the second's."""
    within: float = 0.0
    """With ``equal``: what difference counts as none."""
    measure: str = "mean"
    """The value: held-out loss of a domain or their ``mean``; ``least_load``: the share of the routes that
    the least used expert takes, over all layers and domains, as a multiple of an even share; ``task:NAME``:
    of ``evaluate.tasks``."""


@dataclass
class Compare:
    """``btx compare``: variants of the recipe from one seed and one set of experts, over random seeds."""

    variants: dict[str, list[str]] = field(default_factory=dict)
    """Name -> overrides, written as on the command line; [] is the recipe as it stands. Differences are
    told from the first."""
    random_seeds: list[int] = field(default_factory=lambda: [1234])
    """Each is a comparison of its own, with a seed model and experts of its own; data and tokenizer are the
    same. It takes the place of every ``training.seed``, and where these are used of ``mix.random_seed`` and
    ``moe.moe_router_seed``."""
    match: Literal["tokens", "flops"] | None = None
    """Train every variant's last stage for so long that the variant takes as many tokens or training FLOPs
    beyond the seed as the first one. Null: as long as the recipe says."""
    predictions: list[Prediction] = field(default_factory=list)
    """Each is reported as seen, not seen or undecided."""
