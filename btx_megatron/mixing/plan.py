"""What a mix will write: every weight with its rule and its inputs, before anything is written.

Every tensor is accounted for. A source tensor that no rule uses, or a weight that no source has, stops the
mix by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import xxhash
from torch import Tensor

from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, MAY_BE_ABSENT, ROUTER
from btx_megatron.checkpoints.pieces import Index, Source, TensorInfo, dtype_name
from btx_megatron.checkpoints.scratch import side_by_side
from btx_megatron.checkpoints.stream import NotFinite, PlannedTensor, Rows, is_finite, rows_of
from btx_megatron.errors import UserError
from btx_megatron.mixing import experts
from btx_megatron.mixing.average import WIDE, dare, mean, ties, weighted_mean
from btx_megatron.mixing.router_init import normal_router, repeat_rows, zero_router
from btx_megatron.mixing.vocabulary_union import VocabularyUnion, united_rows

Average = Literal["mean", "weighted", "base", "ties", "dare"]
RouterInit = Literal["normal", "zero", "centroid", "ridge"]
TokenizerOf = Literal["base", "union"]
FROM_TEXT = ("centroid", "ridge")
"""Routers that are made from the experts' text."""

BASE = "(base)"
"""The base of an average among the sources; no expert may have such a name."""
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_FC1 = "decoder.layers.mlp.linear_fc1.weight"
_FC2 = "decoder.layers.mlp.linear_fc2.weight"
_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


@dataclass(frozen=True)
class MixOptions:
    """How N dense models become one mixture; the command line's options of the same names."""

    average: Average = "mean"
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of each source in the average; a source that is not named weighs 1."""
    density: float = 0.5
    """Share of the entries that TIES and DARE keep."""
    experts: experts.Kind = "stack"
    chunks: int = 1
    copies: int = 1
    drop_ratio: float = 0.0
    """Share of an expert's units that are drawn anew (drop-upcycling)."""
    router_init: RouterInit = "normal"
    router_std: float = 0.02
    router_topk: int = 2
    router_pre_softmax: bool = False
    virtual_scale: Literal["exact", "cube-root"] = "exact"
    random_seed: int = 1234
    tokenizer: TokenizerOf = "base"
    """base: all have one. union: each may have added tokens of its own, which it keeps."""


def plan_mix(
    sources: Mapping[str, Source],
    options: MixOptions,
    base: Source | None = None,
    router_rows: Tensor | None = None,
    union: VocabularyUnion | None = None,
) -> list[PlannedTensor]:
    """The MoE: feed-forwards become experts, in the sources' order; the rest is averaged; new router.

    ``router_rows`` [layers, sources, hidden] are those of a router from text; for a look they may be missing.
    ``union``: the vocabulary of all, with ``options.tokenizer`` union.
    Raises UserError where sources, or options, do not fit together.
    """
    _check(sources, options, base)
    weights = common_weights(sources, base, any_vocabulary=union is not None)
    planned = []
    for name, info in weights.items():
        if DENSE[name][0] == "feed_forward":
            planned.append(_experts(name, info, sources, options))
        elif union is not None and name in VOCABULARY:
            planned.append(_united(name, info, sources, options, union))
        else:
            planned.append(_average(DENSE_TO_MOE.get(name, name), name, info, sources, options, base))
    layers, hidden = weights[_NORM].shape
    router = TensorInfo((layers, num_experts(len(sources), options), hidden), weights[_NORM].dtype)
    return sorted([*planned, _router(router, sources, options, router_rows)], key=lambda tensor: tensor.name)


def plan_average(
    sources: Mapping[str, Source], options: MixOptions, base: Source | None = None
) -> list[PlannedTensor]:
    """The dense baseline: the whole model averaged, feed-forwards too."""
    _check_average(sources, options, base)
    weights = common_weights(sources, base)
    return [_average(name, name, info, sources, options, base) for name, info in weights.items()]


