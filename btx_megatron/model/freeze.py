"""Weights that a stage leaves as they are, by the part of the mixture that they belong to."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def part_of(name: str) -> str:
    """``experts``, ``router`` or ``shared``: where the weight of this name belongs.

    In a dense model the feed-forwards are what becomes an expert; its norm is shared.
    """
    if ".mlp.router." in name:
        return "router"
    if name.endswith(".layer_norm_weight"):  # Transformer Engine keeps the norm in the layer that follows
        return "shared"
    return "experts" if ".mlp." in name else "shared"


def freeze(chunk: torch.nn.Module, parts: Collection[str]) -> None:
    """Take these parts out of training: no gradient, so no buffer for it and no optimizer state either."""
    for name, parameter in chunk.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)
    embedding = getattr(chunk, "embedding", None)
    if embedding is not None and "shared" in parts:
        # Recomputed layers hand gradients on to their inputs alone, and only where those ask for any: behind
        # an embedding that is frozen the layers of the first group would silently not learn.
        embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
