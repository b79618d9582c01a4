"""What all ensembles here come down to: p(x_t | x_<t) = sum_j w_j(t) p_j(x_t | x_<t), token by token.

A method says how the weights w come about (``posterior``, ``similarity``, ``clusters``, ``time_windows``);
this file mixes. Each expert is needed only as the log-probabilities of the label tokens, so that experts are
run one after the other and never together. The price: the mixture is known for the labels alone, which is
what a held-out loss asks for, and not for a whole vocabulary, which generation would need.

Weights are kept as logarithms: a posterior after a thousand tokens is far below what fp64 can write
otherwise. A weight of 0 (-inf) is exact. Such an expert has no part in the mixture, whatever its numbers are,
NaN included.

Shapes: E experts, W windows of text, S positions in a window, B blocks of a window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from btx_megatron.errors import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_SUM_TOLERANCE = 1e-9  # weights come from a normalisation in fp64: some 1e-15 a term


def mix(log_p_EWS: ArrayLike, log_w_EWS: ArrayLike, mask_WS: ArrayLike) -> Floats:
    """Log-probabilities [W, S] of the labels under the mixture, in nats and fp64; 0 where the mask is 0.

    ``log_w_EWS`` may be anything that broadcasts to [E, W, S]: one weight an expert is [E, 1, 1]. Raises
    ValueError for weights that do not sum to 1 at a counted position, and for a log-probability that is not
    finite where its expert has a weight.
    """
    log_p, counted = checked(log_p_EWS, mask_WS)
    log_w = np.broadcast_to(np.asarray(log_w_EWS, dtype=np.float64), log_p.shape)
    total = np.exp(log_w).sum(axis=0)[counted]
    if not np.all(np.abs(total - 1) < _SUM_TOLERANCE):
        raise ValueError("weights: they do not sum to 1 over the experts at every counted position")
    taken = counted & (log_w > -np.inf)
    check_finite(log_p, taken)
    terms = np.full(log_p.shape, -np.inf)
    np.add(log_w, log_p, out=terms, where=taken)
    return np.where(counted, np.logaddexp.reduce(terms, axis=0), 0.0)


def mean_loss(log_p_WS: ArrayLike, mask_WS: ArrayLike) -> float:
    """Held-out loss in nats a token: minus the mean over the counted positions (at least one: ValueError)."""
    counted = np.asarray(mask_WS) != 0
    if not counted.any():
        raise ValueError("mask: no position is counted")
    return float(-np.asarray(log_p_WS, dtype=np.float64)[counted].mean())


def keep_top(log_w: Floats, top_k: int | None) -> Floats:
    """The ``top_k`` largest weights along the first axis, normalised; the rest 0. None keeps all.

    Of equal ones the first experts are kept. Raises UserError for a ``top_k`` that is not in 1 .. experts.
    """
    if top_k is None:
        return normalised(log_w)
    if not 1 <= top_k <= len(log_w):
        raise UserError(
            f"top_k {top_k}: of {len(log_w)} experts 1 to {len(log_w)} can answer; give one of these"
        )
    order = np.argsort(-log_w, axis=0, kind="stable")
    kept = np.full(log_w.shape, -np.inf)
    first = order[:top_k]
    np.put_along_axis(kept, first, np.take_along_axis(log_w, first, axis=0), axis=0)
    return normalised(kept)


def normalised(log_w: Floats) -> Floats:
    """Log-weights whose weights sum to 1 along the first axis. Raises ValueError where all are 0, or NaN."""
    total = np.logaddexp.reduce(log_w, axis=0)
    if not np.isfinite(total).all():
        raise ValueError("weights: somewhere they are all 0, or no number")
    return np.asarray(log_w - total, dtype=np.float64)


def active_experts(log_w_EWS: ArrayLike, mask_WS: ArrayLike) -> float:
    """Experts with a weight above 0, the mean over the counted positions."""
    counted = np.asarray(mask_WS) != 0
    log_w = np.asarray(log_w_EWS, dtype=np.float64)
    taken = np.broadcast_to(log_w > -np.inf, (len(log_w), *counted.shape))
    return float(taken.sum(axis=0)[counted].mean())


def mean_weights(log_w_EWS: ArrayLike, mask_WS: ArrayLike) -> Floats:
    """Mean weight of each expert [E] over the counted positions; they sum to 1."""
    counted = np.asarray(mask_WS) != 0
    log_w = np.asarray(log_w_EWS, dtype=np.float64)
    weights = np.broadcast_to(np.exp(log_w), (len(log_w), *counted.shape))
    return np.asarray(weights[:, counted].mean(axis=1))


def checked(log_p_EWS: ArrayLike, mask_WS: ArrayLike) -> tuple[Floats, Bools]:
    """The arrays in fp64 and as bools. Raises ValueError for shapes that do not fit each other."""
    log_p = np.asarray(log_p_EWS, dtype=np.float64)
    counted = np.asarray(mask_WS) != 0
    if log_p.ndim != 3 or not len(log_p) or log_p.shape[1:] != counted.shape:
        raise ValueError(
            f"log-probabilities {log_p.shape} are not [experts, windows, positions] of a mask {counted.shape}"
        )
    return log_p, counted


def check_finite(log_p_EWS: Floats, taken_EWS: Bools) -> None:
    """Raise ValueError, naming the expert, for a log-probability that is not finite where it is taken."""
    broken = ~np.isfinite(log_p_EWS) & taken_EWS
    if broken.any():
        expert, window, position = np.argwhere(broken)[0]
        raise ValueError(
            f"expert {expert}: log-probability {log_p_EWS[expert, window, position]} in window {window}, "
            f"position {position}; its training may have diverged"
        )
