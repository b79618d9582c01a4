"""Routers, through Megatron's own hook (``MoESubmodules.router``), and what they let others see.

A router gets neither the step nor the sample number from Megatron; the training loop puts them into
``batch_context`` for each micro-batch. Shapes: S sequence, B micro-batch, E experts, T = S * B tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from btx_megatron.model.balancing import soft_balancing_loss


@dataclass
class BatchContext:
    """The micro-batch that is in its forward pass."""

    step: int = 0
    """Training step."""
    sample_index: Tensor | None = None
    """[B] global index of each sample in the training order."""
    loss_mask: Tensor | None = None
    """[B, S] 1 where a token counts, 0 where it only fills up a window."""


batch_context = BatchContext()


class Router(TopKRouter):
    """Top-k router of the paper (section 3.2): g = SoftMax(TopK(W x)), with the paper's balancing.

    Megatron computes the routes; this class adds the loss and counts the load.
    """

    def __init__(self, *args: Any, balancing: str, balancing_coeff: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balancing = balancing
        self.balancing_coeff = balancing_coeff
        self.tokens_per_expert: Tensor
        # a buffer, so that it moves to the GPU with the model; not saved
        self.register_buffer(
            "tokens_per_expert", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False
        )

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [S, B, E] -> gates [T, E], routes [T, E] (bool)."""
        gates_TE, routes_TE = super().routing(logits, padding_mask)
        if not (is_checkpointing() and torch.is_grad_enabled()):  # not again when activations are recomputed
            self.tokens_per_expert += self._counted(routes_TE.detach(), logits.shape[0]).sum(dim=0)
        if self.balancing == "btx" and self.balancing_coeff > 0 and self.training and torch.is_grad_enabled():
            gates_TE = self._attach_balancing(gates_TE, logits.view(-1, self.num_experts))
        return gates_TE, routes_TE

    def _counted(self, routes_TE: Tensor, sequence: int) -> Tensor:
        """Routes [T, E] of the tokens that count; ``sequence`` is this rank's share of it."""
        if batch_context.loss_mask is None:
            return routes_TE
        mask_SB = batch_context.loss_mask.T
        if sequence != len(mask_SB):  # sequence parallel: the TP ranks hold equal pieces, in order
            mask_SB = mask_SB.split(sequence)[parallel_state.get_tensor_model_parallel_rank()]
        return routes_TE * mask_SB.reshape(-1, 1).to(routes_TE)

    def _attach_balancing(self, gates_TE: Tensor, logits_TE: Tensor) -> Tensor:
        probabilities_TE = torch.softmax(logits_TE.float(), dim=-1)
        loss = soft_balancing_loss(gates_TE, probabilities_TE, self.tp_cp_group)
        # every rank holds the whole value already: no group to sum the logged value over
        return self.attach_and_log_load_balancing_loss(
            gates_TE, self.balancing_coeff, self.balancing_coeff * loss, "load_balancing_loss", None
        )

    def take_load(self) -> Tensor:
        """[E] tokens that took each expert on this rank since the last call."""
        load = self.tokens_per_expert.clone()
        self.tokens_per_expert.zero_()
        return load


def take_balancing_loss() -> float:
    """Balancing loss (without alpha) since the last call, summed over this rank's layers and micro-batches.

    Sums over ranks give what all TP ranks together hold: the paper's loss is whole on every TP rank and
    counts on the first alone, Switch's comes in parts.
    """
    tracker = get_moe_metrics_tracker()
    entry = tracker.metrics.get("load_balancing_loss")
    if entry is None:
        return 0.0
    whole = entry.reduce_group is None
    counts = not whole or parallel_state.get_tensor_model_parallel_rank() == 0
    value = float(entry.values.sum()) if counts else 0.0
    tracker.clear()
    return value


def routers_of(model: Iterable[torch.nn.Module]) -> dict[int, Router]:
    """Routers of all chunks on this rank, by 0-based layer number."""
    return {m.layer_number - 1: m for chunk in model for m in chunk.modules() if isinstance(m, Router)}
