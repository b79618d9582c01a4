"""Micro-batches through NVIDIA DALI: ready before the model asks, and on the GPU where there is one.

A DALI pipeline asks a function here for one micro-batch after the other (``fn.external_source``) and keeps
``PREFETCH`` of them ready; with a GPU its own threads and stream copy them there beside the computation. The
function reads from Megatron's datasets by the same sample numbers as the reference, so order and resume need
nothing of DALI's own: a pipeline that begins at the consumed samples is where another one stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from btx_megatron.data.blend import Samples, micro_batch, sample_numbers

PREFETCH = 2
"""Micro-batches that are ready before they are asked for."""

_Arrays = tuple[NDArray[np.int64], NDArray[np.int64]]


def dali_batches(samples: Samples, *, device: torch.device, **options: int) -> Iterator[dict[str, Any]]:
    """What ``blend.batches`` gives, with its arguments as ``options``; all tensors but sample_index on
    ``device``.
    """
    pipeline = None
    for step, numbers in sample_numbers(len(samples), **options):
        pipeline = pipeline or _started(samples, device, options)
        tokens, labels = (_tensor(part) for part in pipeline.run())
        yield micro_batch(tokens, labels, numbers, step)


def _started(samples: Samples, device: torch.device, options: dict[str, int]) -> Any:
    on_gpu = device.type == "cuda"
    pipeline = _pipeline(
        _read(samples, options),
        on_gpu,
        batch_size=options["micro_batch_size"],
        num_threads=1,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
    )
    pipeline.build()
    return pipeline


def _read(samples: Samples, options: dict[str, int]) -> Iterator[_Arrays]:
    """Tokens and labels [b, s] of one micro-batch after the other: DALI runs ahead of the loop above."""
    for _, numbers in sample_numbers(len(samples), **options):
        items = [samples[i] for i in numbers]
        yield np.stack([i["tokens"].numpy() for i in items]), np.stack([i["labels"].numpy() for i in items])


@pipeline_def
def _pipeline(reader: Iterator[_Arrays], on_gpu: bool) -> Any:
    tokens, labels = fn.external_source(source=reader, num_outputs=2, dtype=types.INT64, ndim=1)
    return (tokens.gpu(), labels.gpu()) if on_gpu else (tokens, labels)


def _tensor(part: Any) -> torch.Tensor:
    """A tensor [b, s] with memory of its own: DALI writes a later micro-batch over this one."""
    return torch.utils.dlpack.from_dlpack(part.as_tensor()).clone()
