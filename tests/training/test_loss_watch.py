"""Skipped steps are counted and end a stage; spikes are told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from btx_megatron.errors import StageFailed
from btx_megatron.training.loss_watch import LossWatch, Skips
from btx_megatron.training.metrics import StepResult

GOOD = StepResult(lm_loss=4.0, tokens=8, grad_norm=1.0, learning_rate=1e-3, seconds=0.1)
NO_LOSS = replace(GOOD, lm_loss=math.nan, grad_norm=math.nan, skipped=True)
NO_GRADIENT = replace(GOOD, grad_norm=math.inf, skipped=True)


def test_skips_are_counted_and_a_good_step_ends_the_row() -> None:
    watch = LossWatch(Skips(total=5), most_in_a_row=2, spike_factor=2.0)
    lines = [watch.step(number, one) for number, one in enumerate([NO_GRADIENT, NO_LOSS, GOOD, NO_LOSS], 1)]
    assert lines == [
        "step 1: the gradient's norm is inf; skipped (1 in a row, 6 in all)",
        "step 2: the loss is nan; skipped (2 in a row, 7 in all)",
        None,
        "step 4: the loss is nan; skipped (1 in a row, 8 in all)",
    ]
    assert watch.skips == Skips(total=8, in_a_row=1)


def test_one_more_in_a_row_ends_the_stage() -> None:
    watch = LossWatch(Skips(in_a_row=1), most_in_a_row=2, spike_factor=2.0)  # resumed in the midst of a row
    assert watch.step(7, NO_LOSS)
    with pytest.raises(StageFailed, match="step 8: the gradient's norm is inf; 3 skipped in a row"):
        watch.step(8, NO_GRADIENT)


def test_none_may_be_skipped() -> None:
    with pytest.raises(StageFailed, match=r"step 1: the loss is nan; 1 skipped in a row, .* 0: lower"):
        LossWatch(Skips(), most_in_a_row=0, spike_factor=2.0).step(1, NO_LOSS)


def test_a_spike_is_a_multiple_of_the_running_median() -> None:
    watch = LossWatch(Skips(), most_in_a_row=0, spike_factor=2.0)
    losses = [9.0] + [4.0] * 10 + [8.1, 7.9, 4.0]
    lines = [watch.step(number, replace(GOOD, lm_loss=loss)) for number, loss in enumerate(losses, 1)]
    assert lines[11] == "step 12: the loss jumps to 8.1; the median before is 4"
    assert [line for line in lines if line] == [lines[11]]


def test_the_median_follows_the_loss() -> None:
    watch = LossWatch(Skips(), most_in_a_row=0, spike_factor=2.0)
    for number in range(250):
        assert watch.step(number, replace(GOOD, lm_loss=10.0 if number < 100 else 5.0)) is None
    assert watch.step(251, replace(GOOD, lm_loss=10.5))


def test_the_first_losses_say_nothing() -> None:
    watch = LossWatch(Skips(), most_in_a_row=0, spike_factor=2.0)
    assert not any(watch.step(number, replace(GOOD, lm_loss=10.0**number)) for number in range(10))
