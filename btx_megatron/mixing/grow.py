"""A mixture that grows by an expert, or loses one, after it was mixed or trained.

A mixture that was never trained is better mixed again from its sources (``remix_sources``): then the new
expert counts in the mean as every other. A trained one keeps what it learned: its experts and router rows
stay, the new expert's feed-forwards and a new router row join them, and the rest moves a little towards the
new expert's: (1 - lambda) trained + lambda new, by default with lambda = 1 / (N + 1), the new expert's share
among N + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, ROUTER, has_expert_axis
from btx_megatron.checkpoints.pieces import Index, Source, TensorInfo
from btx_megatron.checkpoints.stream import PlannedTensor, Rows, Watched, rows_of
from btx_megatron.errors import UserError
from btx_megatron.manifest import Manifest, read_manifest
from btx_megatron.mixing.average import weighted_mean
from btx_megatron.mixing.plan import common_weights
from btx_megatron.mixing.router_init import normal_router

MOE_TO_DENSE = {moe: dense for dense, moe in DENSE_TO_MOE.items()}


def plan_grow(
    moe: Source, name: str, new: Source, share: float | None, router_std: float, random_seed: int
) -> list[PlannedTensor]:
    """The mixture with one expert more, its last. ``share`` is lambda; None: 1 / (N + 1).

    Raises UserError where ``moe`` is no mixture, ``new`` is no branch of the same model, or lambda is none.
    """
    experts = count_experts(moe)
    weight = 1 / (experts + 1) if share is None else share
    if not 0 <= weight <= 1:
        raise UserError(f"--lambda {share}: must lie between 0 and 1")
    _check_branch(moe, name, new)
    planned = []
    for key, info in moe.tensors.items():
        dense = MOE_TO_DENSE.get(key, key)
        if key == ROUTER:
            planned.append(_router(moe, info, router_std, random_seed))
        elif has_expert_axis(key):
            planned.append(_joined(moe, key, info, dense, name, new))
        else:
            planned.append(_moved(moe, key, info, dense, name, new, weight))
    return planned


def _joined(moe: Source, key: str, info: TensorInfo, dense: str, name: str, new: Source) -> PlannedTensor:
    layers, experts, *rest = info.shape

    def make(index: Index) -> Rows:
        layer, expert = index
        return rows_of(moe, key, index) if expert < experts else rows_of(new, dense, (layer,))

    grown = TensorInfo((layers, experts + 1, *rest), info.dtype)
    return PlannedTensor(key, grown, "expert", ("mixture", name), make)


def _moved(
    moe: Source, key: str, info: TensorInfo, dense: str, name: str, new: Source, weight: float
) -> PlannedTensor:
    def make(index: Index) -> Rows:
        trained, other = rows_of(moe, key, index), rows_of(new, dense, index)

        def rows(start: int, stop: int) -> Tensor:
            return weighted_mean((trained(start, stop), other(start, stop)), (1 - weight, weight))

        return rows

    return PlannedTensor(key, info, f"lambda {weight:.6g}", ("mixture", name), make)


def _router(moe: Source, info: TensorInfo, std: float, random_seed: int) -> PlannedTensor:
    layers, experts, hidden = info.shape

    def make(index: Index) -> Rows:
        (layer,) = index
        row = normal_router(layer, 1, hidden, std, random_seed)
        whole = torch.cat([rows_of(moe, ROUTER, index)(0, experts), row.to(info.dtype)])
        return lambda start, stop: whole[start:stop]

    grown = TensorInfo((layers, experts + 1, hidden), info.dtype)
    return PlannedTensor(ROUTER, grown, "router:one row more", ("mixture",), make)


def plan_drop(moe: Source, dropped: int) -> list[PlannedTensor]:
    """The mixture without expert number ``dropped``; nothing else changes.

    Raises UserError for a number that is none, and for the last expert.
    """
    experts = count_experts(moe)
    if not 0 <= dropped < experts:
        raise UserError(f"--drop-expert {dropped}: the mixture has experts 0 to {experts - 1}")
    if experts == 1:
        raise UserError("--drop-expert: it is the only expert")
    kept = [expert for expert in range(experts) if expert != dropped]
    planned = []
    for key, info in moe.tensors.items():
        if key != ROUTER and not has_expert_axis(key):
            planned.append(_kept(moe, key, info))
            continue
        shape = (info.shape[0], experts - 1, *info.shape[2:])
        planned.append(_without(moe, key, TensorInfo(shape, info.dtype), kept))
    return planned


def _kept(moe: Source, key: str, info: TensorInfo) -> PlannedTensor:
    return PlannedTensor(key, info, "copy", ("mixture",), lambda index: rows_of(moe, key, index))


def _without(moe: Source, key: str, info: TensorInfo, kept: list[int]) -> PlannedTensor:
    def make(index: Index) -> Rows:
        if key == ROUTER:
            whole = rows_of(moe, key, index)(0, len(kept) + 1)[kept]
            return lambda start, stop: whole[start:stop]
        return rows_of(moe, key, (index[0], kept[index[1]]))

    return PlannedTensor(key, info, "copy", ("mixture",), make)


def count_experts(moe: Source) -> int:
    """Experts of a mixture. Raises UserError for a dense model."""
    if ROUTER not in moe.tensors:
        raise UserError(f"{moe.folder}: a dense model, not a mixture; name a mixture")
    return moe.tensors[ROUTER].shape[1]


def _check_branch(moe: Source, name: str, new: Source) -> None:
    common_weights({name: new})
    for dense, info in new.tensors.items():
        key = DENSE_TO_MOE.get(dense, dense)
        there = moe.tensors.get(key)
        if there is None:
            raise UserError(
                f"expert {name} has {dense}, the mixture has none; it must be a branch of the same model"
            )
        shape = (there.shape[0], *there.shape[2:]) if has_expert_axis(key) else there.shape
        if (shape, there.dtype) != (info.shape, info.dtype):
            raise UserError(
                f"{dense} is {list(shape)} in the mixture and {list(info.shape)} in expert {name}, or of "
                "another type; it must be a branch of the same model, stacked and not split"
            )
    missing = sorted({DENSE_TO_MOE.get(key, key) for key in DENSE} & set(moe.tensors) - _names_of(new))
    if missing:
        raise UserError(
            f"the mixture has {missing[0]}, expert {name} does not; it must be a branch of the same model"
        )


def _names_of(dense: Source) -> set[str]:
    return {DENSE_TO_MOE.get(name, name) for name in dense.tensors}


def manifest_to_mix_again(moe: Path) -> Manifest | None:
    """The manifest of a mixture that is as it was mixed, so that it can be mixed again; None of others."""
    manifest = read_manifest(moe)
    mixed = manifest is not None and manifest.stage == "mix" and "sources" in manifest.recipe
    return manifest if mixed else None


def remix_sources(manifest: Manifest) -> dict[str, Path]:
    """Where the sources of an untrained mixture lie, by expert. Raises UserError if it does not say."""
    sources: Mapping[str, Any] = manifest.recipe.get("sources", {})
    if manifest.stage != "mix" or not sources:
        raise UserError("the mixture's manifest does not name its sources; give them with --expert NAME=PATH")
    for name, path in sources.items():
        if not Path(path).exists():
            raise UserError(
                f"expert {name.strip('()')}: {path} is gone, of which the mixture was made; put it back, or "
                "give --lambda to keep the mixture's weights"
            )
    return {name: Path(path) for name, path in sources.items() if name != "(base)"}


def check_fingerprints(sources: Mapping[str, Watched], manifest: Manifest) -> None:
    """Raise UserError if a source is not what the mixture was made from."""
    for name, source in sources.items():
        expected = manifest.inputs.get(name)
        if expected is not None and source.fingerprint() != expected:
            raise UserError(
                f"expert {name} ({source.folder}) has changed since it was mixed; put it back, or mix anew"
            )
