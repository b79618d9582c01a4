"""The recipe's ``mix``: how N dense models become one mixture, and how many experts of what width it has.

The words are those of ``btx mix``, whose engine does the work. Here is only what has to be known before
anything is mixed, without torch: the number of experts, their width, their names, which model each is from.

experts  number  width  names, of sources a and b with 2 chunks, 2 copies
stack    N       F      a, b
split    N C     F/C    a.0, a.1, b.0, b.1                         source.chunk
blend    N       F      blend.0, blend.1
copies   N M     F      a.0, a.1, b.0, b.1                         source.copy
virtual  N M C   F/C    a.0.0, a.0.1, a.1.0, a.1.1, b.0.0, ...     source.copy.chunk
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

MEASURED_FROM_SEED = ("base", "ties", "dare")
"""Averages that need the seed, whether or not it is an expert."""
ROUTERS_FROM_TEXT = ("centroid", "ridge")
"""Routers that are made from samples of the models' training tokens."""


@dataclass
class Mix:
    """N dense experts become one MoE (paper, section 3.2)."""

    average: Literal["mean", "weighted", "base", "ties", "dare"] = "mean"
    """How all weights but the experts' are merged. mean: the equal-weight mean, in fp32, rounded once.
    weighted: by ``weights``. base: the seed's own weights. ties, dare: the differences from the seed, by TIES
    (arXiv 2306.01708) or DARE (arXiv 2311.03099). The row ``average`` is merged in the same way (with base,
    where it would be the seed again, by the mean)."""
    weights: dict[str, float] = field(default_factory=dict)
    """For weighted, ties and dare: weight of each domain's model, and of ``seed``; 1 where none is given."""
    density: float = 0.5
    """For ties and dare: share of each weight's differences that are kept."""
    include_seed: bool = True
    """The seed joins as one more expert, the generalist, and takes part in the mean."""
    experts: Literal["stack", "split", "blend", "copies", "virtual"] = "stack"
    """stack: each model's feed-forward is an expert. split: it is cut in ``chunks`` experts. blend: expert n
    is the n-th chunk of every model's feed-forward (paper, appendix). copies: it is there ``copies`` times.
    virtual: both, a copy's chunks with one router row (virtual groups, arXiv 2410.07524)."""
    chunks: int = 1
    """For split and virtual: experts that one feed-forward is cut into; their width is that part of
    ``model.ffn_hidden_size``."""
    copies: int = 1
    """For copies and virtual: how often each model's feed-forward is there."""
    drop_ratio: float = 0.0
    """Share of each expert's units that are drawn anew (Drop-Upcycling, arXiv 2502.19261); 0: none."""
    virtual_scale: Literal["exact", "cube-root"] = "exact"
    """For virtual: how the weights grow so that the MoE starts as the dense model. exact: up and down
    projections, by the square root. cube-root: as in the paper, the gate too, which SiLU bends."""
    router_init: Literal["normal", "zero", "centroid", "ridge"] = "normal"
    """normal: N(0, router_std), drawn per layer from ``random_seed``. zero: all logits equal, for a router
    that takes all experts. centroid, ridge: rows from what the averaged model makes of a sample of each
    model's training tokens: their mean, or a ridge regression of whose they are (arXiv 2603.29765)."""
    router_std: float = 0.02
    """Standard deviation of the new router. Small, so that training, not chance, decides the routes:
    after an RMSNorm the logits' spread is about router_std * sqrt(hidden_size)."""
    random_seed: int = 1234
    """Seed of all that is drawn: router, dare, drop_ratio, and the sample for centroid and ridge."""

    grow_from: str | None = None
    """The mixture to grow, or shrink, instead of mixing anew: the run folder of a finished btx run, or a
    checkpoint of a MoE in any format. Experts are trained for those domains that it has no expert of. Of a
    run, seed and tokenizer are taken, too. A relative path starts at the recipe."""
    grow_experts: list[str] = field(default_factory=list)
    """Names of that mixture's experts, in the order of its router's rows; of a run they are known."""
    grow_share: float | None = None
    """Share of each new expert in all weights but the experts': (1 - k share) old + share sum new, of k new
    ones. Null: 1 / (experts kept + k)."""
    drop: list[str] = field(default_factory=list)
    """Experts of that mixture that are left out, by name."""

    @property
    def kept_experts(self) -> list[str]:
        """Experts of the mixture that is grown which stay, in its order; [] where none is grown."""
        return [name for name in self.grow_experts if name not in self.drop]

    @property
    def experts_a_source(self) -> int:
        """Experts that each of the mixed models gives; with blend no expert is of one model."""
        return self.copies * self.chunks

    def expert_width(self, ffn_hidden_size: int) -> int:
        """Feed-forward width of an expert."""
        return ffn_hidden_size // self.chunks

    def expert_names(self, sources: Sequence[str]) -> list[str]:
        """Names of the experts, in the order of the router's rows."""
        if self.experts == "stack":
            return list(sources)
        if self.experts == "blend":
            return [f"blend.{number}" for number in range(len(sources))]
        copies, chunks = range(self.copies), range(self.chunks)
        if self.experts == "virtual":
            return [f"{source}.{copy}.{chunk}" for source in sources for copy in copies for chunk in chunks]
        parts = range(self.experts_a_source)
        return [f"{source}.{part}" for source in sources for part in parts]

    def expert_groups(self, sources: int) -> list[int]:
        """Number of the source that each expert is from; [] with blend, where each is from all."""
        if self.experts == "blend":
            return []
        return [source for source in range(sources) for _ in range(self.experts_a_source)]


def draws(mix: Mix) -> bool:
    """Whether anything is drawn at random."""
    return mix.router_init != "zero" or mix.average == "dare" or mix.drop_ratio > 0