def num_experts(sources: int, options: MixOptions) -> int:
    """Experts of the mixture. Raises UserError where the options do not fit."""
    return experts.expert_count(options.experts, sources, options.chunks, options.copies)


def _check(sources: Mapping[str, Source], options: MixOptions, base: Source | None) -> None:
    count = num_experts(len(sources), options)
    if options.router_topk > count:
        raise UserError(f"moe_router_topk={options.router_topk} is more than the {count} experts")
    if options.router_topk < 1:
        raise UserError(f"moe_router_topk={options.router_topk} must be at least 1")
    if options.router_init == "zero" and options.router_topk < count:
        raise UserError(
            "--router-init zero with top-k: all logits are equal, so every token would take the same "
            f"{options.router_topk} experts; use normal, or route to all {count}"
        )
    if options.router_init in FROM_TEXT and options.experts == "blend":
        raise UserError(
            f"--router-init {options.router_init} with --experts blend: every expert is a part of all "
            "sources, so no text is its own; use normal"
        )
    if not 0 < options.router_std < math.inf:
        raise UserError(f"--router-std {options.router_std}: must be above 0 and finite")
    if options.router_topk == 1 and not options.router_pre_softmax:
        raise UserError(
            "moe_router_topk 1 without pre-softmax has a constant gate, so the router gets no gradient; use "
            "--router-pre-softmax (Switch), or --router-topk 2"
        )
    if options.tokenizer == "union":
        _check_union(options)
    _check_average(sources, options, base)


def _check_union(options: MixOptions) -> None:
    if options.average not in ("mean", "weighted"):
        raise UserError(
            f"--tokenizer union with --average {options.average}: the base lacks the rows of added tokens, "
            "so there is nothing to measure them from; use mean or weighted"
        )
    if options.router_init in FROM_TEXT:
        raise UserError(
            f"--tokenizer union with --router-init {options.router_init}: before the mix no model knows the "
            "tokens of all; use normal"
        )


def _check_average(sources: Mapping[str, Source], options: MixOptions, base: Source | None) -> None:
    if options.average in ("base", "ties", "dare") and base is None:
        raise UserError(f"--average {options.average} measures from a base; name it with --base PATH")
    if not 0 < options.density <= 1:
        raise UserError(f"--density {options.density}: must be above 0 and at most 1")
    if not 0 <= options.drop_ratio <= 1:
        raise UserError(f"--drop-ratio {options.drop_ratio}: must lie between 0 and 1")
    for name, weight in options.weights.items():
        if name not in sources:
            raise UserError(f"--weight {name}={weight}: no such expert; there are {', '.join(sources)}")
        if not 0 <= weight < math.inf:
            raise UserError(f"--weight {name}={weight}: a weight is a number that is not negative")
    if not any(options.weights.get(name, 1.0) for name in sources):
        raise UserError("--weight: all weights are 0; at least one must be positive")
    if options.weights and options.average in ("mean", "base"):
        raise UserError(f"--weight has no effect with --average {options.average}; use --average weighted")


# the rest: averaged


def _average(
    name: str,
    source_name: str,
    info: TensorInfo,
    sources: Mapping[str, Source],
    options: MixOptions,
    base: Source | None,
) -> PlannedTensor:
    weights = [options.weights.get(source, 1.0) for source in sources]
    kind = options.average

    def make(index: Index) -> Rows:
        if kind == "base":
            assert base is not None
            return rows_of(base, source_name, index)
        inputs = [rows_of(source, source_name, index) for source in sources.values()]
        if kind == "mean":
            return lambda start, stop: mean(rows(start, stop) for rows in inputs)
        if kind == "weighted":
            return lambda start, stop: weighted_mean((rows(start, stop) for rows in inputs), weights)
        assert base is not None
        of_base = rows_of(base, source_name, index)

        def merged(start: int, stop: int) -> Tensor:
            tensors = (rows(start, stop) for rows in inputs)
            if kind == "ties":
                seen = (_finite(tensor, name, index, sources) for tensor in tensors)
                whole_base = _finite(of_base(start, stop), name, index, ("base",))
                return ties(seen, whole_base, weights, options.density)
            generator = _generator(options.random_seed, "dare", source_name, index)
            return dare(tensors, of_base(start, stop), weights, options.density, generator)

        return merged

    inputs = {"base": ("base",), "ties": (*sources, "base"), "dare": (*sources, "base")}.get(
        kind, tuple(sources)
    )
    return PlannedTensor(name, info, kind, inputs, make, whole=kind in ("ties", "dare"), wide=WIDE[kind])


