"""BTM's ensemble: each expert weighs as much as the text so far says that it is the expert's (2208.03306).

Bayes, with D the domain and one expert a domain:

    p(D=j | x_<t) = p(x_<t | D=j) p(D=j) / sum_i p(x_<t | D=i) p(D=i)

where p(x_<t | D=j) is the product of what expert j gave to the tokens before t. The text so far is that of
the window: the first token of a window is answered by the prior alone. Three priors:

- uniform;
- cached: estimated once on a development text (``cached_prior``) and fixed;
- updating: after each window an exponential moving average takes in what the window said,
  prior <- (1 - 0.3) prior + 0.3 posterior. It starts from the uniform prior, not from the first posterior:
  that is often 1 for one expert to the last bit, and the others would never be heard again.

What a window says is the mean of its posteriors over its counted tokens, as in BTM's published evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from btx_megatron.ensembles.mixture import Floats, check_finite, checked, keep_top, mean_weights, normalised

DECAY = 0.3
Prior = Literal["uniform", "updating"]


def posterior_weights(
    log_p_EWS: ArrayLike,
    mask_WS: ArrayLike,
    prior: Prior | ArrayLike = "uniform",
    top_k: int | None = None,
    decay: float = DECAY,
) -> Floats:
    """Log of p(D=j | x_<t), [E, W, S], for ``mixture.mix``.

    ``prior`` is a name, or probabilities [E] (the cached prior; a 0 leaves an expert out). "updating" reads
    the windows in their order, one stream of text. ``top_k`` keeps the largest at every token: all experts
    must still read the text, so it saves nothing, unlike a cached prior of which only the top-k were kept.
    Raises ValueError for values or shapes that cannot be, UserError for a ``top_k`` that cannot.
    """
    log_p, counted = checked(log_p_EWS, mask_WS)
    check_finite(log_p, np.broadcast_to(counted, log_p.shape))
    so_far = _log_likelihood_so_far(np.where(counted, log_p, 0.0))
    if isinstance(prior, str) and prior == "updating":
        return keep_top(_with_updating_prior(so_far, counted, decay), top_k)
    log_prior = _uniform(len(log_p)) if isinstance(prior, str) else _log_of(prior, len(log_p))
    return keep_top(normalised(so_far + log_prior[:, None, None]), top_k)


def cached_prior(log_p_EWS: ArrayLike, mask_WS: ArrayLike) -> Floats:
    """A prior [E] from a development text: the mean posterior (uniform prior) over all counted tokens.

    The moving average would remember the last few windows only (with 0.3 about six); the mean counts each one
    and does not depend on their order.
    """
    return mean_weights(posterior_weights(log_p_EWS, mask_WS), mask_WS)


def parameter_weights(names: Sequence[str], log_p_EWS: ArrayLike, mask_WS: ArrayLike) -> dict[str, float]:
    """Weights for an average of the experts' parameters: the cached prior by name (``--weight NAME=W``)."""
    return dict(zip(names, cached_prior(log_p_EWS, mask_WS).tolist(), strict=True))


def _log_likelihood_so_far(log_p_EWS: Floats) -> Floats:
    """log p(x_<t | D=j): the sum over the positions before each one."""
    so_far = np.zeros_like(log_p_EWS)
    np.cumsum(log_p_EWS[:, :, :-1], axis=2, out=so_far[:, :, 1:])
    return so_far


def _with_updating_prior(so_far_EWS: Floats, counted_WS: np.ndarray, decay: float) -> Floats:
    if not 0 < decay <= 1:
        raise ValueError(f"decay {decay}: it must be in (0, 1]")
    log_prior = _uniform(len(so_far_EWS))
    log_w = np.empty_like(so_far_EWS)
    keep, take = np.log1p(-decay) if decay < 1 else -np.inf, np.log(decay)
    for window, counted in enumerate(counted_WS):
        log_w[:, window] = normalised(so_far_EWS[:, window] + log_prior[:, None])
        if counted.any():
            said = np.logaddexp.reduce(log_w[:, window, counted], axis=1) - np.log(counted.sum())
            log_prior = normalised(np.logaddexp(keep + log_prior, take + said))
    return log_w


def _uniform(experts: int) -> Floats:
    return np.full(experts, -np.log(experts))


def _log_of(prior: ArrayLike, experts: int) -> Floats:
    values = np.asarray(prior, dtype=np.float64)
    if values.shape != (experts,) or not (values >= 0).all() or abs(values.sum() - 1) > 1e-6:
        raise ValueError(f"prior {values.tolist()}: give {experts} probabilities that sum to 1")
    with np.errstate(divide="ignore"):
        return normalised(np.log(values))
