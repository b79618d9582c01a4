"""Merging shared weights, against loops over single entries in plain Python and fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from btx_megatron.mixing.average import dare, fold_sum, mean, ties, weighted_mean

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
WEIGHTS = [3.0, 1.0, 0.5, 2.0]


def sources_of(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """A base and ``count`` branches near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    branches = [
        base + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)
    ]
    return [tensor.to(dtype) for tensor in (base, *branches)]


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """Within half a unit in the last place of the exact value, and a shade for the sums' own error."""
    _, exponent = torch.frexp(exact)
    half_ulp = torch.finfo(got.dtype).eps / 4 * 2.0 ** exponent.double()
    sums = 2e-15 if got.dtype == torch.float64 else 1e-6
    assert ((got.double() - exact).abs() <= half_ulp + sums).all()


def ties_by_hand(tensors: list[Tensor], base: Tensor, weights: list[float], density: float) -> Tensor:
    """TIES entry by entry, as the paper's algorithm 1 reads."""
    tasks = []
    for tensor in tensors:
        task = [t - b for t, b in zip(tensor.flatten().tolist(), base.flatten().tolist(), strict=True)]
        kept = max(1, round(density * len(task)))
        order = sorted(range(len(task)), key=lambda i, task=task: (-abs(task[i]), i))
        tasks.append([task[i] if i in order[:kept] else 0.0 for i in range(len(task))])
    result = []
    for i, start in enumerate(base.flatten().tolist()):
        elected = sum(w * task[i] for w, task in zip(weights, tasks, strict=True))
        agreeing = [(w, t[i]) for w, t in zip(weights, tasks, strict=True) if t[i] * elected > 0]
        total = sum(w for w, _ in agreeing)
        result.append(start + (sum(w * t for w, t in agreeing) / total if agreeing else 0.0))
    return torch.tensor(result, dtype=torch.float64).view(base.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_mean_is_rounded_once(dtype: torch.dtype) -> None:
    _, *branches = sources_of(4, (13, 7), dtype)
    exact = sum(w * t.double() for w, t in zip(WEIGHTS, branches, strict=True)) / sum(WEIGHTS)
    got = weighted_mean(iter(branches), WEIGHTS)
    assert got.dtype == dtype
    assert_rounded_once(got, exact)


@given(st.integers(1, 9), st.floats(1e-3, 1e3), st.sampled_from(DTYPES))
@settings(max_examples=40)
def test_equal_weights_are_the_mean_to_the_bit(count: int, weight: float, dtype: torch.dtype) -> None:
    _, *branches = sources_of(count, (5, 3), dtype)
    assert torch.equal(weighted_mean(branches, [weight] * count), mean(branches))


def test_the_scale_of_the_weights_does_not_matter_and_zero_leaves_a_source_out() -> None:
    _, *branches = sources_of(3, (6, 5), torch.float32)
    scaled = weighted_mean(branches, [8.0, 4.0, 0.0])
    assert torch.equal(scaled, weighted_mean(branches, [2.0, 1.0, 0.0]))
    assert torch.equal(scaled, weighted_mean(branches[:2], [2.0, 1.0]))


@pytest.mark.parametrize("count", [2, 4])
def test_a_weight_for_every_tensor(count: int) -> None:
    _, *branches = sources_of(count, (2, 2), torch.float32)
    with pytest.raises(ValueError, match="zip"):
        weighted_mean(branches, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 1.0])
def test_ties_is_the_paper_s_algorithm(dtype: torch.dtype, density: float) -> None:
    base, *branches = sources_of(4, (11, 9), dtype, seed=2)
    got = ties(iter(branches), base, WEIGHTS, density)
    assert got.dtype == dtype
    # the loop sees the task vectors that fp32 sees: exact differences of bf16 or fp32 values, nearly always
    assert_rounded_once(got, ties_by_hand(branches, base, WEIGHTS, density))


@given(st.lists(st.integers(-3, 3), min_size=6, max_size=40), st.floats(0.01, 1), st.integers(1, 4))
@settings(max_examples=150)
def test_ties_with_many_equal_magnitudes(values: list[int], density: float, count: int) -> None:
    """Small whole numbers: everything is exact, and most entries tie at the threshold."""
    base = torch.tensor(values, dtype=torch.float32)
    branches = [base + torch.roll(base, shift + 1) * (-1) ** shift for shift in range(count)]
    weights = [1.0, 2.0, 1.0, 4.0][:count]
    expected = ties_by_hand(branches, base, weights, density)
    torch.testing.assert_close(
        ties(branches, base, weights, density).double(), expected, rtol=1e-6, atol=1e-6
    )


def test_ties_keeps_the_first_of_equal_magnitudes_across_search_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("btx_megatron.mixing.average._BLOCK", 4)
    base = torch.zeros(5, 6)
    branch = torch.ones(5, 6)
    branch[4, 5] = -2
    branch[0, 1] = 0.5
    got = ties([branch], base, [1.0], 10 / 30).flatten()
    assert got.nonzero().flatten().tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 29]


