"""Rows of the vocabulary, added and taken away, against plain indexing and Megatron's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.checkpoints.pieces import TensorInfo
from btx_megatron.checkpoints.stream import PlannedTensor
from btx_megatron.checkpoints.vocabulary import (
    EMBEDDING,
    OUTPUT,
    cut_rows,
    divisor,
    fit_vocabulary,
    pad_rows,
    padded_rows,
)
from btx_megatron.errors import UserError

VALUES = torch.randn(11, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
MADE = list[tuple[int, int]]


def planned(name: str = EMBEDDING, whole: bool = False, made: MADE | None = None) -> PlannedTensor:
    def make(index: tuple[int, ...]):  # type: ignore[no-untyped-def]
        def rows(start: int, stop: int) -> torch.Tensor:
            assert 0 <= start < stop <= len(VALUES)
            assert not whole or (start, stop) == (0, len(VALUES))
            if made is not None:
                made.append((start, stop))
            return VALUES[start:stop]

        return rows

    info = TensorInfo(tuple(VALUES.shape), VALUES.dtype)
    return PlannedTensor(name, info, "mean", ("a", "b"), make, whole)


def values_of(tensor: PlannedTensor, step: int) -> torch.Tensor:
    rows, length = tensor.make(()), tensor.info.shape[0]
    step = length if tensor.whole else step
    return torch.cat([rows(at, min(length, at + step)) for at in range(0, length, step)])


@given(st.integers(12, 40), st.integers(1, 40), st.booleans())
def test_padding_is_zeros_behind(rows: int, step: int, whole: bool) -> None:
    tensor = pad_rows(planned(whole=whole), rows)
    assert (tensor.rule, tensor.info.shape, tensor.whole) == ("mean+padded", (rows, 3), whole)
    found = values_of(tensor, step)
    assert found.dtype == VALUES.dtype
    assert torch.equal(found[:11], VALUES)
    assert found.shape == (rows, 3)
    assert not found[11:].any()


@given(st.integers(1, 10), st.integers(1, 11), st.booleans())
def test_a_cut_leaves_the_first_rows_and_makes_each_row_once(rows: int, step: int, whole: bool) -> None:
    made: MADE = []
    tensor = cut_rows(planned(whole=whole, made=made), rows)
    assert (tensor.rule, tensor.info.shape) == ("mean+cut", (rows, 3))
    assert torch.equal(values_of(tensor, step), VALUES[:rows])
    assert [start for start, _ in made[1:]] == [stop for _, stop in made[:-1]]
    assert (made[0][0], made[-1][1]) == (0, 11)
    assert whole or max(stop - start for start, stop in made) <= step


@given(st.integers(1, 300_000), st.integers(1, 1024), st.sampled_from([1, 2, 4, 8]))
def test_rows_are_megatrons(vocab_size: int, divisible_by: int, tensor_parallel: int) -> None:
    rows = padded_rows(vocab_size, divisible_by, tensor_parallel)
    multiple = divisible_by * tensor_parallel
    assert rows == int(math.ceil(vocab_size / multiple) * multiple)
    number = divisor(vocab_size, rows, tensor_parallel)
    assert padded_rows(vocab_size, number, tensor_parallel) == rows
    unknown = divisor(None, rows, tensor_parallel)
    assert padded_rows(rows, unknown, tensor_parallel) == rows


@pytest.mark.parametrize(
    ("vocab_size", "rows", "tensor_parallel", "number"),
    [
        (50257, 50257, 1, 1),  # odd
        (50257, 50304, 1, 128),
        (50257, 50304, 2, 64),
        (50257, 50432, 2, 128),
        (32000, 32000, 1, 128),
        (100, 1000, 1, 1000),  # no power of two up to 128 does it
        (1, 30, 2, 15),
        (None, 33, 1, 1),
        (7, 8, 1, 8),
    ],
)
def test_the_divisor_is_the_usual_where_that_does_it(
    vocab_size: int | None, rows: int, tensor_parallel: int, number: int
) -> None:
    assert divisor(vocab_size, rows, tensor_parallel) == number


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "rows", "rule"),
    [
        (9, None, 11, "mean"),
        (11, 1, 11, "mean"),
        (9, 1, 9, "mean+cut"),
        (None, 1, 11, "mean"),
        (9, 4, 12, "mean+padded"),
        (9, 5, 10, "mean+cut"),
        (9, 11, 11, "mean"),
        (None, 8, 16, "mean+padded"),
    ],
)
def test_a_vocabulary_fits_its_target(
    vocab_size: int | None, multiple: int | None, rows: int, rule: str
) -> None:
    other = planned("decoder.final_layernorm.weight")
    plan = fit_vocabulary([planned(), other, planned(OUTPUT)], vocab_size, multiple)
    assert [tensor.rule for tensor in plan] == [rule, "mean", rule]
    assert [tensor.info.shape[0] for tensor in plan] == [rows, 11, rows]
    assert plan[1] is other


def test_fewer_rows_than_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="has 11 rows, and the vocab_size of its model is 12"):
        fit_vocabulary([planned()], 12, 4)
