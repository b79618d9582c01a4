"""What "bytes" means, once, for the meter that counts them and for the formulas that predict them.

Two numbers are kept for every collective call of a rank in a group of n ranks:

payload     bytes of the tensors that the rank hands in: its whole gradient for an all-reduce or a
            reduce-scatter, its own piece for an all-gather, all its rows for an all-to-all. A broadcast is
            handed in by its root alone; a receive hands in nothing.
wire        bytes that the rank sends to other ranks. A ring moves 2 (n-1)/n of the payload for an
            all-reduce, (n-1)/n for a reduce-scatter, and for an all-gather (n-1) times the piece, which is
            (n-1)/n of the gathered whole. In an all-to-all what a rank keeps for itself is not sent: exact
            from the split sizes, (n-1)/n where the splits are equal. A broadcast or reduce is a chain: n-1
            of n ranks pass the payload on, written as (n-1)/n on each, so that sums over ranks are right.

These are bytes that the algorithm must move, not packets seen on a cable: a tree (NCCL may choose one) sends
as much in all, otherwise spread; switches that reduce in the network (SHARP) send about half.

A node holds ``ranks_per_node`` ranks in a row. A ring sends to the next rank of its group and so crosses a
border of nodes once for each node that it visits; all-to-all and sends go straight to their ranks. So
``between`` is what leaves a node, and the rest of ``wire`` stays inside it. A group of one rank sends nothing
and is not counted at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

_RING_SHARES = {"all_reduce": (2, 1), "reduce_scatter": (1, 1), "broadcast": (1, 1), "reduce": (1, 1)}


_COLUMNS = "{:14} {:16} {:>8} {:>11} {:>11} {:>13}"


class Line(NamedTuple):
    """What a count is kept for."""

    group: str
    """Short name of the group's kind: tp, pp, dp, ep, ..."""
    size: int
    """Ranks of each group of that kind."""
    collective: str
    """all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, send, ..."""


@dataclass
class Amount:
    """Calls and bytes, of one call or of a sum."""

    calls: int = 0
    payload: int = 0
    """Bytes handed in."""
    wire: int = 0
    """Bytes sent to other ranks."""
    between: int = 0
    """The part of ``wire`` that leaves the node."""

    @property
    def inside(self) -> int:
        """The part of ``wire`` that stays inside the node."""
        return self.wire - self.between

    def add(self, other: Amount, times: int = 1) -> None:
        """Add ``times`` times the other."""
        self.calls += times * other.calls
        self.payload += times * other.payload
        self.wire += times * other.wire
        self.between += times * other.between


@dataclass
class Traffic:
    """Amounts by line; of one rank or summed over several."""

    lines: dict[Line, Amount] = field(default_factory=dict)

    def add(self, line: Line, amount: Amount, times: int = 1) -> None:
        """Book an amount."""
        self.lines.setdefault(line, Amount()).add(amount, times)

    def add_all(self, other: Traffic) -> None:
        """Book everything of another rank."""
        for line, amount in other.lines.items():
            self.add(line, amount)

    def total(self) -> Amount:
        """Sum over all lines."""
        total = Amount()
        for amount in self.lines.values():
            total.add(amount)
        return total

    def rows(self, steps: int = 1) -> list[dict[str, Any]]:
        """One dictionary a line, bytes and calls divided by ``steps``, most bytes on the wire first."""
        ordered = sorted(self.lines.items(), key=lambda item: (-item[1].wire, item[0]))
        return [line._asdict() | amounts(amount, steps) for line, amount in ordered]


def amounts(amount: Amount, steps: int = 1) -> dict[str, float]:
    """``calls``, ``payload``, ``wire``, ``inside`` and ``between`` of one step."""
    return {name: value / steps for name, value in (asdict(amount) | {"inside": amount.inside}).items()}


def amount_of(
    collective: str, payload: int, ranks: Sequence[int], me: int, ranks_per_node: int, root: int = 0
) -> Amount:
    """One call of a collective by member ``me`` of the group ``ranks`` (global numbers, group order).

    ``payload`` are the bytes handed in; for a broadcast every member gives the message's size.
    For a send, a gather or a scatter ``root`` is the member that is the destination, or the root.
    An all-to-all takes the splits as equal; the meter, which knows them, calls sent_to.
    """
    size = len(ranks)
    if collective in _RING_SHARES or collective == "all_gather":
        wire = ring_bytes(collective, payload, size)
        handed_in = payload if collective != "broadcast" or me == root else 0
        return sent_to({(me + 1) % size: wire}, handed_in, ranks, me, ranks_per_node)
    others = [member for member in range(size) if member != me]
    if collective == "all_to_all":
        return sent_to(dict.fromkeys(others, payload / size), payload, ranks, me, ranks_per_node)
    if collective == "scatter":
        pieces = dict.fromkeys(others, payload / size) if me == root else {}
        return sent_to(pieces, payload if me == root else 0, ranks, me, ranks_per_node)
    if collective in ("send", "gather"):
        return sent_to({root: payload} if root != me else {}, payload, ranks, me, ranks_per_node)
    return Amount(calls=1)  # a receive or a barrier


def ring_bytes(collective: str, payload: int, size: int) -> float:
    """Bytes that each rank of a ring of ``size`` sends to the next (see the head of this module)."""
    if collective == "all_gather":
        return float(payload * (size - 1))
    return _RING_SHARES[collective][0] * payload * (size - 1) / size


def sent_to(
    pieces: dict[int, float], payload: int, ranks: Sequence[int], me: int, ranks_per_node: int
) -> Amount:
    """One call that sends ``pieces`` bytes to each member named, and ``payload`` was handed in."""
    node = ranks[me] // ranks_per_node
    away = sum(size for member, size in pieces.items() if ranks[member] // ranks_per_node != node)
    here = sum(pieces.values()) - away
    return Amount(calls=1, payload=payload, wire=round(here) + round(away), between=round(away))


def table(traffic: Traffic, steps: int, tokens: int) -> str:
    """Lines for a log: what a step sends, summed over the ranks that ``traffic`` covers.

    ``tokens`` are those of all ``steps``. Lines below a thousandth of the bytes are summed up as "rest".
    """
    total = traffic.total()
    shown = [item for item in traffic.lines.items() if item[1].wire * 1000 >= total.wire > 0]
    shown.sort(key=lambda item: -item[1].wire)
    rest = Amount()
    for amount in traffic.lines.values():
        rest.add(amount)
    for _, amount in shown:
        rest.add(amount, -1)
    lines = [_COLUMNS.format("group", "collective", "calls", "handed in", "on the wire", "between nodes")]
    lines += [_row(f"{line.group} ({line.size})", line.collective, amount, steps) for line, amount in shown]
    lines += [_row("rest", "", rest, steps), _row("all", "", total, steps)]
    per_token = total.wire / tokens if tokens else 0.0
    return "\n".join([*lines, f"{readable(per_token)} a token on the wire"])


def _row(group: str, collective: str, amount: Amount, steps: int) -> str:
    cells = [readable(value / steps) for value in (amount.payload, amount.wire, amount.between)]
    return _COLUMNS.format(group, collective, f"{amount.calls / steps:.0f}", *cells)


def readable(size: float) -> str:
    """1234567 -> '1.23 MB' (powers of 1000)."""
    units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"]
    for unit in units:
        if size < 999.5 or unit == units[-1]:
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("the last unit returns")


def summed(parts: Iterable[Traffic]) -> Traffic:
    """The sum of several ranks' traffic."""
    whole = Traffic()
    for part in parts:
        whole.add_all(part)
    return whole
