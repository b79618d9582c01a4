"""How the weights that all experts share become one: mean, weighted mean, TIES, DARE.

All of them sum in fp32 (fp64 stays fp64), source by source, and round once at the end. They take whole
tensors, one source at a time from an iterable, so that memory does not grow with the number of sources; each
docstring says how many fp32 copies of the tensor are alive at most, beside what the caller holds.

The result is a pure function of the arguments, to the bit, whatever the number of threads: every operation
is elementwise, products and sums are rounded apart (a fused multiply-add may be used for some elements of a
vector loop and not for those at a thread's edge), and random numbers come from ``torch.rand``, which draws
in one thread. The mean, the weighted mean and TIES's last step work on any cut of a tensor; TIES's trimming
and DARE's draws need the tensor whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from btx_megatron.checkpoints.scratch import as_dtype, empty

WIDE = {"base": 0, "mean": 8, "weighted": 8, "ties": 34, "dare": 17}
"""Bytes an entry that a rule holds in wider types; of TIES and DARE measured, with torch's own copies."""

_BLOCK = 1 << 20  # elements looked through at a time for the ties at TIES's threshold


def mean(tensors: Iterable[Tensor]) -> Tensor:
    """Equal-weight mean of tensors of one shape and dtype, in that dtype (paper, section 3.2).

    Summed in fp32 whatever the dtype and rounded once at the end: a sum in bf16 would lose a bit of the
    result for every doubling of the number of experts. fp64 stays fp64.
    Memory: two fp32 copies (the sum, a source).
    """
    total: Tensor | None = None
    count, dtype = 0, torch.float32
    for tensor in tensors:
        if total is None:
            dtype = tensor.dtype
            total = empty(tensor.shape, _wide(dtype)).zero_()
        total += as_dtype(tensor, total.dtype)
        count += 1
        del tensor  # before the next is made
    assert total is not None
    return as_dtype(total.div_(count), dtype)


def weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Mean of tensors of one shape and dtype with ``weights``, whose scale does not matter.

    Equal weights give ``mean`` to the bit. Weights must not be negative and not all be zero; one a tensor
    (ValueError). Memory: two fp32 copies.
    """
    total: Tensor | None = None
    dtype = torch.float32
    shares = _shares(weights)
    for tensor, share in zip(tensors, shares, strict=True):
        if total is None:
            dtype = tensor.dtype
            total = empty(tensor.shape, _wide(dtype)).zero_()
        total += _wide_copy(tensor).mul_(share)
        del tensor
    assert total is not None
    return as_dtype(total.div_(sum(shares)), dtype)


def ties(tensors: Iterable[Tensor], base: Tensor, weights: Sequence[float], density: float) -> Tensor:
    """TIES merging (arXiv 2306.01708, section 4): trim, elect a sign, mean of those that agree.

    The task vectors ``tensor - base`` keep their ``density`` share of largest magnitude (per tensor, at least
    one entry; of equal ones at the threshold those that come first in row-major order) and are zero
    elsewhere.
    Each entry takes the sign of the weighted sum, and the weighted mean over the sources that have that sign:
    a zero is of no sign and does not count. Where the sum is zero the base stays. The scale (lambda) is 1.

    With density 1 nothing is trimmed, yet the signs are still elected: it is not the mean. ``density`` is in
    (0, 1], and the caller checks it. Memory: six fp32 copies (four sums, the task vector, its magnitudes).
    """
    dtype = _wide(base.dtype)
    sums = {sign: torch.zeros_like(base, dtype=dtype) for sign in (1, -1)}
    totals = {sign: torch.zeros_like(base, dtype=dtype) for sign in (1, -1)}
    for tensor, weight in zip(tensors, weights, strict=True):  # as given: whole weights tie exactly
        task = _trim(_task_vector(tensor, base), density).mul_(weight)
        for sign in (1, -1):
            agrees = task > 0 if sign == 1 else task < 0
            sums[sign] += task.where(agrees, 0)
            totals[sign] += agrees.to(dtype).mul_(weight)
        del task
    balance = sums[1] + sums[-1]
    for sign in (1, -1):
        lost = balance <= 0 if sign == 1 else balance >= 0
        sums[sign].div_(totals[sign]).masked_fill_(lost, 0)  # 0 / 0 only where this sign lost
    return sums[1].add_(sums[-1]).add_(base).to(base.dtype)


def dare(
    tensors: Iterable[Tensor],
    base: Tensor,
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """DARE (arXiv 2311.03099, section 3): drop entries of the task vectors at random, rescale, average.

    Each entry of ``tensor - base`` is kept with probability ``density`` and then divided by it, so that the
    expectation stays; the weighted mean over the sources is added to the base. With density 1 this is the
    weighted mean (to fp32 rounding). The draws are taken source by source over the whole tensor in row-major
    order: the caller gives a generator of its own to every tensor. ``density`` is in (0, 1], and the caller
    checks it. Memory: three fp32 copies.
    """
    total = torch.zeros_like(base, dtype=_wide(base.dtype))
    shares = _shares(weights)
    for tensor, share in zip(tensors, shares, strict=True):
        task = _task_vector(tensor, base).mul_(share)
        task *= torch.rand(base.shape, generator=generator, dtype=torch.float32) < density
        total += task
        del task
    return total.div_(sum(shares) * density).add_(base).to(base.dtype)


def fold_sum(values: Tensor) -> Tensor:
    """Sum over the first axis by folding it in half again and again; ``values`` is overwritten.

    ``torch.sum`` splits a long sum by the number of threads, which changes its last bits; here the order is
    fixed, and the error grows with the logarithm of the length only.
    """
    while len(values) > 1:
        half = len(values) // 2
        values[:half] += values[len(values) - half :]
        values = values[: len(values) - half]
    return values[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken."""
    return torch.promote_types(dtype, torch.float32)


