"""Which units an expert takes, held against what a SwiGLU of them computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import relu, silu

from btx_megatron.errors import UserError
from btx_megatron.mixing.experts import (
    Kind,
    Scales,
    dropped_units,
    expert_count,
    expert_units,
    expert_width,
    fc1_rows,
    redraw_fc1,
    redraw_fc2,
    scale_fc1,
    scale_fc2,
    take_fc1,
    take_fc2,
    virtual_factor,
    virtual_scales,
)

HIDDEN = 6
KINDS: list[Kind] = ["stack", "split", "blend", "copies", "virtual"]


def feed_forwards(
    count: int, width: int, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(width)
    fc1 = [torch.randn(2 * width, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(count)]
    fc2 = [torch.randn(HIDDEN, width, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [t.to(dtype) for t in fc1], [t.to(dtype) for t in fc2]


def feed_forward(fc1: Tensor, fc2: Tensor, gate: Callable[[Tensor], Tensor] = silu) -> Tensor:
    """What the layer does to five fixed tokens: [5, HIDDEN]."""
    tokens = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gates, ups = (tokens @ fc1.double().T).chunk(2, dim=1)
    return (gate(gates) * ups) @ fc2.double().T


def expert(
    kind: Kind, number: int, fc1: list[Tensor], fc2: list[Tensor], chunks: int = 1, copies: int = 1
) -> tuple[Tensor, Tensor]:
    units = expert_units(kind, number, len(fc1), fc2[0].shape[1], chunks, copies)
    return take_fc1(fc1, units), take_fc2(fc2, units)


@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))
def test_every_unit_is_taken_once_a_copy(
    kind: Kind, sources: int, chunks: int, copies: int, unit: int
) -> None:
    chunks = chunks if kind in ("split", "virtual") else 1
    copies = copies if kind in ("copies", "virtual") else 1
    assume(kind != "split" or chunks > 1)
    assume(kind != "copies" or copies > 1)
    width = unit * (sources if kind == "blend" else chunks)
    count = expert_count(kind, sources, chunks, copies)
    size = expert_width(kind, sources, width, chunks)
    taken: dict[tuple[int, int], int] = {}
    for number in range(count):
        spans = expert_units(kind, number, sources, width, chunks, copies)
        assert sum(span.stop - span.start for span in spans) == size
        for span in spans:
            for one in range(span.start, span.stop):
                taken[span.source, one] = taken.get((span.source, one), 0) + 1
    assert taken == {(source, one): copies for source in range(sources) for one in range(width)}


def test_the_numbers_of_the_experts_are_those_of_the_table() -> None:
    assert expert_units("stack", 2, 3, 12) == ((2, 0, 12),)
    assert expert_units("split", 3, 3, 12, chunks=2) == ((1, 6, 12),)
    assert expert_units("blend", 1, 3, 12) == ((0, 4, 8), (1, 4, 8), (2, 4, 8))
    assert expert_units("copies", 5, 3, 12, copies=2) == ((2, 0, 12),)
    assert expert_units("virtual", 7, 2, 12, chunks=3, copies=2) == ((1, 4, 8),)  # (1*2 + 0)*3 + 1


def test_rows_are_gates_of_all_spans_and_then_ups() -> None:
    units = expert_units("blend", 1, 2, 8)
    assert fc1_rows(units, 8) == [(0, 4, 8), (1, 4, 8), (0, 12, 16), (1, 12, 16)]


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_the_chunks_of_a_split_source_sum_to_its_feed_forward(chunks: int) -> None:
    fc1, fc2 = feed_forwards(3, 12)
    for source in range(3):
        parts = [expert("split", source * chunks + c, fc1, fc2, chunks) for c in range(chunks)]
        assert all(part[0].shape == (24 // chunks, HIDDEN) for part in parts)
        total = sum(feed_forward(*part) for part in parts)
        torch.testing.assert_close(total, feed_forward(fc1[source], fc2[source]))
        assert torch.equal(torch.cat([part[1] for part in parts], dim=1), fc2[source])


def test_the_blended_experts_sum_to_all_feed_forwards_and_each_is_its_chunks() -> None:
    fc1, fc2 = feed_forwards(4, 12)
    blended = [expert("blend", n, fc1, fc2) for n in range(4)]
    assert all(one.shape == fc1[0].shape and two.shape == fc2[0].shape for one, two in blended)
    total = sum(feed_forward(a, b) for a, b in zip(fc1, fc2, strict=True))
    torch.testing.assert_close(sum(feed_forward(*one) for one in blended), total)
    for n, one in enumerate(blended):
        chunks = sum(feed_forward(*expert("split", s * 4 + n, fc1, fc2, 4)) for s in range(4))
        torch.testing.assert_close(feed_forward(*one), chunks)


def test_stack_and_copies_are_the_sources_bit_for_bit() -> None:
    fc1, fc2 = feed_forwards(2, 6, torch.bfloat16)
    for number in range(4):
        one, two = expert("copies", number, fc1, fc2, copies=2)
        assert torch.equal(one, fc1[number // 2])
        assert torch.equal(two, fc2[number // 2])
    assert torch.equal(expert("stack", 1, fc1, fc2)[0], fc1[1])


def routed(logits: Tensor, topk: int, pre_softmax: bool) -> Tensor:
    """Gates of one token over all experts."""
    chosen = logits.topk(topk).indices
    gates = torch.zeros_like(logits)
    gates[chosen] = logits.softmax(0)[chosen] if pre_softmax else logits[chosen].softmax(0)
    return gates


@pytest.mark.parametrize("pre_softmax", [True, False])
@pytest.mark.parametrize(
    ("copies", "chunks", "topk"), [(4, 1, 2), (4, 2, 2), (4, 2, 4), (8, 4, 4), (3, 3, 9)]
)
def test_a_virtual_group_layer_starts_as_the_dense_one(
    copies: int, chunks: int, topk: int, pre_softmax: bool
) -> None:
    """All shards of a copy have one logit; before top-k the paper's scale also takes all copies as equal."""
    fc1, fc2 = feed_forwards(1, 12)
    count = expert_count("virtual", 1, chunks, copies)
    factor = virtual_factor(count, chunks, topk, pre_softmax)
    by_copy = torch.zeros(copies, dtype=torch.float64)
    by_copy[: topk // chunks] = 1e-9  # whole copies win, with gates that are equal for all that matters
    gates = routed(by_copy.repeat_interleave(chunks), topk, pre_softmax)
    assert int((gates > 0).sum()) == topk

    def layer(scales: Scales, gate: Callable[[Tensor], Tensor]) -> Tensor:
        experts = [expert("virtual", n, fc1, fc2, chunks, copies) for n in range(count)]
        outputs = [feed_forward(scale_fc1(a, scales), scale_fc2(b, scales), gate) for a, b in experts]
        return sum((g * out for g, out in zip(gates, outputs, strict=True)), torch.zeros(()))

    dense = feed_forward(fc1[0], fc2[0])
    torch.testing.assert_close(layer(virtual_scales(factor, "exact"), silu), dense, rtol=1e-6, atol=1e-6)
    bent = layer(virtual_scales(factor, "cube-root"), relu)
    torch.testing.assert_close(bent, feed_forward(fc1[0], fc2[0], relu), rtol=1e-6, atol=1e-6)


def test_the_paper_s_cube_root_bends_a_swiglu() -> None:
    fc1, fc2 = feed_forwards(1, 12)
    scales = virtual_scales(8.0, "cube-root")
    assert scales == Scales(2.0, 2.0, 2.0)
    dense = feed_forward(fc1[0], fc2[0])
    off = feed_forward(scale_fc1(fc1[0], scales), scale_fc2(fc2[0], scales)) / 8 - dense
    assert 0.02 < (off.norm() / dense.norm()).item() < 0.5


def test_the_factor_is_the_paper_s() -> None:
    assert virtual_factor(64, 8, 8, pre_softmax=True) == 8 * 8**2 / 8
    assert virtual_factor(64, 8, 8, pre_softmax=False) == 8
    with pytest.raises(UserError, match=r"--chunks 4: moe_router_topk=2 cuts a group"):
        virtual_factor(8, 4, 2, pre_softmax=True)


def test_scaling_rounds_once_and_leaves_its_argument() -> None:
    fc1, fc2 = feed_forwards(1, 8, torch.bfloat16)
    before = fc1[0].clone()
    scaled = scale_fc1(fc1[0], Scales(1.5, 1.1, 0.3))
    assert torch.equal(scaled[:8], (fc1[0][:8].float() * 1.5).bfloat16())
    assert torch.equal(scaled[8:], (fc1[0][8:].float() * 1.1).bfloat16())
    assert torch.equal(scale_fc2(fc2[0], Scales(1.5, 1.1, 0.3)), (fc2[0].float() * 0.3).bfloat16())
    assert torch.equal(fc1[0], before)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 99))
