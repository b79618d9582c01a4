"""An optimizer that moves nothing where the gradient is not finite.

Megatron checks for NaN and Inf in fp16 alone, where a loss scaler expects them; in bf16 and fp32 its
optimizer takes whatever comes, and its norm, returned after the step, tells of the damage when it is done.
The place to look is between the two halves of its step: the norm is known (it is needed for clipping),
and no weight, moment or counter has moved.

All ranks decide alike without asking each other: the norm is a sum over ranks, and what a reduction
gives is the same on all of them, NaN and Inf included.
"""

from __future__ import annotations

import math

from megatron.core.optimizer import ChainedOptimizer


class FiniteOptimizer(ChainedOptimizer):
    """``step`` returns (False, norm, None) for a gradient whose norm is not finite, and nothing has moved."""

    _norm: float = 0.0

    def get_grad_norm(self) -> float:
        """Norm of the whole gradient, over all ranks; remembered for the half step that follows."""
        self._norm = super().get_grad_norm()
        return self._norm

    def step_with_ready_grads(self) -> bool:
        """The second half of ``step``: the update itself."""
        return math.isfinite(self._norm) and super().step_with_ready_grads()
