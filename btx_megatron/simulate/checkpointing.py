"""How often to save, and how long a job then takes to be expected: closed forms, all times in one unit.

M is the mean time between failures of the whole job, d the time that a checkpoint takes, R the restart, T the
training, t the training between two checkpoints (delta, Ts and tau in Daly's paper).

Young, A first order approximation to the optimum checkpoint interval (CACM 17(9), 1974): t = sqrt(2 d M).
Daly, A higher order estimate of the optimum checkpoint interval for restart dumps (FGCS 22, 2006):
t = sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + (d / 2M) / 9) - d for d < 2M, else M. His expected time is
M exp(R/M) (exp((t + d)/M) - 1) T / t. A wait D before each restart, in which nothing can fail, comes once a
failure, and there are (expected time) / M of those: the factor M becomes M + D.
"""

from __future__ import annotations

import math


def young_interval(mtbf: float, checkpoint: float) -> float:
    """Training between two checkpoints, first order."""
    return math.sqrt(2 * checkpoint * mtbf)


def daly_interval(mtbf: float, checkpoint: float) -> float:
    """Training between two checkpoints, higher order; infinite where nothing fails."""
    if math.isinf(mtbf):
        return math.inf
    if checkpoint >= 2 * mtbf:
        return mtbf
    ratio = checkpoint / (2 * mtbf)
    return young_interval(mtbf, checkpoint) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def expected_time(
    training: float, segments: int, checkpoint: float, restart: float, wait: float, mtbf: float
) -> float:
    """Mean time of a job that is up and trains, in ``segments`` equal parts, a checkpoint after each.

    ``wait``: before each restart, without failures. Infinite where it is too long for a float to hold.
    """
    part = training / segments + checkpoint
    if math.isinf(mtbf):
        return segments * part
    try:
        return segments * (mtbf + wait) * math.exp(restart / mtbf) * math.expm1(part / mtbf)
    except OverflowError:
        return math.inf
