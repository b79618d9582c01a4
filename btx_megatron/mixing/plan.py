"""What a mix will write: every output tensor with its rule and its inputs, before anything is written.

Every tensor is accounted for. A source tensor that no rule uses, or a weight that no source has, stops
the mix by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint, TensorInfo
from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, MAY_BE_ABSENT, ROUTER
from btx_megatron.errors import UserError

Rule = Literal["mean", "expert", "router:normal"]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result."""

    name: str
    """Its (stacked) name."""
    info: TensorInfo
    """Its shape and dtype."""
    rule: Rule
    """mean: over all sources. expert: source i's becomes expert i. router:normal: drawn anew."""
    source: str | None
    """The sources' name of it; None where it is new."""


def plan_mix(sources: dict[str, DistCheckpoint]) -> list[PlannedTensor]:
    """The MoE: feed-forwards become experts, in the sources' order; the rest is averaged; new router."""
    weights = _common_weights(sources)
    planned = []
    for name, info in weights.items():
        kind, _ = DENSE[name]
        if kind == "feed_forward":
            shape = (info.shape[0], len(sources), *info.shape[1:])
            planned.append(PlannedTensor(DENSE_TO_MOE[name], TensorInfo(shape, info.dtype), "expert", name))
        else:
            planned.append(PlannedTensor(DENSE_TO_MOE.get(name, name), info, "mean", name))
    norm = weights["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    layers, hidden = norm.shape
    router = TensorInfo((layers, len(sources), hidden), norm.dtype)
    return sorted([*planned, PlannedTensor(ROUTER, router, "router:normal", None)], key=lambda t: t.name)


def plan_average(sources: dict[str, DistCheckpoint]) -> list[PlannedTensor]:
    """The dense baseline: the whole model averaged, feed-forwards too."""
    return [PlannedTensor(name, info, "mean", name) for name, info in _common_weights(sources).items()]


def _common_weights(sources: dict[str, DistCheckpoint]) -> dict[str, TensorInfo]:
    """The weights that all sources have, after checking that they are the same model."""
    first_name, first = next(iter(sources.items()))
    for name, source in sources.items():
        unknown = sorted(set(source.tensors) - set(DENSE))
        if unknown:
            raise UserError(
                f"expert {name} ({source.folder}): no rule for {unknown[0]}; a dense Llama is needed"
            )
        missing = sorted(set(DENSE) - set(source.tensors) - MAY_BE_ABSENT)
        if missing:
            raise UserError(f"expert {name} ({source.folder}): {missing[0]} is missing")
        for tensor in sorted(set(first.tensors) | set(source.tensors)):
            mine, theirs = source.tensors.get(tensor), first.tensors.get(tensor)
            if mine != theirs:
                raise UserError(
                    f"{tensor} is {_text(theirs)} in expert {first_name} and {_text(mine)} in expert {name}:"
                    " experts must be branches of one model"
                )
    return dict(first.tensors)


def _text(info: TensorInfo | None) -> str:
    return "missing" if info is None else f"{list(info.shape)} {str(info.dtype).removeprefix('torch.')}"
