"""The two loaders behind one interface: who brings a stage's samples to the model.

``megatron`` reads each sample when it is asked for, in the training process, from Megatron's datasets. It is
the reference. ``dali`` (NVIDIA DALI, the extra ``dali``) has the next micro-batches ready before they are
asked for, on the GPU where there is one. Both give the same samples in the same order: which ones follows
from the number of consumed samples alone, so either goes on exactly where the other stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from btx_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

Kind = Literal["megatron", "dali"]


def loader(kind: Kind, device: torch.device) -> Callable[..., Iterator[dict[str, Any]]]:
    """A function with the arguments of ``blend.batches`` that gives the same micro-batches.

    ``device`` is where the model is; DALI's come to lie there. Raises UserError as check_installed.
    """
    if kind == "megatron":
        from btx_megatron.data.blend import batches

        return batches
    check_installed(kind)
    from btx_megatron.data.dali_loader import dali_batches

    return functools.partial(dali_batches, device=device)


def check_installed(kind: Kind) -> None:
    """Raise UserError where the loader's package is missing."""
    if kind == "dali" and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        raise UserError(
            "data.loader dali: NVIDIA DALI is not installed; pip install 'btx-megatron[dali]', or set "
            "data.loader=megatron"
        )
