"""A mixture that grows by an expert, or loses one, after it was mixed or trained.

A mixture that was never trained is better mixed again from its sources (``remix_sources``): then the new
expert counts in the mean as every other. A trained one keeps what it learned: its experts and router rows
stay, the new expert's feed-forwards and a new router row join them, and the rest moves a little towards the
new expert's: (1 - lambda) trained + lambda new, by default with lambda = 1 / (N + 1), the new expert's share
among N + 1. Of k new experts each has lambda, and (1 - k lambda) stays: by default 1 / (N + k), which is what
adding them one after another comes to, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, ROUTER, has_expert_axis
from btx_megatron.checkpoints.pieces import Index, Source, TensorInfo
from btx_megatron.checkpoints.stream import PlannedTensor, Rows, Watched, rows_of
from btx_megatron.errors import UserError
from btx_megatron.manifest import Manifest, read_manifest
from btx_megatron.mixing.average import weighted_mean
from btx_megatron.mixing.hashes import hash_tensors
from btx_megatron.mixing.plan import common_weights
from btx_megatron.mixing.router_init import normal_router

MIXTURE = "(mixture)"
"""The mixture among the sources; no expert may have such a name."""
MOE_TO_DENSE = {moe: dense for dense, moe in DENSE_TO_MOE.items()}


def plan_grow(
    moe: Source,
    kept: Sequence[int],
    new: Mapping[str, Source],
    share: float | None,
    router_std: float,
    random_seed: int,
) -> list[PlannedTensor]:
    """The mixture with the experts ``kept`` of its own, then the ``new`` ones, by name.

    ``share`` is lambda, of each new one; None: 1 / experts of the result. Without a new one all that is kept
    is copied. Raises UserError where ``moe`` is no mixture, a new one is no branch of the same model, or
    lambda is none.
    """
    count_experts(moe)
    weight = 1 / (len(kept) + len(new)) if share is None else share
    if not 0 <= weight * len(new) <= 1:
        raise UserError(f"--lambda {share}: must lie between 0 and 1, for all new experts together")
    for name, source in new.items():
        _check_branch(moe, name, source)
    planned = []
    for key, info in moe.tensors.items():
        dense = MOE_TO_DENSE.get(key, key)
        if key == ROUTER:
            planned.append(_router(moe, info, kept, len(new), router_std, random_seed))
        elif has_expert_axis(key):
            planned.append(_joined(moe, key, info, kept, dense, new))
        elif new:
            planned.append(_moved(moe, key, info, dense, new, weight))
        else:
            planned.append(PlannedTensor(key, info, "copy", (MIXTURE,), partial(rows_of, moe, key)))
    return planned


def _joined(
    moe: Source, key: str, info: TensorInfo, kept: Sequence[int], dense: str, new: Mapping[str, Source]
) -> PlannedTensor:
    layers, _, *rest = info.shape
    joining = list(new.values())

    def make(index: Index) -> Rows:
        layer, expert = index
        if expert < len(kept):
            return rows_of(moe, key, (layer, kept[expert]))
        return rows_of(joining[expert - len(kept)], dense, (layer,))

    grown = TensorInfo((layers, len(kept) + len(new), *rest), info.dtype)
    return PlannedTensor(key, grown, "expert" if new else "copy", (MIXTURE, *new), make)


def _moved(
    moe: Source, key: str, info: TensorInfo, dense: str, new: Mapping[str, Source], weight: float
) -> PlannedTensor:
    weights = (1 - weight * len(new), *([weight] * len(new)))

    def make(index: Index) -> Rows:
        inputs = [rows_of(moe, key, index), *(rows_of(source, dense, index) for source in new.values())]
        return lambda start, stop: weighted_mean((rows(start, stop) for rows in inputs), weights)

    return PlannedTensor(key, info, f"lambda {weight:.6g}", (MIXTURE, *new), make)


def _router(
    moe: Source, info: TensorInfo, kept: Sequence[int], joining: int, std: float, random_seed: int
) -> PlannedTensor:
    layers, experts, hidden = info.shape

    def make(index: Index) -> Rows:
        (layer,) = index
        rows = rows_of(moe, ROUTER, index)(0, experts)[list(kept)]
        if joining:
            new_rows = normal_router(layer, joining, hidden, std, random_seed)
            rows = torch.cat([rows, new_rows.to(info.dtype)])
        return lambda start, stop: rows[start:stop]

    grown = TensorInfo((layers, len(kept) + joining, hidden), info.dtype)
    rule = f"router:{joining} new" if joining else "copy"
    return PlannedTensor(ROUTER, grown, rule, (MIXTURE,), make)


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
    return plan_grow(moe, kept, {}, None, router_std=0.0, random_seed=0)


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


def manifest_of_mix(moe: Path) -> Manifest | None:
    """The manifest that says how a mixture was mixed, and from what; None of others."""
    manifest = read_manifest(moe)
    of_mix = manifest is not None and manifest.stage == "mix" and manifest.recipe.get("sources")
    return manifest if of_mix else None


def is_as_mixed(moe: Path, manifest: Manifest) -> bool:
    """Whether a mixture is as it was mixed, so that it can be mixed again.

    All its weights are read: the manifest stays where somebody trains on in the mixture's own folder.
    """
    written: Mapping[str, Any] = manifest.outputs["tensors"]
    hashes = {name: row["xxh3_128"] for name, row in written.items()}
    return hashes == {name: row["xxh3_128"] for name, row in hash_tensors(moe).items()}


def remix_sources(manifest: Manifest) -> dict[str, Path]:
    """Where the sources of an untrained mixture lie, by expert, and its base. Raises UserError for one that
    is gone."""
    sources: Mapping[str, Any] = manifest.recipe["sources"]
    for name, path in sources.items():
        if not Path(path).exists():
            raise UserError(
                f"expert {name.strip('()')}: {path} is gone, of which the mixture was made; put it back, or "
                "give --lambda to keep the mixture's weights"
            )
    return {name: Path(path) for name, path in sources.items()}


def check_fingerprints(sources: Mapping[str, Watched], manifest: Manifest) -> None:
    """Raise UserError if a source is not what the mixture was made from."""
    for name, source in sources.items():
        expected = manifest.inputs.get(name)
        if expected is not None and source.fingerprint() != expected:
            who = f"the {name[1:-1]}" if name.startswith("(") else f"expert {name}"
            raise UserError(
                f"{who} ({source.folder}) has changed since it was mixed; put it back, or mix anew"
            )