def test_ties_of_a_transposed_tensor_is_the_transpose_up_to_equal_ones() -> None:
    base, *branches = sources_of(3, (7, 4), torch.float32)
    flipped = ties([t.T for t in branches], base.T, [1, 1, 1], 0.4)
    assert torch.equal(flipped.T, ties(branches, base, [1, 1, 1], 0.4))


def test_ties_at_density_1_still_elects_signs() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    branches = [torch.tensor([2.0, 2.0, 2.0, 1.0]), torch.tensor([3.0, -2.0, 0.0, 1.0])]
    # agree: mean; disagree: the larger sum alone; sum zero: the base; nothing moved: the base
    assert ties(branches, base, [1, 1], 1.0).tolist() == [2.5, -2.0, 1.0, 1.0]
    # a weight turns the election, and the base's zero entries do not dilute the mean
    assert ties(branches, base, [4, 1], 1.0).tolist() == pytest.approx([2.2, 2.0, 2.0, 1.0])
    assert ties([base, branches[0]], base, [1, 1], 1.0).tolist() == [2.0, 2.0, 2.0, 1.0]


def test_ties_is_the_mean_where_all_agree_and_nothing_is_trimmed() -> None:
    base, *branches = sources_of(4, (8, 8), torch.float32)
    above = [base + (t - base).abs() for t in branches]
    torch.testing.assert_close(ties(above, base, WEIGHTS, 1.0), weighted_mean(above, WEIGHTS))


def test_a_source_of_weight_zero_has_no_say_in_ties() -> None:
    base, *branches = sources_of(3, (6, 6), torch.float32)
    assert torch.equal(ties(branches, base, [1, 2, 0], 0.5), ties(branches[:2], base, [1, 2], 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_drops_and_rescales_with_the_generator_s_draws(dtype: torch.dtype) -> None:
    base, *branches = sources_of(4, (9, 5), dtype, seed=4)
    got = dare(iter(branches), base, WEIGHTS, 0.4, generator_of(7))
    draws = generator_of(7)
    exact = base.double().clone()
    for weight, branch in zip(WEIGHTS, branches, strict=True):
        kept = torch.rand(base.shape, generator=draws) < 0.4
        exact += weight / sum(WEIGHTS) * torch.where(kept, branch.double() - base.double(), 0) / 0.4
    assert got.dtype == dtype
    assert_rounded_once(got, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_at_density_1_is_the_weighted_mean(dtype: torch.dtype) -> None:
    base, *branches = sources_of(4, (9, 5), dtype)
    exact = sum(w * t.double() for w, t in zip(WEIGHTS, branches, strict=True)) / sum(WEIGHTS)
    assert_rounded_once(dare(branches, base, WEIGHTS, 1.0, generator_of(1)), exact)


def test_dare_keeps_the_share_and_the_expectation() -> None:
    base, branch = torch.zeros(400, 500), torch.ones(400, 500)
    got = dare([branch], base, [1.0], 0.25, generator_of(3))
    assert set(got.unique().tolist()) == {0.0, 4.0}
    assert got.mean().item() == pytest.approx(1.0, abs=4 * 4 * math.sqrt(0.25 * 0.75 / 200_000))


def test_sources_like_the_base_leave_it_as_it_is() -> None:
    base, _ = sources_of(1, (17, 3), torch.bfloat16)
    for merged in (
        weighted_mean([base] * 3, [1, 2, 1]),
        ties([base] * 3, base, [1, 2, 1], 0.3),
        dare([base] * 3, base, [1, 2, 1], 0.3, generator_of(0)),
    ):
        assert torch.equal(merged, base)


MERGES: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "mean": lambda tensors, base: mean(tensors),
    "weighted": lambda tensors, base: weighted_mean(tensors, WEIGHTS),
    "ties": lambda tensors, base: ties(tensors, base, WEIGHTS, 0.2),
    "dare": lambda tensors, base: dare(tensors, base, WEIGHTS, 0.2, generator_of(5)),
}


@pytest.mark.parametrize("name", list(MERGES))
def test_threads_change_no_bit_and_arguments_stay_as_they_are(name: str) -> None:
    base, *branches = sources_of(4, (397, 331), torch.float32)  # sizes that no vector width divides
    copies = [tensor.clone() for tensor in (base, *branches)]
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(MERGES[name](branches, base))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert all(torch.equal(a, b) for a, b in zip(copies, (base, *branches), strict=True))


@given(st.integers(1, 70))
def test_fold_sum_adds_every_row_once(rows: int) -> None:
    values = 2.0 ** torch.arange(rows, dtype=torch.float64).remainder(40).unsqueeze(1).repeat(1, 2)
    assert fold_sum(values.clone()).tolist() == values.sum(0).tolist()
