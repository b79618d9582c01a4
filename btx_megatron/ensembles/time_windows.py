"""TiMoE: experts that know a slice of time, and queries that must not hear from their future (2508.08827).

A query of time q is answered by the experts whose window ends at q or before; the others are masked. What is
left is merged as probabilities, log sum_j w_j p_j with weights that sum to 1 over the allowed experts: equal
ones (the paper's average), or their posterior (``posterior``). A masked expert has the weight 0 exactly: its
numbers are never read, so they cannot reach the output, not even as a NaN.

Times are numbers (years, say) or ISO dates, one kind in a run. The end belongs to the window: an expert of
text to 2014-12-31 answers from that day on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from btx_megatron.ensembles.mixture import Bools, Floats, checked, keep_top
from btx_megatron.ensembles.posterior import posterior_weights
from btx_megatron.errors import UserError

Time = float | date
Merge = Literal["uniform", "posterior"]


@dataclass(frozen=True)
class TimeWindow:
    """The text an expert was trained on, from ``start`` to ``end``, both of one kind and both inside."""

    start: Time
    end: Time


def parse_time(value: object, where: str) -> Time:
    """A number, or a date written YYYY-MM-DD. Raises UserError, naming ``where``, for anything else."""
    if isinstance(value, date):
        return date(value.year, value.month, value.day)
    try:
        number = math.nan if isinstance(value, bool) else float(str(value))
    except ValueError:
        try:
            return date.fromisoformat(str(value))
        except ValueError:
            number = math.nan
    if math.isfinite(number):
        return number
    raise UserError(
        f"{where}: '{value}' is no time; give a number such as 2014, or a date such as 2014-12-31"
    )


def parse_time_window(start: object, end: object, where: str) -> TimeWindow:
    """Raises UserError for ends that are no times, of two kinds, or the wrong way round."""
    window = TimeWindow(parse_time(start, f"{where}: start"), parse_time(end, f"{where}: end"))
    if _is_after(window.start, window.end, where):
        raise UserError(f"{where}: starts at {start} and ends at {end}; give the earlier one first")
    return window


def allowed_experts(windows: Mapping[str, TimeWindow], time: Time) -> Bools:
    """Which experts [E] may answer a query of this time.

    Raises UserError where none may, and for a time of another kind than the windows.
    """
    allowed = np.array(
        [not _is_after(window.end, time, f"expert {name}: end") for name, window in windows.items()],
        dtype=bool,
    )
    if not allowed.any():
        ends = ", ".join(f"{name} {_written(window.end)}" for name, window in windows.items())
        raise UserError(
            f"time {_written(time)}: every expert's window ends later ({ends}); "
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


def _is_after(first: Time, second: Time, where: str) -> bool:
    if isinstance(first, date) and isinstance(second, date):
        return first > second
    if isinstance(first, date) or isinstance(second, date):
        raise UserError(
            f"{where}: {_written(first)} and {_written(second)} cannot be compared; "
            "give all times as numbers, or all as dates"
        )
    return first > second


def _written(time: Time) -> str:
    return time.isoformat() if isinstance(time, date) else f"{time:g}"