def test_dropped_units_are_the_share_and_distinct(width: int, ratio: float, seed: int) -> None:
    units = dropped_units(width, ratio, generator_of(seed)).tolist()
    assert len(units) == round(ratio * width)
    assert units == sorted(set(units))
    assert all(0 <= unit < width for unit in units)
    assert units == dropped_units(width, ratio, generator_of(seed)).tolist()


def test_every_unit_is_dropped_as_often_as_another() -> None:
    counts = torch.zeros(10)
    for seed in range(1000):
        counts[dropped_units(10, 0.3, generator_of(seed))] += 1
    assert ((counts - 300).abs() < 5 * math.sqrt(1000 * 0.3 * 0.7)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_redrawing_changes_the_dropped_units_alone(dtype: torch.dtype) -> None:
    (fc1,), (fc2,) = (tensors for tensors in feed_forwards(1, 20, dtype))
    copies = fc1.clone(), fc2.clone()
    dropped = dropped_units(20, 0.5, generator_of(0))
    kept = torch.tensor([unit for unit in range(20) if unit not in dropped.tolist()])
    new1, new2 = redraw_fc1(fc1, dropped, generator_of(1)), redraw_fc2(fc2, dropped, generator_of(2))
    for part in (0, 20):
        assert torch.equal(new1[kept + part], fc1[kept + part])
        assert (new1[dropped + part] != fc1[dropped + part]).any(dim=1).all()
    assert torch.equal(new2[:, kept], fc2[:, kept])
    assert (new2[:, dropped] != fc2[:, dropped]).any(dim=0).all()
    assert new1.dtype == new2.dtype == dtype
    assert torch.equal(copies[0], fc1)
    assert torch.equal(copies[1], fc2)
    # so what the kept units compute is untouched
    pairs = torch.cat([kept, kept + 20])
    torch.testing.assert_close(
        feed_forward(new1[pairs], new2[:, kept]), feed_forward(fc1[pairs], fc2[:, kept]), rtol=0, atol=0
    )


def test_redrawn_values_have_the_statistics_of_the_dropped_ones_of_their_own_matrix() -> None:
    width, hidden = 200, 300
    scale = torch.linspace(0.5, 2, width).repeat(2).unsqueeze(1)
    fc1 = scale * torch.randn(2 * width, hidden, generator=generator_of(1))
    fc1[width:] = 5 + 3 * fc1[width:]
    dropped = torch.arange(50, 150)
    new = redraw_fc1(fc1, dropped, generator_of(2))
    for part in (0, width):
        was, now = fc1[dropped + part], new[dropped + part]
        error = was.std().item() / math.sqrt(was.numel())
        assert now.mean().item() == pytest.approx(was.mean().item(), abs=5 * error)
        assert now.std().item() == pytest.approx(was.std().item(), abs=5 * error)
    fc2 = 2 + fc1[:width].T
    now = redraw_fc2(fc2, dropped, generator_of(3))[:, dropped]
    assert now.std().item() == pytest.approx(fc2[:, dropped].std().item(), rel=0.02)
    assert now.mean().item() == pytest.approx(fc2[:, dropped].mean().item(), abs=0.05)


def test_drop_ratio_0_keeps_everything() -> None:
    (fc1,), (fc2,) = feed_forwards(1, 8)
    none = dropped_units(8, 0.0, generator_of(0))
    assert torch.equal(redraw_fc1(fc1, none, generator_of(0)), fc1)
    assert torch.equal(redraw_fc2(fc2, none, generator_of(0)), fc2)


def test_threads_do_not_change_what_is_redrawn() -> None:
    fc1 = torch.randn(2 * 301, 257, generator=generator_of(3))
    dropped, before, results = dropped_units(301, 0.5, generator_of(4)), torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(redraw_fc1(fc1, dropped, generator_of(5)))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expert_width("split", 2, 10, 4), r"--experts split --chunks 4: .*width 10 .*4 equal chunks"),
        (lambda: expert_width("virtual", 1, 10, 3), r"--experts virtual --chunks 3: .*width 10"),
        (lambda: expert_width("blend", 3, 10), r"--experts blend of 3 sources: .*width 10 .*3 equal chunks"),
        (lambda: expert_count("split", 2), r"--experts split needs --chunks of at least 2, not 1"),
        (lambda: expert_count("copies", 2), r"--experts copies needs --copies of at least 2, not 1"),
        (lambda: expert_count("virtual", 2, 0), r"--experts virtual needs --chunks of at least 1, not 0"),
        (lambda: expert_count("stack", 2, 2), r"--chunks 2 means nothing with --experts stack"),
        (lambda: expert_count("split", 2, 2, 3), r"--copies 3 means nothing with --experts split"),
        (lambda: dropped_units(8, 1.5, generator_of(0)), r"--drop-ratio 1.5: must be from 0"),
        (lambda: dropped_units(8, float("nan"), generator_of(0)), r"--drop-ratio nan"),
    ],
)
def test_options_that_do_not_fit_are_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(1, 8))
@settings(max_examples=25)
def test_a_split_is_undone_by_putting_the_chunks_side_by_side(sources: int, chunks: int, unit: int) -> None:
    fc1, fc2 = feed_forwards(sources, unit * chunks)
    for source in range(sources):
        parts = [expert("split", source * chunks + c, fc1, fc2, chunks) for c in range(chunks)]
        gates = torch.cat([one[:unit] for one, _ in parts])
        ups = torch.cat([one[unit:] for one, _ in parts])
        assert torch.equal(torch.cat([gates, ups]), fc1[source])
        assert torch.equal(torch.cat([two for _, two in parts], dim=1), fc2[source])
