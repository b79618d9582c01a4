"""``btx inspect``: what a checkpoint is, how several differ, and how experts moved away from their base.

Read before a mix, in seconds: facts come from headers alone (facts.py), differences from the same checks
that a mix makes (all of them, where the mix stops at the first), and the movement from a fixed sample of the
weights (task_vectors.py), judged by the rules in relatedness.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import open_checkpoint
from btx_megatron.checkpoints.pieces import Source, TensorInfo, dtype_name
from btx_megatron.errors import UserError
from btx_megatron.mixing.facts import Facts, facts_of
from btx_megatron.mixing.relatedness import warnings_of
from btx_megatron.mixing.task_vectors import Moments, Place, default_share, measure


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in all checkpoints."""

    what: str
    values: dict[str, str]
    """As text, by checkpoint."""
    stops_mix: bool


@dataclass(frozen=True)
class Movement:
    """How experts moved away from their base."""

    base: str
    experts: list[str]
    share: float
    """Share of the entries of large matrices that was asked for."""
    places: dict[Place, Moments]
    not_compared: list[str]
    """Weights whose shapes differ."""
    read_bytes: int
    seconds: float


@dataclass(frozen=True)
class Inspection:
    """All that ``btx inspect`` found."""

    checkpoints: dict[str, Facts]
    base_named: bool
    """The base was named; else it is the first."""
    differences: list[Difference]
    movement: Movement | None
    """None for a single checkpoint, and where nothing could be compared."""
    warnings: list[str]


def inspect(paths: Sequence[Path], base: Path | None = None, share: float | None = None) -> Inspection:
    """Look at checkpoints of any format. ``share`` of the entries is read, None: so that it takes seconds.

    The base is ``base``, or the first of several paths. Raises UserError for a path that is no checkpoint,
    a damaged one, and a share that is not in (0, 1].
    """
    if not paths:
        raise UserError("inspect: name at least one checkpoint")
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--sample {share:g}: must be above 0 and at most 1")
    everything = [*paths, base] if base is not None else list(paths)
    by_label = dict(zip(labels_of(everything), everything, strict=True))
    opened = {label: open_checkpoint(path) for label, path in by_label.items()}
    try:
        checkpoints, warnings = {}, []
        for label, path in by_label.items():
            checkpoints[label], damaged = facts_of(path, opened[label])
            warnings += damaged
        of = list(by_label)[-1 if base is not None else 0]
        movement = _movement(of, opened, share) if len(opened) > 1 else None
        if movement is not None:
            warnings += warnings_of(movement.places, of, movement.experts)
        return Inspection(checkpoints, base is not None, differences(opened, checkpoints), movement, warnings)
    finally:
        for source in opened.values():
            source.files.close()


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Short names that differ: the last parts of each path, as few as that needs; same paths are numbered."""
    whole = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, whole)) + 1):
        labels = ["/".join(parts[-count:]) for parts in whole]
        if len(set(labels)) == len(set(whole)):
            break
    return [
        label if labels.count(label) == 1 else f"{label}#{labels[:number].count(label) + 1}"
        for number, label in enumerate(labels)
    ]


# several: what differs


def differences(opened: Mapping[str, Source], checkpoints: Mapping[str, Facts]) -> list[Difference]:
    """All that is not the same in all of them: tensors, configuration, tokenizer.

    Those that would stop a mix first: what ``plan.common_weights`` and ``sources.open_sources`` ask for.
    """
    configs = {label: facts.model for label, facts in checkpoints.items() if facts.model is not None}
    found = _tensor_differences(opened) + _config_differences(configs)
    found += _tokenizer_differences(checkpoints)
    return sorted(found, key=lambda difference: not difference.stops_mix)


def _tensor_differences(opened: Mapping[str, Source]) -> list[Difference]:
    found = []
    for name in sorted({name for source in opened.values() for name in source.tensors}):
        infos = {label: source.tensors.get(name) for label, source in opened.items()}
        if len(set(infos.values())) > 1:
            found.append(Difference(name, {label: _text(info) for label, info in infos.items()}, True))
    return found


def _config_differences(configs: Mapping[str, ModelConfig]) -> list[Difference]:
    values: dict[str, dict[str, Any]] = {
        field.name: {label: getattr(config, field.name) for label, config in configs.items()}
        for field in fields(ModelConfig)
    }
    stopping = _keys_that_stop(list(configs.values()))
    return [
        Difference(key, {label: str(value) for label, value in of.items()}, key in stopping)
        for key, of in values.items()
        if len(set(of.values())) > 1
    ]


def _keys_that_stop(configs: Sequence[ModelConfig]) -> set[str]:
    """The keys in which ``ModelConfig.difference`` refuses two models: asked again, each found one mended."""
    keys = set()
    for other in configs[1:]:
        mended = configs[0]
        while difference := mended.difference(other):
            key, _, theirs = difference
            keys.add(key)
            mended = replace(mended, **{key: theirs})
    return keys


def _tokenizer_differences(checkpoints: Mapping[str, Facts]) -> list[Difference]:
    found = []
    for file in ("tokenizer.json", "tokenizer.model"):
        hashes = {label: facts.tokenizer.get(file) for label, facts in checkpoints.items()}
        if len(set(hashes.values())) > 1:
            shown = {label: digest[:12] if digest else "-" for label, digest in hashes.items()}
            known = {digest for digest in hashes.values() if digest}
            found.append(Difference(file, shown, len(known) > 1))  # one that has none may be mixed
    return found


def _text(info: TensorInfo | None) -> str:
    return "missing" if info is None else f"{'x'.join(map(str, info.shape))} {dtype_name(info.dtype)}"


# several: how they moved


def _movement(base: str, opened: Mapping[str, Source], share: float | None) -> Movement | None:
    """What can be compared: the weights that all have in one shape. None where there are none."""
    experts = [label for label in opened if label != base]
    of_base = opened[base].tensors
    shapes = {
        name: {source.tensors[name].shape if name in source.tensors else None for source in opened.values()}
        for name in of_base
    }
    names = [name for name, found in shapes.items() if len(found) == 1]
    if not names:
        return None
    entries = sum(math.prod(of_base[name].shape) for name in names)
    share = default_share(entries * len(opened)) if share is None else share
    started = time.perf_counter()
    places = measure(opened[base], [opened[label] for label in experts], names, share)
    read = sum(moments.read for moments in places.values())
    size = sum(_common_itemsize(source) for source in opened.values())
    return Movement(
        base=base,
        experts=experts,
        share=share,
        places=places,
        not_compared=sorted(set(of_base) - set(names)),
        read_bytes=int(read * size),
        seconds=time.perf_counter() - started,
    )


def _common_itemsize(source: Source) -> int:
    return max((info.dtype for info in source.tensors.values()), key=lambda dtype: dtype.itemsize).itemsize
