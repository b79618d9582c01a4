"""FP8's scales in a checkpoint: Transformer Engine pickles those of delayed scaling (``_extra_state``)."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.safe_globals import SafeUnpickler, safe_load_from_bytes

EXTRA_STATE = "_extra_state"
ALLOWED = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Environment variable without which Transformer Engine refuses pickles, since they can run code."""


class _Scales(SafeUnpickler):
    """Megatron's list of what such a pickle may name; and tensors in it are read as restrictedly."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return safe_load_from_bytes if name == "_load_from_bytes" else found


@contextmanager
def scales_allowed(model: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Let Transformer Engine take the scales of these state dicts, one a chunk, which can run no code.

    Raises pickle.UnpicklingError for those that could.
    """
    states = [
        state
        for chunk in model.values()
        for key, state in chunk.items()
        if EXTRA_STATE in key.rpartition(".")[2]
    ]
    pickled = [state for state in states if isinstance(state, torch.Tensor) and state.numel()]
    if not pickled:  # other builds and recipes have none; nothing is allowed that nobody needs
        yield
        return
    if any(isinstance(state, io.BytesIO) for state in states):
        raise pickle.UnpicklingError("scales of an old format, which are not read as restrictedly")
    for state in pickled:
        _Scales(io.BytesIO(state.detach().cpu().numpy().tobytes())).load()
    before = os.environ.get(ALLOWED)
    os.environ[ALLOWED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ALLOWED]
        else:
            os.environ[ALLOWED] = before
