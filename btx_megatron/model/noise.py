"""Gumbel noise that is a pure function of where it falls.

A generator's noise depends on who draws it and when: another layout, a recomputed activation or a resumed run
would route other tokens elsewhere. This one is a hash of (seed, step, layer, sample, position, expert), so
every rank that meets a token in a layer gives it the same noise, at any time.

Shapes: S positions, B samples, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def gumbel_noise(
    seed: int, step: int, layer: int, sample_B: Tensor, position_S: Tensor, experts: int
) -> Tensor:
    """[S, B, E] independent draws from Gumbel(0, 1), -log(-log u), in fp32.

    ``sample_B`` and ``position_S`` are integers from 0 below 2^32, as are the numbers.
    """
    state = torch.zeros((), dtype=torch.int64, device=position_S.device)
    expert_E = torch.arange(experts, device=position_S.device)
    for number in (seed, step, layer):
        state = _mixed(state, torch.full_like(state, number & _WORD))
    state_B = _mixed(state, sample_B.to(position_S.device))
    state_SB = _mixed(state_B, position_S[:, None])
    hash_SBE = _mixed(state_SB[..., None], expert_E)
    uniform = (hash_SBE.double() + 0.5) / 2**32  # never 0, never 1
    return -torch.log(-torch.log(uniform)).float()


def _mixed(state: Tensor, number: Tensor) -> Tensor:
    """A 32-bit hash of both, which broadcast; every bit of them moves every bit of it.

    The rounds are those of C. Wellons' lowbias32. Products exceed 63 bits and wrap; the low 32 are right.
    """
    x = (state * 0x9E3779B1 + number + 0x7F4A7C15) & _WORD
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
        x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
        x = x ^ (x >> 16)
    return x
