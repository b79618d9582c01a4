"""TiMoE: experts that know a slice of time, and queries that must not hear from their future (2508.08827).

A query of time q is answered by the experts whose window ends at q or before; the others are masked. What is
left is merged as probabilities, log sum_j w_j p_j with weights that sum to 1 over the allowed experts: equal
ones (the paper's average), or their posterior (``posterior``). A masked expert has the weight 0 exactly: its
numbers are never read, so they cannot reach the output, not even as a NaN.

Times are numbers (years, say) or ISO dates, one kind in a run. The end belongs to the window: an expert of
text to 2014-12-31 answers from that day on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from btx_megatron.ensembles.mixture import Bools, Floats, checked, keep_top
from btx_megatron.ensembles.posterior import posterior_weights
from btx_megatron.errors import UserError
from btx_megatron.times import Time, TimeWindow, is_after, written

Merge = Literal["uniform", "posterior"]


def allowed_experts(windows: Mapping[str, TimeWindow], time: Time) -> Bools:
    """Which experts [E] may answer a query of this time.

    Raises UserError where none may, and for a time of another kind than the windows.
    """
    allowed = np.array(
        [not is_after(window.end, time, f"expert {name}: end") for name, window in windows.items()],
        dtype=bool,
    )
    if not allowed.any():
        ends = ", ".join(f"{name} {written(window.end)}" for name, window in windows.items())
        raise UserError(
            f"time {written(time)}: every expert's window ends later ({ends}); "
            "give a later time, or an expert of earlier text"
        )
    return allowed


def time_weights(
    log_p_EWS: ArrayLike,
    mask_WS: ArrayLike,
    windows: Mapping[str, TimeWindow],
    times: Sequence[Time],
    merge: Merge = "uniform",
    top_k: int | None = None,
) -> Floats:
    """Log-weights [E, W, S] for ``mixture.mix``; ``times`` holds the time stamp of each window of text.

    ``windows`` in the experts' order. ``top_k`` keeps the largest of the allowed, or all where fewer are
    allowed. Raises UserError for a time before every expert's end, ValueError for counts that do not fit.
    """
    log_p, counted = checked(log_p_EWS, mask_WS)
    if (len(windows), len(times)) != log_p.shape[:2]:
        raise ValueError(
            f"{len(windows)} time windows, {len(times)} times for log-probabilities {log_p.shape}"
        )
    log_w = np.full(log_p.shape, -np.inf)
    for time in dict.fromkeys(times):
        experts = np.flatnonzero(allowed_experts(windows, time))
        here = np.array([other == time for other in times])
        part = np.ix_(experts, here)
        log_w[part] = _weights_of(log_p[part], counted[here], merge, top_k)
    return log_w


def _weights_of(log_p_EWS: Floats, counted_WS: Bools, merge: Merge, top_k: int | None) -> Floats:
    most = None if top_k is None else min(top_k, len(log_p_EWS))
    if merge == "posterior":
        return posterior_weights(log_p_EWS, counted_WS, top_k=most)
    return keep_top(np.zeros(log_p_EWS.shape), most)
