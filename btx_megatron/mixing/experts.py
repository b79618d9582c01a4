"""Which part of which source's feed-forward each expert takes, and how it is put together.

A SwiGLU feed-forward of width F is a sum over F *units*: unit j has gate row j and up row j of ``linear_fc1``
[2F, H] (all gate rows, then all up rows) and column j of ``linear_fc2`` [H, F]. Any set of units, its three
parts kept together, is a feed-forward of its own, and the sum over disjoint sets is the whole. So every
kind of expert is a list of runs of units, and the streaming engine reads only their rows and columns.

kind     experts  width  expert number takes
stack    N        F      n: source n (paper, section 3.2)
split    N C      F/C    n C + c: chunk c of C of source n (paper, appendix: Splitting)
blend    N        F      n: chunk n of N of every source, in the sources' order (paper: Blending)
copies   N M      F      n M + m: source n again (sparse upcycling is one source with M copies)
virtual  N M C    F/C    (n M + m) C + c: chunk c of copy m of source n (virtual groups, arXiv 2410.07524)

A chunk is a run of neighbouring units. Two kinds ask more of the rest: ``virtual`` gives the C experts of a
copy one router row (``router_init.repeat_rows``) and scales the weights (``virtual_factor``); ``copies`` are
alike and stay alike unless their router rows differ or some of their units are drawn anew
(``dropped_units``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from btx_megatron.errors import UserError
from btx_megatron.mixing.average import fold_sum

Kind = Literal["stack", "split", "blend", "copies", "virtual"]


class Span(NamedTuple):
    """Units, rows or columns ``start`` to ``stop`` of source number ``source``."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class Scales:
    """What the gate rows, up rows and down columns are multiplied with."""

    gate: float
    up: float
    down: float


def expert_count(kind: Kind, sources: int, chunks: int = 1, copies: int = 1) -> int:
    """Number of experts that ``sources`` feed-forwards give. Raises UserError where options do not fit."""
    _check_option(kind, "chunks", chunks, {"split": 2, "virtual": 1})
    _check_option(kind, "copies", copies, {"copies": 2, "virtual": 1})
    return sources * copies * chunks


def expert_width(kind: Kind, sources: int, width: int, chunks: int = 1) -> int:
    """Feed-forward width of an expert from that of the sources. Raises UserError where it does not divide."""
    if kind == "blend":
        _check_divides(f"--experts blend of {sources} sources", width, sources)
        return width
    if kind in ("split", "virtual"):
        _check_divides(f"--experts {kind} --chunks {chunks}", width, chunks)
    return width // chunks