def _united(
    name: str, info: TensorInfo, sources: Mapping[str, Source], options: MixOptions, union: VocabularyUnion
) -> PlannedTensor:
    """Embedding or output layer: each row from those that have its token."""
    weights = [options.weights.get(source, 1.0) for source in sources]

    def average(tensors: Iterable[Tensor], members: Sequence[int]) -> Tensor:
        own = [weights[member] for member in members]
        if options.average == "weighted" and any(own):
            return weighted_mean(tensors, own)
        return mean(tensors)  # also where all that have a token weigh nothing: nobody else has it

    def make(index: Index) -> Rows:
        return united_rows(union, [rows_of(source, name, index) for source in sources.values()], average)

    united = TensorInfo((union.size, *info.shape[1:]), info.dtype)
    return PlannedTensor(name, united, f"{options.average}:union", tuple(sources), make, wide=12)


def _finite(tensor: Tensor, name: str, index: Index, inputs: Iterable[str]) -> Tensor:
    """The tensor. TIES would not pass NaN on: it has no sign, and so no vote. Raises NotFinite."""
    if not is_finite(tensor):
        raise NotFinite(name, index, inputs)
    return tensor


# the feed-forwards: experts


def _experts(
    name: str, info: TensorInfo, sources: Mapping[str, Source], options: MixOptions
) -> PlannedTensor:
    """Where each expert's matrix comes from, and what is done to it on the way."""
    width = info.shape[1] // 2 if name == _FC1 else info.shape[2]
    count = num_experts(len(sources), options)
    new_width = experts.expert_width(options.experts, len(sources), width, options.chunks)
    scales = _scales(options, count)
    opened = list(sources.values())

    def make(index: Index) -> Rows:
        layer, expert = index
        units = experts.expert_units(
            options.experts, expert, len(sources), width, options.chunks, options.copies
        )
        inputs = {unit.source: rows_of(opened[unit.source], name, (layer,)) for unit in units}
        rows = (
            _stacked_rows(inputs, experts.fc1_rows(units, width))
            if name == _FC1
            else _columns(inputs, units, new_width)
        )
        if scales is None and not options.drop_ratio:
            return rows
        return lambda start, stop: _changed(rows(start, stop), name, index, new_width, scales, options)

    shape = (new_width * 2, info.shape[2]) if name == _FC1 else (info.shape[1], new_width)
    out = TensorInfo((info.shape[0], count, *shape), info.dtype)
    rule = "expert" if options.experts == "stack" else f"expert:{options.experts}"
    rule += f" drop {options.drop_ratio}" if options.drop_ratio else ""
    whole = scales is not None or options.drop_ratio > 0
    # all columns of a source are read for some of them; fp64 copies of the units that are drawn anew
    wide = info.dtype.itemsize * width / new_width + 16 * options.drop_ratio + (8 if scales else 0)
    return PlannedTensor(DENSE_TO_MOE[name], out, rule, tuple(sources), make, whole, wide)


def _stacked_rows(inputs: Mapping[int, Rows], spans: list[experts.Span]) -> Rows:
    """Rows that lie one after the other in the result, from several places."""

    def rows(start: int, stop: int) -> Tensor:
        parts, at = [], 0
        for span in spans:
            first, last = max(start, at), min(stop, at + span.stop - span.start)
            if first < last:
                parts.append(inputs[span.source](span.start + first - at, span.start + last - at))
            at += span.stop - span.start
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    return rows


