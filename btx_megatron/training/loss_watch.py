"""What is watched from step to step: steps that were skipped, and losses that jump.

Every rank watches, for each sees the same losses and all must stop together.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from btx_megatron.errors import StageFailed
from btx_megatron.training.metrics import StepResult

_WINDOW = 100
_FEWEST = 10  # of fewer losses the median says little


@dataclass
class Skips:
    """How many steps were skipped, because loss or gradient was not finite; lies in the checkpoint."""

    total: int = 0
    in_a_row: int = 0
    """Up to the last step."""


class LossWatch:
    """Counts skipped steps and finds spikes."""

    def __init__(self, skips: Skips, most_in_a_row: int, spike_factor: float) -> None:
        """``skips`` is counted up in place; more than ``most_in_a_row`` end the stage; a spike is a loss
        above ``spike_factor`` times the median of the last 100."""
        self.skips, self._most, self._factor = skips, most_in_a_row, spike_factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def step(self, iteration: int, result: StepResult) -> str | None:
        """Look at a step; returns a line for the log where it is remarkable.

        Raises StageFailed where too many steps in a row were skipped.
        """
        if result.skipped:
            self.skips.total += 1
            self.skips.in_a_row += 1
            return self._skipped(iteration, result)
        self.skips.in_a_row = 0
        usual = median(self._losses) if len(self._losses) >= _FEWEST else math.inf
        self._losses.append(result.lm_loss)
        if result.lm_loss <= self._factor * usual:
            return None
        return f"step {iteration}: the loss jumps to {result.lm_loss:.4g}; the median before is {usual:.4g}"

    def _skipped(self, iteration: int, result: StepResult) -> str:
        loss_is_bad = not math.isfinite(result.lm_loss)
        what = (
            f"the loss is {result.lm_loss}" if loss_is_bad else f"the gradient's norm is {result.grad_norm}"
        )
        row = self.skips.in_a_row
        if row > self._most:
            raise StageFailed(
                f"step {iteration}: {what}; {row} skipped in a row, more than "
                f"training.max_consecutive_skipped_steps {self._most}: lower training.lr, or look at the data"
            )
        return f"step {iteration}: {what}; skipped ({row} in a row, {self.skips.total} in all)"