def expert_units(
    kind: Kind, expert: int, sources: int, width: int, chunks: int = 1, copies: int = 1
) -> tuple[Span, ...]:
    """The units that expert number ``expert`` takes, in its order. Sizes as ``expert_width`` allows them."""
    if kind == "blend":
        size = width // sources
        return tuple(Span(source, expert * size, (expert + 1) * size) for source in range(sources))
    size, chunk = width // chunks, expert % chunks
    return (Span(expert // (copies * chunks), chunk * size, (chunk + 1) * size),)


def fc1_rows(units: Sequence[Span], width: int) -> list[Span]:
    """Rows of the sources' linear_fc1 [2 width, H] that make an expert's, in its order: gates, then ups.

    The columns of linear_fc2 need no such list: they are the units themselves.
    """
    return [Span(u.source, first + u.start, first + u.stop) for first in (0, width) for u in units]


def take_fc1(sources: Sequence[Tensor], units: Sequence[Span]) -> Tensor:
    """An expert's linear_fc1 [2f, H] from the sources' [2F, H]."""
    rows = fc1_rows(units, len(sources[0]) // 2)
    return torch.cat([sources[row.source][row.start : row.stop] for row in rows])


def take_fc2(sources: Sequence[Tensor], units: Sequence[Span]) -> Tensor:
    """An expert's linear_fc2 [H, f] from the sources' [H, F]."""
    return torch.cat([sources[unit.source][:, unit.start : unit.stop] for unit in units], dim=1)


def virtual_factor(experts: int, chunks: int, topk: int, pre_softmax: bool) -> float:
    """What a virtual-group layer must gain so that it starts as the dense one (2410.07524, weight scaling).

    ``experts`` counts all of them, E copies of G chunks each. Where a token's gates are equal, its top k = T
    hold T / G whole copies, which sum to T / G feed-forwards times the gate. Softmax after top-k: the gate is
    1 / T and the factor G. Softmax before top-k: the gate is 1 / (E G) and the factor E G^2 / T, less once
    the router prefers some. Raises UserError where top-k would cut a copy.
    """
    if topk % chunks:
        raise UserError(
            f"--experts virtual --chunks {chunks}: moe_router_topk={topk} cuts a group; make it a multiple"
        )
    return experts * chunks / topk if pre_softmax else float(chunks)


def virtual_scales(factor: float, form: Literal["exact", "cube-root"]) -> Scales:
    """Spread ``factor`` over the three parts of a unit.

    ``cube-root`` is the paper's, on both matrices whole. It keeps the output only if scaling the gate's
    input scales the gate, which holds for ReLU; SiLU bends. ``exact`` leaves the gate rows alone and takes
    the square root on the up rows and down columns, in which a SwiGLU is linear.
    """
    if form == "exact":
        return Scales(1.0, math.sqrt(factor), math.sqrt(factor))
    return Scales(math.cbrt(factor), math.cbrt(factor), math.cbrt(factor))


def scale_fc1(fc1: Tensor, scales: Scales) -> Tensor:
    """linear_fc1 [2F, H] with its gate and up rows scaled, rounded once."""
    wide = fc1.to(torch.promote_types(fc1.dtype, torch.float32), copy=True)
    gate, up = wide.chunk(2)
    gate.mul_(scales.gate)
    up.mul_(scales.up)
    return wide.to(fc1.dtype)


def scale_fc2(fc2: Tensor, scales: Scales) -> Tensor:
    """linear_fc2 [H, F] scaled, rounded once."""
    wide = fc2.to(torch.promote_types(fc2.dtype, torch.float32), copy=True)
    return wide.mul_(scales.down).to(fc2.dtype)


def dropped_units(width: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Sorted numbers of the units that Drop-Upcycling draws anew (2502.19261, section 3).

    They are round(ratio * width), each as likely as any other. The caller gives each expert a generator of
    its own; the same units go to ``redraw_fc1`` and ``redraw_fc2``. Raises UserError if ``ratio`` is not in
    [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"--drop-ratio {ratio:g}: must be from 0 (keep all units) to 1 (draw all anew)")
    order = torch.randperm(width, generator=generator)
    return order[: round(ratio * width)].sort().values


def redraw_fc1(fc1: Tensor, dropped: Tensor, generator: torch.Generator) -> Tensor:
    """linear_fc1 [2F, H] with the gate and up rows of the units ``dropped`` drawn anew.

    Each of the two from the normal distribution with the mean and standard deviation of its own dropped rows.
    """
    result = fc1.clone()
    for half in result.chunk(2):
        half[dropped] = _redraw(half[dropped], generator)
    return result


def redraw_fc2(fc2: Tensor, dropped: Tensor, generator: torch.Generator) -> Tensor:
    """linear_fc2 [H, F] with the columns of the units ``dropped`` drawn anew, as ``redraw_fc1`` does."""
    result = fc2.clone()
    result[:, dropped] = _redraw(result[:, dropped], generator)
    return result


def _redraw(values: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values with the mean and the (population) standard deviation of ``values``, a matrix."""
    if values.numel() == 0:
        return values
    mean = _mean(values.double())
    std = math.sqrt(_mean(values.double().sub_(mean).square_()))
    dtype = torch.promote_types(values.dtype, torch.float32)
    drawn = torch.randn(values.shape, generator=generator, dtype=dtype)
    return drawn.mul_(std).add_(mean).to(values.dtype)


def _mean(matrix: Tensor) -> float:
    """Mean of a matrix, which is overwritten; in an order that threads do not change."""
    count = matrix.numel()
    return fold_sum(fold_sum(matrix)).item() / count


def _check_option(kind: Kind, option: str, value: int, least: dict[Kind, int]) -> None:
    if kind not in least:
        if value != 1:
            kinds = " and ".join(f"--experts {name}" for name in least)
            raise UserError(f"--{option} {value} means nothing with --experts {kind}, only with {kinds}")
    elif value < least[kind]:
        raise UserError(f"--experts {kind} needs --{option} of at least {least[kind]}, not {value}")


def _check_divides(what: str, width: int, parts: int) -> None:
    if width % parts:
        raise UserError(f"{what}: a feed-forward of width {width} does not divide into {parts} equal chunks")
