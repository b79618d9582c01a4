"""Load balancing of the paper (section 3.3), which is not Switch's.

    L_LB = alpha * N * sum_i u_i p_i

with ``u_i`` the batch mean of the *gate value* g_i (soft: gradients flow through both factors) and
``p_i`` the batch mean of softmax_i(W x). Switch's loss, Megatron's ``aux_loss``, has the hard share of
dispatched tokens in the place of u_i.

The loss is a product of two means, so it does not add over shards of the batch: a rank that holds a
slice of the sequence must use the means over all slices. Values are summed over the group; the
gradient of each rank is that of its own tokens, and the ranks' gradients then add up to the whole one.

Shapes: T tokens on this rank, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def soft_balancing_loss(
    gates_TE: Tensor, probabilities_TE: Tensor, group: ProcessGroup | None = None
) -> Tensor:
    """N * sum_i u_i p_i over all tokens of ``group`` (without alpha); 1 when perfectly uniform.

    Every rank returns the whole value; its gradient covers the rank's own tokens. All ranks of the
    group must hold the same number of tokens, as sequence shards do.
    """
    num_experts = gates_TE.shape[1]
    u_E = _global_mean(gates_TE.float(), group)
    p_E = _global_mean(probabilities_TE.float(), group)
    return num_experts * (u_E * p_E).sum()


def _global_mean(x_TE: Tensor, group: ProcessGroup | None) -> Tensor:
    ranks = group.size() if group is not None else 1
    local_E = x_TE.mean(dim=0) / ranks
    if ranks == 1:
        return local_E
    total_E = local_E.detach().clone()
    torch.distributed.all_reduce(total_E, group=group)
    return local_E + (total_E - local_E.detach())