def _wide_copy(tensor: Tensor) -> Tensor:
    """A copy that may be changed, in row-major order."""
    return empty(tensor.shape, _wide(tensor.dtype)).copy_(tensor)


def _shares(weights: Sequence[float]) -> list[float]:
    """The weights over the largest: equal weights become exactly 1."""
    largest = max(weights)
    return [weight / largest for weight in weights]


def _task_vector(tensor: Tensor, base: Tensor) -> Tensor:
    return _wide_copy(tensor).sub_(base)


def _trim(task: Tensor, density: float) -> Tensor:
    """Set all but the ``density`` share of largest magnitude to zero, in place."""
    flat = task.view(-1)
    kept = max(1, round(density * len(flat)))
    if kept == len(flat):
        return task
    magnitudes = flat.abs()
    # numpy selects in place; torch's kthvalue and topk carry eight bytes of index for every element
    place = len(flat) - kept
    magnitudes.numpy().partition(place)
    threshold = magnitudes[place].item()
    equal_kept = kept - int(magnitudes[place:].gt(threshold).sum())
    del magnitudes
    end = _end_of_ties(flat, threshold, equal_kept)
    _zero_up_to(flat[:end], threshold, inclusive=False)
    _zero_up_to(flat[end:], threshold, inclusive=True)
    return task


def _end_of_ties(flat: Tensor, threshold: float, count: int) -> int:
    """One past the place of the ``count``-th (from 1) entry whose magnitude is the threshold."""
    for start in range(0, len(flat), _BLOCK):
        equal = flat[start : start + _BLOCK].abs() == threshold
        here = int(equal.sum())
        if here >= count:
            return start + int(equal.nonzero()[count - 1]) + 1
        count -= here
    raise AssertionError("the threshold is one of the magnitudes")


def _zero_up_to(flat: Tensor, threshold: float, inclusive: bool) -> None:
    """Zero the entries whose magnitude is below the threshold (or at it), in place."""
    if inclusive:
        flat.masked_fill_((flat <= threshold).logical_and_(flat >= -threshold), 0)
    else:
        flat.masked_fill_((flat < threshold).logical_and_(flat > -threshold), 0)