def _columns(inputs: Mapping[int, Rows], units: Sequence[experts.Span], width: int) -> Rows:
    def rows(start: int, stop: int) -> Tensor:
        parts = (inputs[unit.source](start, stop)[:, unit.start : unit.stop] for unit in units)
        return next(parts) if len(units) == 1 else side_by_side(parts, width)

    return rows


def _scales(options: MixOptions, count: int) -> experts.Scales | None:
    if options.experts != "virtual":
        return None
    factor = experts.virtual_factor(count, options.chunks, options.router_topk, options.router_pre_softmax)
    return experts.virtual_scales(factor, options.virtual_scale)


def _changed(
    matrix: Tensor,
    name: str,
    index: Index,
    width: int,
    scales: experts.Scales | None,
    options: MixOptions,
) -> Tensor:
    if options.drop_ratio:
        chosen = _generator(options.random_seed, "dropped units", "", index)  # the same in both matrices
        dropped = experts.dropped_units(width, options.drop_ratio, chosen)
        redraw = experts.redraw_fc1 if name == _FC1 else experts.redraw_fc2
        matrix = redraw(matrix, dropped, _generator(options.random_seed, "redraw", name, index))
    if scales is not None:
        matrix = (experts.scale_fc1 if name == _FC1 else experts.scale_fc2)(matrix, scales)
    return matrix


# the router: new


def _router(
    info: TensorInfo, sources: Mapping[str, Source], options: MixOptions, rows: Tensor | None
) -> PlannedTensor:
    from_text = options.router_init in FROM_TEXT
    # one row for the chunks of a copy; a source's text gives one for all that comes from it
    each = (
        info.shape[1] // len(sources) if from_text else options.chunks if options.experts == "virtual" else 1
    )
    count, hidden = info.shape[1] // each, info.shape[2]

    def make(index: Index) -> Rows:
        (layer,) = index
        if from_text:
            assert rows is not None
            drawn = rows[layer]
        elif options.router_init == "zero":
            drawn = zero_router(count, hidden)
        else:
            drawn = normal_router(layer, count, hidden, options.router_std, options.random_seed)
        whole = repeat_rows(drawn, each)
        return lambda start, stop: whole[start:stop]

    inputs = tuple(sources) if from_text else ()
    return PlannedTensor(ROUTER, info, f"router:{options.router_init}", inputs, make)


def _generator(seed: int, purpose: str, name: str, index: Index) -> torch.Generator:
    """A generator for one part alone, so that threads and block sizes change nothing."""
    number = xxhash.xxh3_64_intdigest(f"{seed}/{purpose}/{name}/{index}".encode())
    return torch.Generator().manual_seed(number & 0x7FFF_FFFF_FFFF_FFFF)


# what the sources have in common


def common_weights(
    sources: Mapping[str, Source], base: Source | None = None, any_vocabulary: bool = False
) -> dict[str, TensorInfo]:
    """The weights that all sources have, as the first has them, after checking that they are the same model.

    ``any_vocabulary``: the rows of embedding and output layer may differ.
    """
    first_name, first = next(iter(sources.items()))
    checked = {**sources, **({BASE: base} if base is not None else {})}
    for name, source in checked.items():
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
            if any_vocabulary and tensor in VOCABULARY and mine and theirs:
                same = _row(mine) == _row(theirs)
            else:
                same = mine == theirs
            if not same:
                raise UserError(
                    f"{tensor} is {_text(theirs)} in expert {first_name} and {_text(mine)} in expert {name}:"
                    " experts must be branches of one model"
                )
    return dict(first.tensors)


def _row(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.shape[1:], info.dtype)


def _text(info: TensorInfo | None) -> str:
    return "missing" if info is None else f"{list(info.shape)} {dtype_name(info.dtype)}"
