"""The loss of every single held-out token, for ensembles: they mix the experts' probabilities of a token.

Shapes: W windows, S positions, B micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btx_megatron.evaluation.loss import Model, Windows, micro_batches_of
from btx_megatron.model.routers import batch_context
from btx_megatron.recipe import Stage


def token_losses(model: Model, windows: Windows, stage: Stage, sequence: int) -> np.ndarray:
    """[W, S] fp32: -log p of each label in nats, equal on all ranks; any layout. A collective."""
    from btx_megatron.training.trainer import evaluating, forward_step, run_micro_batches

    kept: list[tuple[Tensor, Tensor]] = []

    def step(batches: Iterator[dict[str, Any]], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        output, sum_loss = forward_step(batches, chunk)
        samples = batch_context.sample_index

        def keep(losses_BS: Tensor) -> Any:
            kept.append((samples, losses_BS.detach().float().cpu()))  # type: ignore[arg-type]
            return sum_loss(losses_BS)

        return output, keep

    batches, count = micro_batches_of(model, windows, stage)
    with evaluating(model):
        run_micro_batches(model, batches, count, stage, sequence, forward_only=True, step=step)
    return gathered(kept, len(windows))


def gathered(kept: list[tuple[Tensor, Tensor]], windows: int) -> np.ndarray:
    """[W, ...] fp32: what the last pipeline stages have, in the windows' order; their TP ranks hold the same.

    ``kept``: of each micro-batch the windows' numbers [B] and their values [B, ...]. A collective.
    """
    everybodys: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everybodys, kept)
    parts = [part for its in everybodys for part in its]
    values_W = np.full((windows, *parts[0][1].shape[1:]), np.nan, dtype=np.float32)
    for numbers, values_B in parts:
        for number, values in zip(numbers.tolist(), values_B.numpy(), strict=True):
            if number < windows:  # the others fill up the last micro-batches
                values_W[number] = values
    assert not np.isnan(values_W.reshape(windows, -1)).all(axis=1).any(), "a window was not evaluated"
    return values_W
