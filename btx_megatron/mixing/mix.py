"""The mix itself: a plan, then one pass over the tensors, layer by layer and expert by expert.

Memory stays at a few layers of one tensor, whatever the size of the model and the number of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint, DistWriter
from btx_megatron.checkpoints.metadata import dtype_name
from btx_megatron.checkpoints.names import has_layer_axis
from btx_megatron.checkpoints.tracker import RELEASE, write_tracker
from btx_megatron.errors import UserError
from btx_megatron.mixing.average import mean
from btx_megatron.mixing.hashes import TensorHash
from btx_megatron.mixing.plan import PlannedTensor, plan_average, plan_mix
from btx_megatron.mixing.router_init import normal_router

Part = tuple[tuple[int, ...], Tensor]


class Reporter(Protocol):
    """Told how far the work is (``runtime.progress.Progress``)."""

    def update(self, phase: str, done: int, total: int, text: str = "") -> None:
        """``done`` of ``total`` tensors."""
        ...


def mix(
    sources: dict[str, Path],
    output: Path,
    *,
    router_std: float,
    random_seed: int,
    topk: int,
    recipe: dict[str, Any] | None = None,
    progress: Reporter | None = None,
) -> dict[str, Any]:
    """Mix dense checkpoints into a MoE checkpoint (a ``release``) in ``output``; returns its tensors' table.

    Expert i is source i, and so is row i of the router. ``recipe`` travels in the checkpoint. Raises
    UserError if the sources do not fit together or hold values that are not finite; then ``output`` has
    no tracker.
    """
    opened = {name: DistCheckpoint(path) for name, path in sources.items()}
    if topk > len(sources):
        raise UserError(f"moe_router_topk={topk} is more than the {len(sources)} experts")
    draw = _RouterDraw(router_std, random_seed)
    common = _common(recipe) | {"mixed_from": list(sources), "moe_router_topk": topk}
    return _write(opened, plan_mix(opened), output, common, draw, progress)


def average(
    sources: dict[str, Path],
    output: Path,
    *,
    recipe: dict[str, Any] | None = None,
    progress: Reporter | None = None,
) -> dict[str, Any]:
    """The whole model averaged over the sources, feed-forwards too: the baseline ``average``."""
    opened = {name: DistCheckpoint(path) for name, path in sources.items()}
    common = _common(recipe) | {"averaged_from": list(sources)}
    return _write(opened, plan_average(opened), output, common, None, progress)


def _common(recipe: dict[str, Any] | None) -> dict[str, Any]:
    """Plain values that lie in the checkpoint beside its tensors."""
    return {"iteration": 0, "checkpoint_version": 3.0} | ({"recipe": recipe} if recipe else {})


class _RouterDraw:
    def __init__(self, std: float, random_seed: int) -> None:
        self.std, self.random_seed = std, random_seed

    def parts(self, planned: PlannedTensor) -> Iterator[Part]:
        layers, experts, hidden = planned.info.shape
        for layer in range(layers):
            yield (layer,), normal_router(layer, experts, hidden, self.std, self.random_seed)


def _write(
    sources: dict[str, DistCheckpoint],
    plan: list[PlannedTensor],
    output: Path,
    common: dict[str, Any],
    draw: _RouterDraw | None,
    progress: Reporter | None,
) -> dict[str, Any]:
    writer = DistWriter(output / RELEASE)
    table: dict[str, Any] = {}
    for done, planned in enumerate(plan):
        if progress:
            progress.update("mixing", done, len(plan), planned.name)
        parts = draw.parts(planned) if planned.source is None and draw else _parts(sources, planned)
        table[planned.name] = {
            "rule": planned.rule,
            "inputs": [] if planned.source is None else list(sources),
            **_write_tensor(writer, planned, parts),
        }
    writer.finish(common)
    write_tracker(output, RELEASE)
    return table


def _parts(sources: dict[str, DistCheckpoint], planned: PlannedTensor) -> Iterator[Part]:
    """Leading indices and content of each part of an output tensor, in storage order."""
    assert planned.source is not None
    if not has_layer_axis(planned.name):
        yield (), mean(source.read(planned.source) for source in sources.values())
        return
    for layer in range(planned.info.shape[0]):
        layers = (source.read(planned.source, layer) for source in sources.values())
        if planned.rule == "expert":
            for expert, feed_forward in enumerate(layers):
                yield (layer, expert), feed_forward
        else:
            yield (layer,), mean(layers)


def _write_tensor(writer: DistWriter, planned: PlannedTensor, parts: Iterator[Part]) -> dict[str, Any]:
    digest = TensorHash()
    for index, part in parts:
        part = part.to(planned.info.dtype)
        if not torch.isfinite(part).all():
            raise UserError(
                f"{planned.source or planned.name} {list(index)}: a source holds NaN or infinite values"
            )
        writer.add(planned.name, planned.info, part, *index)
        digest.update(part)
    shape, dtype = list(planned.info.shape), dtype_name(planned.info.dtype)
    return {"shape": shape, "dtype": dtype, "xxh3_128": digest.hexdigest()}
