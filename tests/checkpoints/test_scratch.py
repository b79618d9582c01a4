"""Buffers that are used again: never while somebody can still see them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from btx_megatron.checkpoints import scratch
from btx_megatron.checkpoints.pieces import bytes_of


@pytest.fixture
def kept() -> Iterator[None]:
    scratch.keep_buffers()
    yield
    scratch._mine.free = None


def test_memory_is_taken_again_once_the_tensor_is_gone(kept: None) -> None:
    first = scratch.empty((1000, 10), torch.float32)
    place = first.data_ptr()
    second = scratch.empty((1000, 10), torch.float32)
    assert second.data_ptr() != place
    del first
    assert scratch.empty((3, 5), torch.bfloat16).data_ptr() == place
    assert scratch.empty((0, 5), torch.float32).shape == (0, 5)


@pytest.mark.parametrize(
    "view",
    [
        lambda tensor: tensor[1:, 2],
        lambda tensor: tensor.view(torch.uint8),
        lambda tensor: tensor.numpy(),
        lambda tensor: bytes_of(tensor),
        lambda tensor: (row for row in [tensor[3]]),
    ],
)
def test_memory_is_not_taken_from_a_view(kept: None, view: Callable[[torch.Tensor], Any]) -> None:
    tensor = scratch.empty((8, 8), torch.float32).fill_(7)
    seen = view(tensor)
    place = tensor.data_ptr()
    del tensor
    assert scratch.empty((8, 8), torch.float32).data_ptr() != place
    del seen
    assert place in [taken.data_ptr() for taken in [scratch.empty((8, 8), torch.float32) for _ in range(2)]]


def test_live_tensors_never_share_memory(kept: None) -> None:
    chance, alive = random.Random(1), []
    for number in range(2000):
        shape = (chance.randint(1, 40), chance.randint(1, 40))
        tensor = scratch.empty(shape, chance.choice([torch.bfloat16, torch.float32])).fill_(number % 251)
        alive.append((tensor, number % 251))
        while len(alive) > chance.randint(0, 6):
            gone, value = alive.pop(chance.randrange(len(alive)))
            assert bool((gone == value).all())
            del gone
    assert len(scratch._mine.free or []) <= 8


def test_a_larger_need_does_not_keep_the_smaller_ones(kept: None) -> None:
    for size in range(1, 200):
        scratch.empty((size, 100), torch.float32)
    assert len(scratch._mine.free or []) == 1


def test_other_threads_have_buffers_of_their_own_or_none(kept: None) -> None:
    mine = scratch.empty((4, 4), torch.float32)
    place = mine.data_ptr()
    del mine
    found = []

    def other() -> None:
        found.append(scratch._mine.free)
        scratch.keep_buffers()
        found.append(scratch.empty((4, 4), torch.float32).data_ptr())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found[0] is None
    assert found[1] != place
