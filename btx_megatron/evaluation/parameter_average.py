"""One model of several: the average of their parameters by given weights, in the model that is there.

    theta = sum_j w_j theta_j                                             (BTM, arXiv 2208.03306)

The models are loaded one after another into the same chunks, and summed in fp32 beside them. Each rank sums
its own shards, so any layout will do, and nothing is written to disk. The price is one model in fp32 on every
rank, and a reading of each checkpoint for each set of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from btx_megatron.evaluation.loss import Model


@torch.no_grad()
def load_average(model: Model, checkpoints: Mapping[Path, float]) -> None:
    """Put the average into ``model``: summed in fp32, rounded once to its type. A collective.

    ``checkpoints``: folder and weight of each model; a weight of 0 leaves it unread. The weights are taken as
    they are, so that they should sum to 1. Raises UserError for a checkpoint of another model.
    """
    from btx_megatron.training.checkpoint import load_weights

    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for folder, weight in checkpoints.items():
        if weight:
            load_weights(folder, model)
            for total, parameter in zip(sums, parameters, strict=True):
                total.add_(parameter, alpha=weight)
    for total, parameter in zip(sums, parameters, strict=True):
        parameter.copy_(total)
