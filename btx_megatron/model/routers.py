"""Routers, through Megatron's own hook (``MoESubmodules.router``), and what they let others see.

A router gets neither the step nor the sample number from Megatron; the training loop puts them into
``batch_context`` for each micro-batch. Shapes: S sequence, B micro-batch, E experts, T = S * B tokens.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from btx_megatron.model.balancing import soft_balancing_loss
from btx_megatron.model.noise import gumbel_noise
from btx_megatron.recipe import Moe


@dataclass
class BatchContext:
    """The micro-batch that is in its forward pass."""

    step: int = 0
    """Training step."""
    sample_index: Tensor | None = None
    """[B] global index of each sample in the training order."""
    loss_mask: Tensor | None = None
    """[B, S] 1 where a token counts, 0 where it only fills up a window; this rank's part of the sequence."""
    positions: Tensor | None = None
    """[S] where in the sample the tokens of that part stand."""
    allowed_experts: Tensor | None = None
    """[B, E] the experts that a sample's tokens may take (bool); None: all."""
    each_alone: bool = False
    """Whether a token's routes must not depend on what else is in the batch: no capacity, no noise."""


batch_context = BatchContext()


class Router(TopKRouter):
    """Top-k router of the paper (section 3.2), g = SoftMax(TopK(W x)), and with other settings its relatives.

    Megatron computes the routes. Switch Top-1 is its top-1 with softmax over all and a capacity; Soft takes
    all experts. This class adds what comes before (experts that a sample may not take, normalised logits, one
    expert a group), the paper's balancing and a coefficient that each layer may have for itself, and counts
    the load.
    """

    config: Any  # Megatron's TransformerConfig

    def __init__(
        self,
        *args: Any,
        moe: Moe,
        capacity_factor: float | None,
        groups: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """``groups``: the group of each expert, where a token may take one of each group only."""
        self.balancing_coeff = moe.moe_aux_loss_coeff  # Megatron's __init__ asks for it
        """alpha of this layer; training may move it (``moe_aux_loss_adaptive``)."""
        super().__init__(*args, **kwargs)
        self._capacity_factor = capacity_factor
        self.config = replace_quietly(self.config, moe_expert_capacity_factor=None)  # it is kept here
        self.moe = moe
        self._groups = torch.tensor(groups) if groups is not None else None
        self._to_come: deque[BatchContext] = deque()
        """Micro-batches whose activations will be recomputed, oldest first."""
        self.listener: Callable[[Tensor], None] | None = None
        """Hears the routes [T, E] of the tokens that count, in every forward pass."""
        self.tokens_per_expert: Tensor
        self.step_load: Tensor
        self.dropped_routes: Tensor
        # buffers, so that they move to the GPU with the model; not saved
        experts = (self.num_experts,)
        for name, size in (("tokens_per_expert", experts), ("step_load", experts), ("dropped_routes", ())):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64), persistent=False)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [S, B, E] -> gates [T, E], routes [T, E] (bool)."""
        context = self._context()
        allowed_BE = context.allowed_experts
        scale = self.moe.moe_router_logit_norm_scale
        if scale is not None:
            logits = normalized_logits(logits, scale, allowed_BE)
        if allowed_BE is not None:
            logits = logits.masked_fill(~allowed_BE, lowest_logit(logits))
        if self._groups is not None:
            logits = best_of_each_group(logits, self._groups)
        gates_TE, routes_TE = self._route(logits, context)
        if allowed_BE is not None:  # fewer than top-k may be allowed
            allowed_TE = allowed_BE.expand_as(logits).reshape_as(routes_TE)
            gates_TE, routes_TE = gates_TE * allowed_TE, routes_TE & allowed_TE
        if self._capacity_factor is not None and not context.each_alone:
            wanted_TE, tokens = _counted(routes_TE, logits.shape[0], context)
            capacity = torch.ceil(self.topk * tokens.double() / self.num_experts * self._capacity_factor)
            routes_TE = first_come(wanted_TE, capacity)
            gates_TE = gates_TE * routes_TE
            if not recomputing():
                self.dropped_routes += (wanted_TE & ~routes_TE).sum()
        self._count(routes_TE, logits.shape[0], context)
        learning = self.training and torch.is_grad_enabled()
        if self.moe.moe_router_load_balancing_type == "btx" and self.balancing_coeff > 0 and learning:
            gates_TE = self._attach_balancing(gates_TE, logits.view(-1, self.num_experts))
        # the padding for FP8 writes into what it is given, which the gates' backward pass may need
        return gates_TE, routes_TE.clone()

    def _context(self) -> BatchContext:
        """The micro-batch at hand.

        When activations are recomputed, in the backward pass, a pipeline may have begun later micro-batches;
        but backward passes come in the order of the forward passes.
        """
        if recomputing() and self._to_come:
            return self._to_come.popleft()
        context = copy.copy(batch_context)
        if is_checkpointing() and self.training:
            self._to_come.append(context)
        return context

    def _route(self, logits: Tensor, context: BatchContext) -> tuple[Tensor, Tensor]:
        """Gates and routes, with Megatron's own losses attached."""
        return super().routing(logits)  # type: ignore[no-any-return]

    def _count(self, routes_TE: Tensor, sequence: int, context: BatchContext) -> None:
        if recomputing():
            return
        counted_TE, _ = _counted(routes_TE.detach(), sequence, context)
        load_E = counted_TE.sum(dim=0)
        self.tokens_per_expert += load_E
        if self.training:
            self.step_load += load_E
        if self.listener is not None:
            self.listener(counted_TE)

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """Megatron asks for the weight of its losses by their names."""
        return self.balancing_coeff if aux_loss_type == self.routing_type else 0.0

    def _attach_balancing(self, gates_TE: Tensor, logits_TE: Tensor) -> Tensor:
        probabilities_TE = torch.softmax(logits_TE.float(), dim=-1)
        loss = soft_balancing_loss(gates_TE, probabilities_TE, self.tp_cp_group)
        # every rank holds the whole value already: no group to sum the logged value over
        return self.attach_and_log_load_balancing_loss(
            gates_TE, self.balancing_coeff, self.balancing_coeff * loss, "load_balancing_loss", None
        )

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Megatron's, with alpha as it is asked for, on any number of DP ranks.

        Its global loss is the sum of what the DP ranks hold; its gradient is averaged over them all the same.
        """
        if aux_loss_name == "global_load_balancing_loss":
            aux_loss = aux_loss * parallel_state.get_data_parallel_world_size()
        return super().attach_and_log_load_balancing_loss(  # type: ignore[no-any-return]
            activation, aux_loss_coeff, aux_loss, aux_loss_name, *args, **kwargs
        )

    def take_load(self) -> Tensor:
        """[E] tokens that took each expert on this rank since the last call."""
        load = self.tokens_per_expert.clone()
        self.tokens_per_expert.zero_()
        return load

    def take_step_load(self) -> Tensor:
        """As take_load, of training alone and with a count of its own."""
        load = self.step_load.clone()
        self.step_load.zero_()
        return load

    @property
    def has_capacity(self) -> bool:
        """Whether an expert has room for so many tokens only."""
        return self._capacity_factor is not None

    def take_drops(self) -> Tensor:
        """Routes that were dropped over the capacity on this rank since the last call."""
        drops = self.dropped_routes.clone()
        self.dropped_routes.zero_()
        return drops


class SampleTop1Router(Router):
    """Sample Top-1 (paper, appendix): the largest entry of a Gumbel-softmax sample alone is computed.

    In training y = SoftMax((W x + G) / tau) with tau = max(tau_min, exp(-r t)) in step t; the expert of the
    largest y is taken, and that y is its gate, which is the router's gradient path. In evaluation the expert
    is sampled likewise (or, for serving, the most likely one taken), with gate 1.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seed = seed

    def _route(self, logits: Tensor, context: BatchContext) -> tuple[Tensor, Tensor]:
        sequence, batch = logits.shape[:2]
        logits_TE = self.apply_z_loss(logits.view(-1, self.num_experts)).float()
        noise_TE = self._noise(context, sequence, batch, logits.device)
        if context.each_alone or (not self.training and self.moe.moe_router_inference == "argmax"):
            noise_TE = torch.zeros_like(noise_TE)
        gates_TE, routes_TE = sampled_top1(logits_TE + noise_TE, self._temperature(context.step))
        if not self.training:
            gates_TE = routes_TE.to(gates_TE)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            gates_TE = self._attach_megatrons(gates_TE, routes_TE, logits_TE, sequence, batch)
        return gates_TE.to(logits.dtype), routes_TE

    def _attach_megatrons(
        self, gates_TE: Tensor, routes_TE: Tensor, logits_TE: Tensor, sequence: int, batch: int
    ) -> Tensor:
        """Megatron's balancing losses over the experts that were taken (its own routes are the top-k)."""
        scores_TE = torch.softmax(logits_TE, dim=-1)
        gates_TE = self._apply_aux_loss(gates_TE, scores_TE, routes_TE)
        gates_TE = self._apply_seq_aux_loss(gates_TE, scores_TE, routes_TE, sequence, batch)
        return self._apply_global_aux_loss(gates_TE, scores_TE, routes_TE)

    def _temperature(self, step: int) -> float:
        decay, least = self.moe.moe_router_temperature_decay, self.moe.moe_router_temperature_min
        return max(least, math.exp(-decay * step))

    def _noise(self, context: BatchContext, sequence: int, batch: int, device: torch.device) -> Tensor:
        """Gumbel noise [T, E] of this rank's tokens."""
        sample_B = context.sample_index if context.sample_index is not None else torch.arange(batch)
        if context.positions is None:
            position_S = torch.arange(sequence, device=device)
        else:
            position_S = context.positions[first_position(sequence, context) :][:sequence]
        assert self.layer_number is not None
        place = (self._seed, context.step, self.layer_number, sample_B, position_S)
        return gumbel_noise(*place, self.num_experts).view(-1, self.num_experts)


