"""A balancing weight of each layer that follows its own load (Skywork-MoE, arXiv 2406.06563).

    alpha_{t+1} = b alpha_t + (1 - b) min(alpha_max, x d_t),    b = 0.99, x = 1/5

In the paper d_t is the share of tokens that a layer drops. Here, where as a rule nothing is dropped, it is
the share that a capacity of an even load would drop: sum_i max(0, n_i - n/E) / n over the n routes of a step.
Where a layer is balanced its weight fades, and the loss with it. Every rank knows every layer's weight, so it
lies in the checkpoint once, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from btx_megatron.model.routers import routers_of
from btx_megatron.runtime.ranks import device

KEEP, SLOPE = 0.99, 0.2


class AdaptiveBalancing:
    """The weights of all layers; ``update`` after each step, ``apply`` before the next."""

    def __init__(self, num_layers: int, num_experts: int, most: float) -> None:
        self.coefficients = [most] * num_layers
        """alpha of each layer, equal on all ranks."""
        self._shape, self._most = (num_layers, num_experts), most

    def update(self, model: Sequence[torch.nn.Module], move: bool = True) -> None:
        """Move the weights by the routes of the last step, or (it was skipped) forget these. A collective."""
        load = torch.zeros(self._shape, dtype=torch.int64, device=device())
        for layer, router in routers_of(model).items():
            load[layer] = router.take_step_load()
        torch.distributed.all_reduce(load)
        if move:
            self.coefficients = next_coefficients(self.coefficients, load.cpu(), self._most)
            self.apply(model)

    def apply(self, model: Iterable[torch.nn.Module]) -> None:
        """Hand the weights to the routers of this rank."""
        for layer, router in routers_of(model).items():
            router.balancing_coeff = self.coefficients[layer]


def next_coefficients(now: Sequence[float], load_LE: Tensor, most: float) -> list[float]:
    """The weights after a step in which each layer's experts took ``load_LE`` routes."""
    total_L1 = load_LE.sum(dim=1, keepdim=True).clamp(min=1).double()
    share_LE = load_LE.double() / total_L1
    beyond_L = (share_LE - 1 / load_LE.shape[1]).clamp(min=0).sum(dim=1)
    return [
        KEEP * alpha + (1 - KEEP) * min(most, SLOPE * beyond)
        for alpha, beyond in zip(now, beyond_L.tolist(), strict=True)
    ]
