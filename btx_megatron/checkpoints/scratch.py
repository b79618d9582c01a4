"""Memory that a thread of the engine uses again and again, so that the process holds what it is said to hold.

A block is made, written and forgotten thousands of times. Left to ``malloc`` the process grows to four or
five times what is alive: torch asks for aligned memory, and a freed piece is a few bytes too small for the
next request of its own size (glibc 2.36, 20 to 26 blocks seen where 5 are alive); given back to the kernel
each time instead, every page of it is cleared anew, and that takes as long as the work. So a thread keeps
its blocks: one that nobody refers to any more is taken for the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_M_MMAP_THRESHOLD = -3  # mallopt's number of it, in glibc's malloc.h
_LARGE = 256 << 10


class _Mine(threading.local):
    free: list[mmap.mmap] | None = None


_mine = _Mine()


def keep_buffers() -> None:
    """From now on ``empty`` takes memory again in this thread, until it ends."""
    _mine.free = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty``; in a thread that keeps its buffers, in one whose tensor and views are all gone."""
    free, length = _mine.free, math.prod(shape) * dtype.itemsize
    if free is None or not length:
        return torch.empty(tuple(shape), dtype=dtype)
    buffer = _taken(free, length)
    lent = np.frombuffer(buffer, np.uint8, length)  # lives as long as a tensor refers to its memory
    weakref.finalize(lent, free.append, buffer).atexit = False
    return torch.from_numpy(lent).view(dtype).view(tuple(shape))


def contiguous(tensor: Tensor) -> Tensor:
    """``tensor.contiguous()``, in such memory."""
    return tensor if tensor.is_contiguous() else empty(tensor.shape, tensor.dtype).copy_(tensor)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)`` in row-major order, in such memory; the tensor itself where it is that."""
    same = tensor.dtype == dtype and tensor.is_contiguous()
    return tensor if same else empty(tensor.shape, dtype).copy_(tensor)


def side_by_side(parts: Iterable[Tensor], width: int) -> Tensor:
    """Matrices of as many rows, ``width`` columns in all, as one; each is let go before the next is made."""
    whole, at = torch.empty(0), 0
    for part in parts:
        if not at:
            whole = empty((len(part), width), part.dtype)
        whole[:, at : at + part.shape[1]] = part
        at += part.shape[1]
        del part
    return whole


def _taken(free: list[mmap.mmap], length: int) -> mmap.mmap:
    fitting = [buffer for buffer in free if len(buffer) >= length]
    if fitting:
        smallest = min(fitting, key=len)
        free.remove(smallest)
        return smallest
    free.clear()  # all too small, and no use beside a larger one
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def return_freed_memory() -> None:
    """Have ``malloc`` give every large piece back to the kernel when it is freed; in glibc alone.

    For what rules allocate by themselves. By default it stops doing so for the sizes that it has seen freed.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
