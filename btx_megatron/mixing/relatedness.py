"""What looks wrong in how experts moved: rules with fixed thresholds, each with where it comes from.

*Unrelated.* Weights of two trainings that started apart are independent: in n entries their cosine is 0 with
a standard deviation of 1 / sqrt(n), and the distance is sqrt(1 + r^2) with r = ||A|| / ||base||, which is
1.41 for r = 1. An expert that moved by the distance d in a direction of its own has the cosine
1 / sqrt(1 + d^2): 0.995 for d = 0.1, 0.71 for d = 1; what weight decay alone takes leaves the cosine at 1.
So a matrix counts as unrelated where the cosine is below ``UNRELATED`` = 0.2,
for which a branch would have to move by 4.9 times the base's norm, or below ``SIGMAS`` = 4 standard
deviations where n is so small that chance alone reaches 0.2. Distances do not decide: a branch whose norm
grew tenfold is as far away as an independent model of that norm. Norms are left out: gains all lie near 1,
so even unrelated ones have a cosine near 1.

The rule is asked of attention and feed-forward of all layers together; where these are related, of each of
the two, of each layer, and of embedding and head (another tokenizer, another order of the heads, a layer
that was drawn anew).

*Moved far.* Experts trained long merge worse (arXiv 2506.14126), but how far is too far no distance tells:
said is only that an expert moved ``FAR`` = 3 times as far as the median of the others or more. At one
learning rate a distance grows with the steps to a power between 1/2 (a random walk) and 1 (one direction):
experts that differ fivefold in their tokens, as the paper's do (42B to 210B), lie 2.2 to 5 apart.
Distances over all matrices; unrelated experts and those that did not move are nobody's median.

*Another scale.* The root mean square of a norm's gains, or of a router, that is not within a factor of
``SCALE`` = 2 of the base's: training at usual rates moves gains by tenths. A checkpoint whose gains are
stored around 0 instead of around 1 shows here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations

from btx_megatron.mixing.task_vectors import MATRICES, Kind, Moments, Place, total

UNRELATED, SIGMAS, FAR, SCALE = 0.2, 4.0, 3.0, 2.0
_BODY: tuple[Kind, ...] = ("attention", "feed-forward")


def warnings_of(places: Mapping[Place, Moments], base: str, experts: Sequence[str]) -> list[str]:
    """One line for each thing that looks wrong, by the rules above."""
    broken = _not_finite(places, 0)
    if broken:
        return [f"{base}: NaN or infinite values in {_some(broken)}; nothing can be measured from it"]
    found: list[str] = []
    body, everything = total(places, _BODY), total(places)
    assert everything is not None
    sound = []
    for number, name in enumerate(experts):
        broken = _not_finite(places, number + 1)
        if broken:
            found.append(f"{name}: NaN or infinite values in {_some(broken)}")
        elif body is not None and is_unrelated(body, number):
            found.append(
                f"{name} looks unrelated to {base}: cosine {body.cosine_with_base(number):.3f}, distance "
                f"{body.distance(number):.2f}, where independent weights of its norm give "
                f"{math.hypot(1, body.scale(number)):.2f}"
            )
        else:
            sound.append(number)
            found += _unrelated_parts(places, base, name, number)
            found += _other_scale(places, base, name, number)
    found += _alike(everything, base, experts)
    matrices = total(places, MATRICES)
    return found + (_moved_far(matrices, experts, sound) if matrices is not None else [])


def is_unrelated(moments: Moments, expert: int) -> bool:
    """The first rule."""
    return moments.cosine_with_base(expert) < max(UNRELATED, SIGMAS / math.sqrt(moments.read))


def _unrelated_parts(places: Mapping[Place, Moments], base: str, name: str, number: int) -> list[str]:
    """Parts that are unrelated in an expert that is related as a whole."""
    kinds: tuple[Kind, ...] = ("attention", "feed-forward", "embedding", "head")
    found = [
        f"{kind} of all layers" if kind in _BODY else kind
        for kind in kinds
        if (moments := total(places, (kind,))) is not None and is_unrelated(moments, number)
    ]
    layers = sorted({layer for _, layer in places if layer is not None})
    found += [
        f"layer {layer}"
        for layer in layers
        if (moments := total(places, _BODY, layer)) is not None and is_unrelated(moments, number)
    ]
    return [f"{name}: unrelated to {base} in {_some(found)}, and related elsewhere"] if found else []


def _other_scale(places: Mapping[Place, Moments], base: str, name: str, number: int) -> list[str]:
    lines = []
    for kind in ("norms", "router"):
        factors = {place: moments.scale(number) for place, moments in places.items() if place[0] == kind}
        outside = {place: factor for place, factor in factors.items() if not 1 / SCALE <= factor <= SCALE}
        if outside:
            (_, layer), factor = max(outside.items(), key=lambda item: abs(math.log(item[1] or 1e-300)))
            where = f"layer {layer}" if layer is not None else "the last norm"
            lines.append(
                f"{name}: {kind} of another scale than {base}'s in {len(outside)} of {len(factors)} places, "
                f"{factor:.3g} times in {where}"
            )
    return lines


def _alike(everything: Moments, base: str, experts: Sequence[str]) -> list[str]:
    still = [number for number in range(len(experts)) if everything.moved[number] == 0]
    lines = [
        f"{experts[number]} is identical to {base} in all that was read (as the seed is, where it joins)"
        for number in still
    ]
    lines += [
        f"{experts[first]} and {experts[second]} are identical in all that was read"
        for first, second in combinations(range(len(experts)), 2)
        if everything.equal[first, second] and first not in still
    ]
    return lines


def _moved_far(matrices: Moments, experts: Sequence[str], sound: Sequence[int]) -> list[str]:
    """Experts that moved several times as far as the median of the other ones."""
    distances = {number: matrices.distance(number) for number in sound if matrices.moved[number]}
    lines = []
    for number, distance in distances.items():
        others = [other for at, other in distances.items() if at != number]
        if others and distance >= FAR * (median := statistics.median(others)):
            other = "the median of the others" if len(others) > 1 else "the other expert"
            lines.append(f"{experts[number]} moved {distance / median:.1f} times as far as {other}")
    return lines


def _not_finite(places: Mapping[Place, Moments], row: int) -> list[str]:
    """Where the base (row 0) or an expert has values that are no numbers."""
    return [
        kind if layer is None else f"{kind} of layer {layer}"
        for (kind, layer), moments in places.items()
        if not math.isfinite(moments.gram[row, row])
    ]


def _some(items: Sequence[str]) -> str:
    """A list that stays on a line."""
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
