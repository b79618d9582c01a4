"""The new parameters of a mix: one linear map a layer, from the hidden state to the experts."""

from __future__ import annotations

import torch
from torch import Tensor


def normal_router(layer: int, num_experts: int, hidden_size: int, std: float, random_seed: int) -> Tensor:
    """[experts, hidden] from N(0, std), fp32: a pure function of its arguments.

    The paper does not state its initialisation. Behind an RMSNorm the logits have a spread of about
    std * sqrt(hidden_size).
    """
    generator = torch.Generator().manual_seed(random_seed * 1_000_003 + layer)
    return std * torch.randn(num_experts, hidden_size, generator=generator)
