"""Processes that share out the preparation of data.

They are spawned, not forked: a fork would copy the threads' locks of whatever the caller runs
(tensor libraries, progress bars), and hang on them now and then. A worker outlives neither a Ctrl-C
nor a killed parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from btx_megatron.runtime.cores import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

WINDOW_PER_WORKER = 4  # tasks under way or waiting to be taken: bounds the memory


class Workers:
    """A pool of ``num_workers`` processes (0: one a core that this process may use).

    With one worker everything runs in this process. The processes start with the first task.
    """

    def __init__(self, num_workers: int) -> None:
        self.count = num_workers or available_cores()
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """``function`` of every item, in the items' order; ``function`` must be importable by name.

        Items are drawn as results are taken, so neither side has to fit in memory.
        """
        if self.count == 1:
            yield from map(function, items)
            return
        pool = self._started()
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= WINDOW_PER_WORKER * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_settle_in)
        return self._pool

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _settle_in() -> None:
    """Leave Ctrl-C to the parent, and leave when the parent is gone (a killed one cannot say so)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