def recomputing() -> bool:
    """Whether this forward pass repeats one, because its activations were not kept."""
    return is_checkpointing() and torch.is_grad_enabled()


def _counted(routes_TE: Tensor, sequence: int, context: BatchContext) -> tuple[Tensor, Tensor]:
    """Routes [T, E] (bool) of the tokens that count, and how many these are.

    ``sequence`` is this rank's share of it.
    """
    if context.loss_mask is None:
        return routes_TE, torch.tensor(len(routes_TE))
    mask_SB = context.loss_mask.T[first_position(sequence, context) :][:sequence]
    counts_T1 = mask_SB.reshape(-1, 1).bool()
    return routes_TE & counts_T1, counts_T1.sum()


def sampled_top1(noisy_TE: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Gates and routes [T, E] of y = SoftMax(noisy / temperature), with its largest entry alone kept."""
    sample_TE = torch.softmax(noisy_TE / temperature, dim=-1)
    taken_T1 = sample_TE.argmax(dim=-1, keepdim=True)
    routes_TE = torch.zeros_like(sample_TE, dtype=torch.bool).scatter(1, taken_T1, True)
    return sample_TE * routes_TE, routes_TE


def lowest_logit(logits: Tensor) -> float:
    """So low that nobody takes the expert, whose softmax is 0 exactly; and still a number."""
    return torch.finfo(logits.dtype).min / 2


def normalized_logits(logits: Tensor, scale: float, allowed_BE: Tensor | None = None) -> Tensor:
    """scale (z - mean z) / std z over the experts that a token may take, of logits [S, B, E].

    (Gating logit normalization of Skywork-MoE, arXiv 2406.06563.)
    """
    allowed = (
        torch.ones_like(logits, dtype=torch.bool) if allowed_BE is None else allowed_BE.expand_as(logits)
    )
    wide = logits.float().masked_fill(~allowed, 0.0)
    count = allowed.sum(dim=-1, keepdim=True)
    centred = (wide - wide.sum(dim=-1, keepdim=True) / count).masked_fill(~allowed, 0.0)
    variance = centred.square().sum(dim=-1, keepdim=True) / count
    return (centred / variance.clamp_min(1e-12).sqrt() * scale).to(logits.dtype)


def best_of_each_group(logits: Tensor, groups_E: Tensor) -> Tensor:
    """Logits [..., E] with those of all experts but the best of their group so low that nobody takes them."""
    masked = torch.full_like(logits, lowest_logit(logits))
    for group in groups_E.unique().tolist():
        (members,) = (groups_E == group).nonzero(as_tuple=True)
        members = members.to(logits.device)
        best = members[logits[..., members].argmax(dim=-1, keepdim=True)]
        masked = masked.scatter(-1, best, logits.gather(-1, best))
    return masked


def first_come(routes_TE: Tensor, capacity: Tensor | int) -> Tensor:
    """Routes without those beyond an expert's capacity: earlier tokens are served first (Switch, 2101.03961).

    T are this rank's tokens, by position and then by sample. Megatron's policy ``position`` keeps the
    ``torch.topk`` of the routes, which among equals prefers nobody.
    """
    return routes_TE & (routes_TE.cumsum(dim=0) <= capacity)


def replace_quietly(config: Any, **changes: Any) -> Any:
    """A copy of Megatron's config with other values, which are not checked again."""
    other = copy.copy(config)
    for key, value in changes.items():
        setattr(other, key, value)
    return other


def first_position(sequence: int, context: BatchContext) -> int:
    """Where this rank's share, ``sequence`` positions, begins in the context's tensors.

    With sequence parallelism the TP ranks hold equal pieces, in order, of their CP rank's part.
    """
    if context.loss_mask is None or sequence == context.loss_mask.shape[1]:
        return 0
    return sequence * parallel_state.get_tensor_model_parallel_rank()


_BALANCING_LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss")
"""Megatron's names of the losses."""


def take_balancing_loss() -> float:
    """Balancing loss (without alpha) since the last call, summed over this rank's layers and micro-batches.

    Sums over ranks give what all TP and CP ranks together hold: the paper's loss is whole on each of them and
    counts on the first alone, Megatron's come in parts.
    """
    tracker, total = get_moe_metrics_tracker(), 0.0
    for name in _BALANCING_LOSSES:
        entry = tracker.metrics.get(name)
        if entry is None:
            continue
        whole = entry.reduce_group is None
        first = parallel_state.get_tensor_and_context_parallel_rank() == 0
        if not whole or first:
            total += float(entry.values.sum())
    tracker.clear()
    return total


def routers_of(model: Iterable[torch.nn.Module]) -> dict[int, Router]:
    """Routers of all chunks on this rank, by 0-based layer number."""
    return {m.layer_number - 1: m for chunk in model for m in chunk.modules() if isinstance(m, Router)}
