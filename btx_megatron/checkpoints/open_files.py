"""Open files, lent to threads: as many as the process may have, however many a mix reads.

Sixty-four experts of twenty files each are more than a process may open (1,024 by default). So a file that
nobody reads at the moment may be closed, the least recently used first, and is opened again when it is asked
for. Half of what the process may have is left to everybody else.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from btx_megatron.errors import UserError

Key = tuple[int, str]
"""Of an owner, and the file's path."""

_FULL = (errno.EMFILE, errno.ENFILE)


@dataclass
class _Open:
    descriptor: int
    users: int = 0


class OpenFiles:
    """The open files of a process, by owner."""

    def __init__(self) -> None:
        self._open: OrderedDict[Key, _Open] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._owners = itertools.count()
        self._gone: deque[int] = deque()

    def new_owner(self, of: object) -> int:
        """A number under which to open files, never given before. Once ``of`` is gone they are closed.

        Not at once: it may go while the lock is held, by the collection of garbage in any allocation.
        """
        owner = next(self._owners)
        weakref.finalize(of, self._gone.append, owner).atexit = False
        return owner

    @contextlib.contextmanager
    def lent(self, owner: int, path: Path, flags: int) -> Iterator[int]:
        """The file's descriptor, not closed before the block ends. Raises OSError where it cannot be opened.

        Raises UserError where too many files are open, whoever opened them.
        """
        entry = self._taken((owner, str(path)), flags)
        try:
            yield entry.descriptor
        finally:
            with self._lock:
                entry.users -= 1

    def _taken(self, key: Key, flags: int) -> _Open:
        while self._gone:
            self.close(self._gone.popleft())
        with self._lock:
            if key not in self._open:
                self._close_idle(len(self._open) + 1 - self.most())
                self._open[key] = _Open(self._opened(key[1], flags))
            self._open.move_to_end(key)
            self._open[key].users += 1
            return self._open[key]

    def _opened(self, path: str, flags: int) -> int:
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno not in _FULL:
                raise
        self._close_idle(len(self._open))  # others have opened more than their half
        try:
            return os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise UserError(f"{path}: too many files are open; allow more (ulimit -n)") from None

    def _close_idle(self, count: int) -> None:
        """Close up to so many files that nobody uses."""
        if count > 0:
            idle = [key for key, entry in self._open.items() if not entry.users]
            for key in idle[:count]:
                os.close(self._open.pop(key).descriptor)

    def close(self, owner: int) -> None:
        """Close all files of an owner."""
        with self._lock:
            for key in [key for key in self._open if key[0] == owner]:
                os.close(self._open.pop(key).descriptor)

    @staticmethod
    def most() -> int:
        """Files that are kept open: half of what the process may have."""
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return 1 << 16 if allowed == resource.RLIM_INFINITY else max(1, allowed // 2)


OPEN_FILES = OpenFiles()
