"""Points and spans of time that text is from, as a recipe writes them: numbers (years) or dates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date

from btx_megatron.errors import UserError

Time = float | date


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
    if is_after(window.start, window.end, where):
        raise UserError(f"{where}: starts at {start} and ends at {end}; give the earlier one first")
    return window


def is_after(first: Time, second: Time, where: str) -> bool:
    """Raises UserError, naming ``where``, for times of two kinds."""
    if isinstance(first, date) and isinstance(second, date):
        return first > second
    if isinstance(first, date) or isinstance(second, date):
        raise UserError(
            f"{where}: {written(first)} and {written(second)} cannot be compared; "
            "give all times as numbers, or all as dates"
        )
    return first > second


def written(time: Time) -> str:
    """As a recipe has it."""
    return time.isoformat() if isinstance(time, date) else f"{time:g}"
