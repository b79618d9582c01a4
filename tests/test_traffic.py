"""Bytes of collectives: what is sent is what arrives, rings and nodes, and the readable forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.traffic import Amount, Line, Traffic, amount_of, readable, sent_to, summed, table

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce")
groups = st.integers(2, 24).flatmap(
    lambda size: st.lists(st.integers(0, 200), min_size=size, max_size=size, unique=True)
)


def whole_group(collective: str, payload: int, ranks: list[int], per_node: int, root: int = 0) -> Amount:
    total = Amount()
    for me in range(len(ranks)):
        total.add(amount_of(collective, payload, ranks, me, per_node, root))
    return total


@given(groups, st.integers(0, 10**12), st.integers(1, 16))
def test_rings_and_chains_move_what_they_must(ranks: list[int], payload: int, per_node: int) -> None:
    n = len(ranks)
    moved = {name: whole_group(name, payload, ranks, per_node).wire for name in COLLECTIVES}
    # every number must meet n - 1 others and the sum must come back to n - 1
    assert moved["all_reduce"] == pytest.approx(2 * (n - 1) * payload, abs=n)
    assert moved["reduce_scatter"] == pytest.approx((n - 1) * payload, abs=n)
    assert moved["all_gather"] == n * (n - 1) * payload
    assert moved["all_to_all"] == pytest.approx((n - 1) * payload, abs=2 * n)
    assert moved["broadcast"] == moved["reduce"] == pytest.approx((n - 1) * payload, abs=n)


@given(groups, st.sampled_from(COLLECTIVES), st.integers(0, 10**9), st.integers(1, 16))
def test_inside_and_between_are_the_whole(ranks: list[int], name: str, payload: int, per_node: int) -> None:
    amount = whole_group(name, payload, ranks, per_node)
    assert 0 <= amount.between <= amount.wire
    assert amount.inside + amount.between == amount.wire
    assert amount.calls == len(ranks)
    if len({rank // per_node for rank in ranks}) == 1:
        assert amount.between == 0
    if per_node == 1:
        assert amount.inside == 0


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 10**9))
def test_a_ring_of_whole_nodes_crosses_each_border_once(nodes: int, per_node: int, payload: int) -> None:
    ranks = list(range(nodes * per_node))
    if len(ranks) == 1:
        return
    each = amount_of("all_reduce", payload, ranks, 0, 10**6).wire
    crossings = nodes if nodes > 1 else 0
    assert whole_group("all_reduce", payload, ranks, per_node).between == crossings * each


def test_all_reduce_is_reduce_scatter_and_all_gather() -> None:
    ranks = [0, 1, 2, 3]
    both = amount_of("reduce_scatter", 4096, ranks, 1, 2)
    both.add(amount_of("all_gather", 1024, ranks, 1, 2))
    assert both.wire == amount_of("all_reduce", 4096, ranks, 1, 2).wire == 6144


def test_point_to_point_roots_and_barriers() -> None:
    ranks = [0, 1, 2, 3]
    assert amount_of("send", 100, ranks, 0, 2, root=2) == Amount(1, 100, 100, 100)
    assert amount_of("send", 100, ranks, 0, 2, root=1) == Amount(1, 100, 100, 0)
    assert amount_of("recv", 100, ranks, 2, 2) == Amount(1, 0, 0, 0)
    assert amount_of("barrier", 8, ranks, 2, 2) == Amount(1, 0, 0, 0)
    assert amount_of("gather", 100, ranks, 3, 2, root=0) == Amount(1, 100, 100, 100)
    assert amount_of("gather", 100, ranks, 0, 2, root=0) == Amount(1, 100, 0, 0)
    assert amount_of("scatter", 400, ranks, 0, 2, root=0) == Amount(1, 400, 300, 200)
    assert amount_of("scatter", 0, ranks, 1, 2, root=0) == Amount(1, 0, 0, 0)
    assert amount_of("broadcast", 100, ranks, 0, 4, root=3) == Amount(1, 0, 75, 0)
    assert amount_of("broadcast", 100, ranks, 3, 4, root=3) == Amount(1, 100, 75, 0)


def test_uneven_pieces_go_where_they_go() -> None:
    pieces: dict[int, float] = {1: 10, 2: 30, 3: 0}
    assert sent_to(pieces, 60, [0, 1, 2, 3], 0, 2) == Amount(1, 60, 40, 30)


def test_sums_and_rows() -> None:
    one, two = Traffic(), Traffic()
    one.add(Line("dp", 2, "all_reduce"), Amount(1, 100, 100, 50), times=3)
    two.add(Line("dp", 2, "all_reduce"), Amount(1, 100, 100, 0))
    two.add(Line("tp", 2, "all_gather"), Amount(2, 800, 800, 0))
    both = summed([one, two])
    assert both.total() == Amount(6, 1200, 1200, 150)
    assert [row["group"] for row in both.rows()] == ["tp", "dp"]
    assert both.rows(steps=2)[1] == {
        "group": "dp",
        "size": 2,
        "collective": "all_reduce",
        "calls": 2.0,
        "payload": 200.0,
        "wire": 200.0,
        "between": 75.0,
        "inside": 125.0,
    }


def test_the_table_adds_up_what_is_small() -> None:
    traffic = Traffic()
    traffic.add(Line("dp", 4, "all_reduce"), Amount(4, 8_000_000, 12_000_000, 6_000_000))
    traffic.add(Line("world", 4, "all_reduce"), Amount(4, 16, 24, 12))
    text = table(traffic, steps=2, tokens=1000).splitlines()
    assert [line.split()[0] for line in text] == ["group", "dp", "rest", "all", "12"]
    assert text[1].split()[2:] == ["all_reduce", "2", "4", "MB", "6", "MB", "3", "MB"]
    assert text[2].split() == ["rest", "2", "8", "B", "12", "B", "6", "B"]
    assert text[4] == "12 kB a token on the wire"


@given(st.floats(0, 1e21))
def test_readable_keeps_three_digits(size: float) -> None:
    number, unit = readable(size).split()
    factor = 1000 ** ["B", "kB", "MB", "GB", "TB", "PB", "EB"].index(unit)
    assert float(number) * factor == pytest.approx(size, rel=5.1e-3)
    assert float(number) < 1000 or unit == "EB"
