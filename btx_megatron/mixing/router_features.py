"""Routers that know the experts' text from the start: what the averaged dense model makes of samples of it.

Every expert brings a text. The averaged model reads all of them, and in every layer the hidden states that a
router would see there (behind the norm in front of the feed-forward) are summed up by expert; the rows follow
from these sums alone (``router_init``). All texts are cut to the length of the shortest, so that no expert is
likelier for having brought more.

This needs Megatron, runs in one process in fp32, and holds the averaged model and, for each layer, a matrix
[hidden, hidden] in fp64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.stream import PlannedTensor
from btx_megatron.data.held_out import Window, stream_windows
from btx_megatron.errors import UserError
from btx_megatron.evaluation.alone import EMBEDDING, Loaded, loaded_model
from btx_megatron.evaluation.text import encode_file
from btx_megatron.mixing.router_init import FeatureSums

RIDGE_STRENGTH = 0.01
"""Of the ridge, times the mean squared feature: directions that few tokens use must not decide."""

_SEQ_LENGTH = 512


def rows_from_text(
    kind: str, average: list[PlannedTensor], config: ModelConfig, texts: Mapping[str, Path], tokenizer: Path
) -> Tensor:
    """[layers, experts, hidden] fp32: a router row of each expert in every layer; ``kind``: centroid, ridge.

    ``average`` plans the averaged dense model, ``texts`` are the experts' in their order. Raises UserError
    for a text that is none or too short, and where the features give no router.
    """
    rows = next(tensor.info.shape[0] for tensor in average if tensor.name == EMBEDDING)
    ids = [np.asarray(_ids(tokenizer, path, rows), dtype=np.int64) for path in texts.values()]
    return rows_from_tokens(kind, average, config, ids)


def rows_from_tokens(
    kind: str, average: list[PlannedTensor], config: ModelConfig, ids: Sequence[NDArray[np.int64]]
) -> Tensor:
    """As rows_from_text, from the token ids [n] of each expert's text, two at least."""
    tokens = min(len(one) for one in ids) - 1
    sequence = min(_SEQ_LENGTH, config.seq_length, tokens)
    windows = [_whole_windows(one[: tokens + 1], sequence) for one in ids]
    with loaded_model(average, config, sequence) as loaded:
        sums = _feature_sums(loaded, windows, config.hidden_size)
    make = {"centroid": FeatureSums.centroid_router, "ridge": _ridge}[kind]
    return torch.stack([make(layer) for layer in sums])


def _ridge(sums: FeatureSums) -> Tensor:
    return sums.ridge_router(RIDGE_STRENGTH)


def _ids(tokenizer: Path, path: Path, rows: int) -> list[int]:
    ids = encode_file(tokenizer, path)
    if max(ids) >= rows:
        raise UserError(
            f"{path}: token {max(ids)} is beyond the {rows} of the model; is {tokenizer} its own?"
        )
    return ids


def _whole_windows(ids: NDArray[np.int64], sequence: int) -> list[Window]:
    """Windows without padding, which would count as text."""
    windows = stream_windows(ids, sequence)
    return [window for window in windows if window[2].all()]


def _feature_sums(loaded: Loaded, windows: list[list[Window]], hidden: int) -> list[FeatureSums]:
    """One of each layer. Windows are read one by one: empty ones that fill up a batch would count as text."""
    from btx_megatron.evaluation.loss import held_out_loss
    from btx_megatron.model.build import unwrap

    stage = replace(loaded.stage, training=replace(loaded.stage.training, micro_batch_size=1))
    layers: Any = unwrap(loaded.model[0]).decoder.layers  # type: ignore[union-attr]
    sums = [FeatureSums(len(windows), hidden) for _ in layers]
    for expert, its in enumerate(windows):

        def take(layer: int, states: Tensor, expert: int = expert) -> None:
            sums[layer].add(expert, states.reshape(-1, hidden))

        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, inputs, number=number: take(number, inputs[0]))
            for number, layer in enumerate(layers)
        ]
        held_out_loss(loaded.model, its, stage, loaded.seq_length)
        for hook in hooks:
            hook.remove()
    return sums
