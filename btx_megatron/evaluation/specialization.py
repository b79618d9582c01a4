"""How well a token's domain can be told from the experts that it took, layer by layer.

Two numbers for each layer, of held-out tokens; every domain counts alike, however much text it has:

- *mutual information* between the domain and an expert drawn from a token's routes,
  I = sum_d sum_e p(d) p(e|d) log(p(e|d) / p(e)), in nats; 0 where the routes say nothing, log D at most.
- *balanced accuracy* of the guess argmax_d sum_(e taken) log p(e|d): the mean over the domains of the share
  of their tokens that is guessed right; 1/D by chance. The p are estimated from every other window, and
  the guesses are about the tokens of the windows between them.

Shapes: D domains, L layers, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from btx_megatron.model.routers import routers_of
from btx_megatron.runtime.ranks import device

Model = Sequence[torch.nn.Module]  # the chunks of this rank


def mutual_information(load_DLE: Tensor) -> list[float]:
    """Of each layer, in nats, from the routes that each domain's tokens took; domains weigh alike."""
    share_DLE = load_DLE.double() / load_DLE.sum(dim=2, keepdim=True).clamp(min=1)
    mean_LE = share_DLE.mean(dim=0)
    terms = torch.xlogy(share_DLE, share_DLE) - torch.xlogy(share_DLE, mean_LE)
    information: list[float] = terms.sum(dim=2).mean(dim=0).tolist()
    return information


def log_likelihoods(load_DLE: Tensor) -> Tensor:
    """log p(e|d), with one route more for every expert than were seen, so that none is impossible."""
    seen = load_DLE.double() + 1
    return (seen / seen.sum(dim=2, keepdim=True)).log()


class DomainGuesses:
    """Counts, for tokens of a known domain, how often each layer's routes point to it."""

    def __init__(self, log_p_DLE: Tensor) -> None:
        self._log_p = log_p_DLE.to(device())
        domains, layers, _ = log_p_DLE.shape
        self._right = torch.zeros(domains, layers, dtype=torch.float64, device=device())
        self._tokens = torch.zeros(domains, layers, dtype=torch.float64, device=device())

    def listen(self, model: Model, domain: int) -> AbstractContextManager[None]:
        """Context manager: the tokens that pass are of this domain."""
        return listening(model, lambda layer, routes_TE: self._guess(domain, layer, routes_TE))

    def _guess(self, domain: int, layer: int, routes_TE: Tensor) -> None:
        counted_TE = routes_TE[routes_TE.any(dim=1)].double()  # tokens without a route fill up windows
        guessed_T = (counted_TE @ self._log_p[:, layer].T).argmax(dim=1)
        self._right[domain, layer] += (guessed_T == domain).sum()
        self._tokens[domain, layer] += len(guessed_T)

    def balanced_accuracy(self) -> list[float]:
        """Of each layer. A collective."""
        both = torch.stack([self._right, self._tokens])
        torch.distributed.all_reduce(both)
        share_DL = both[0] / both[1].clamp(min=1)
        accuracy: list[float] = share_DL.mean(dim=0).tolist()
        return accuracy


@contextmanager
def listening(model: Model, told: Callable[[int, Tensor], None]) -> Iterator[None]:
    """``told`` hears the layer and the routes [T, E] of every micro-batch; rows of tokens that do not count
    are empty."""
    routers = routers_of(model)
    for layer, router in routers.items():
        router.listener = lambda routes_TE, layer=layer: told(layer, routes_TE)
    try:
        yield
    finally:
        for router in routers.values():
            router.listener = None
