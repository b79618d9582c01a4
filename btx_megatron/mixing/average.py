"""The mean of the experts' weights: summed in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mean(tensors: Iterable[Tensor]) -> Tensor:
    """Equal-weight mean of tensors of one shape and dtype, in that dtype (paper, section 3.2).

    Summed in fp32 whatever the dtype and rounded once at the end: a sum in bf16 would lose a bit of the
    result for every doubling of the number of experts. fp64 stays fp64.
    """
    total: Tensor | None = None
    count, dtype = 0, torch.float32
    for tensor in tensors:
        if total is None:
            dtype = tensor.dtype
            total = torch.zeros_like(tensor, dtype=torch.promote_types(dtype, torch.float32))
        total += tensor
        count += 1
    assert total is not None
    return (total / count).to(dtype)
