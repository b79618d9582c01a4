"""Samples cut along the sequence, and attention's keys and values brought together again.

The sequence is cut into 2 CP pieces, and rank r takes the r-th from the front and the r-th from the back, so
that causal attention costs all ranks alike. It is Megatron's and Transformer Engine's order.

Shape legend: S sequence, C ranks of context parallelism, L = S / C positions of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor


def pieces_of(rank: int, size: int) -> tuple[int, int]:
    """Numbers of the two pieces of a rank of ``size``, out of 2 ``size``."""
    return rank, 2 * size - 1 - rank


def part_of(whole: Tensor, rank: int, size: int, dim: int = 0) -> Tensor:
    """[S, ...] -> [L, ...], the two pieces of a rank (the sequence in ``dim``)."""
    pieces = whole.chunk(2 * size, dim)
    return torch.cat([pieces[number] for number in pieces_of(rank, size)], dim)


def whole_of(parts: Sequence[Tensor]) -> Tensor:
    """[L, ...] of each rank in turn -> [S, ...] in the order of positions."""
    cut = [part.chunk(2) for part in parts]
    return torch.cat([front for front, _ in cut] + [back for _, back in reversed(cut)])


def my_part(whole: Tensor, dim: int) -> Tensor:
    """Of a tensor over the whole sequence the part that this rank has."""
    size = parallel_state.get_context_parallel_world_size()
    return whole if size == 1 else part_of(whole, parallel_state.get_context_parallel_rank(), size, dim)


def my_pieces() -> tuple[int, int]:
    """The numbers of this rank's two pieces."""
    size = parallel_state.get_context_parallel_world_size()
    return pieces_of(parallel_state.get_context_parallel_rank(), size)


def all_positions(part: Tensor) -> Tensor:
    """[L, ...], this rank's part -> [S, ...]; a collective of the CP ranks, forward and backward."""
    return _AllPositions.apply(part)  # type: ignore[no-any-return, no-untyped-call]


class _AllPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = part.new_empty(group.size() * len(part), *part.shape[1:])
        torch.distributed.all_gather_into_tensor(parts, part.contiguous(), group=group)
        return whole_of(parts.chunk(group.size()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Each rank's queries have a gradient for all keys: summed, each gets its own part back."""
        group = parallel_state.get_context_parallel_group()
        parts = [part_of(grad, rank, group.size()) for rank in range(group.size())]
        mine = torch.empty_like(parts[0])
        torch.distributed.reduce_scatter_tensor(mine, torch.cat(parts), group=group)
        return mine
