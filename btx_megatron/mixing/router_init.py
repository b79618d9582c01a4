"""The new parameters of a mix: one linear map a layer, from the hidden state to the experts, without bias.

``normal`` and ``zero`` need nothing. ``centroid`` and ``ridge`` need *features*: what the router will see
(the hidden state behind the norm in front of the feed-forward, in the averaged dense model) on text of each
source. ``FeatureSums`` takes them in a stream.

How large logits should be is a convention. Both give a similarity (a cosine; a regression's estimate of "is
this expert's", about 0 to 1) over the temperature 0.1, that of DUME (arXiv 2603.29765): where an expert leads
another by 0.1, their gates are as 0.73 to 0.27; a lead of 1, which a regression has where it is certain,
shuts the other out. This holds at any hidden size and whatever the norm's gain; with unit-length rows alone
logits would grow with sqrt(hidden_size).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from btx_megatron.errors import UserError

TEMPERATURE = 0.1


def normal_router(layer: int, num_experts: int, hidden_size: int, std: float, random_seed: int) -> Tensor:
    """[experts, hidden] from N(0, std), fp32: a pure function of its arguments.

    The paper does not state its initialisation. Behind an RMSNorm the logits have a spread of about
    std * sqrt(hidden_size).
    """
    generator = torch.Generator().manual_seed(random_seed * 1_000_003 + layer)
    return std * torch.randn(num_experts, hidden_size, generator=generator)


def zero_router(num_experts: int, hidden_size: int) -> Tensor:
    """[experts, hidden] of zeros, fp32: all logits tie.

    For soft or sampled routing alone: a top-k of ties takes the same k experts for every token, and the
    others never learn.
    """
    return torch.zeros(num_experts, hidden_size)


def centroid_router(features: Sequence[Tensor]) -> Tensor:
    """[experts, hidden], fp32: row i is the direction of the mean of ``features[i]`` [tokens, hidden].

    The unit rows are multiplied with 1 / (TEMPERATURE * r), r the root-mean-square length of all features: a
    token of that length has the logits cosine / TEMPERATURE. Raises UserError where a mean has no direction.
    """
    sums = FeatureSums(len(features), features[0].shape[-1])
    for expert, batch in enumerate(features):
        sums.add(expert, batch)
    return sums.centroid_router()


def ridge_router(gram: Tensor, moments: Tensor, strength: float) -> Tensor:
    """[experts, hidden], fp32: ridge regression of expert identity on features (DUME, 2603.29765).

    ``gram`` [hidden, hidden] is X^T X and ``moments`` [hidden, experts] is X^T Y, of features X [tokens,
    hidden] and one-hot rows Y. The estimate x (X^T X + s I)^-1 X^T Y, over TEMPERATURE, is the logit;
    s = ``strength`` times the mean diagonal of ``gram``, so that neither the number of tokens nor their
    length matters. Unlike DUME there is no bias (our router has none) and rows keep their lengths: unit
    rows would compare estimates of different scale. Solved in fp64. Raises UserError if it has no solution.
    """
    ridge = gram.double().clone()
    ridge.diagonal().add_(strength * ridge.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(ridge)
    if failed:
        raise UserError(
            "the ridge router has no solution: its features are fewer than their size, or not finite; "
            "give more text or a larger strength"
        )
    return torch.cholesky_solve(moments.double(), factor).T.div(TEMPERATURE).float()


def repeat_rows(rows: Tensor, times: int) -> Tensor:
    """[N * times, hidden] from [N, hidden]: each row ``times`` over, as ``experts.expert_units`` numbers.

    For the chunks of a split source or a virtual group, whose logits then tie: they are chosen together.
    Copies of a source tie as well: top-k then takes them before any other source, and alike they stay
    until something (drop-upcycling) tells them apart. Blended experts have no row of one source.
    """
    return rows.repeat_interleave(times, dim=0)


class FeatureSums:
    """What both data-driven routers need of the features: fp64 sums, [hidden, hidden] at most.

    Every token counts the same: give all experts about as many. Equal inputs give equal sums on one machine
    with one number of threads (a matrix product orders its sums by them; in fp64, far below fp32's digits).
    """

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        self.gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
        """X^T X [hidden, hidden]."""
        self.moments = torch.zeros(hidden_size, num_experts, dtype=torch.float64)
        """X^T Y [hidden, experts]: column i is the sum of expert i's features."""
        self.tokens = [0] * num_experts
        """Tokens seen of each expert."""

    def add(self, expert: int, features: Tensor) -> None:
        """Take a batch of the features of ``expert``, [tokens, hidden]."""
        batch = features.detach().to("cpu", torch.float64)
        self.gram.addmm_(batch.T, batch)
        self.moments[:, expert] += batch.sum(0)
        self.tokens[expert] += len(batch)

    def centroid_router(self) -> Tensor:
        """``centroid_router`` of all features taken."""
        lengths = self.moments.norm(dim=0)
        for expert, length in enumerate(lengths.tolist()):
            if not 0 < length < float("inf"):
                raise UserError(
                    f"the centroid router has no row for expert {expert}: the mean of its"
                    f" {self.tokens[expert]} tokens' features is zero or not finite; give it other text"
                )
        typical = (self.gram.diagonal().sum() / sum(self.tokens)).sqrt()
        return (self.moments / lengths).T.div(TEMPERATURE * typical).float()

    def ridge_router(self, strength: float) -> Tensor:
        """``ridge_router`` of all features taken."""
        return ridge_router(self.gram, self.moments, strength)
