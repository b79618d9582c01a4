"""How far a stage is: a small JSON file that the worker replaces and the supervisor reads.

A file and not a pipe, because a reader may come and go (``btx status`` from another terminal) and
because a worker must never wait for anybody to read. The replacement is atomic, so that a reader sees
a whole record or the one before it.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from btx_megatron.durable import replace_file

PROGRESS_FILE = "progress.json"
_SECONDS_BETWEEN_WRITES = 0.2


@dataclass(frozen=True)
class ProgressRecord:
    """One report: ``done`` of ``total`` units of ``phase``; ``text`` is the last loss or the like."""

    phase: str
    done: int
    total: int
    text: str
    time: float
    """Seconds since 1970, when it was written."""
    first_done: int
    """``done`` at the first report of the phase in this attempt; a resumed stage does not begin at 0."""
    first_time: float
    """Time of that report."""

    @property
    def rate(self) -> float | None:
        """Units a second since the first report; None until there is something to measure."""
        seconds, units = self.time - self.first_time, self.done - self.first_done
        return units / seconds if seconds > 0 and units > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Until the phase ends, at this rate."""
        return (self.total - self.done) / self.rate if self.rate else None


class Progress:
    """Writes the progress of one stage; on several ranks, rank 0 alone makes one."""

    def __init__(self, work_folder: Path) -> None:
        self._path = work_folder / PROGRESS_FILE
        self._phase = ""
        self._first = (0, 0.0)
        self._written = 0.0

    def update(self, phase: str, done: int, total: int, text: str = "") -> None:
        """Report, at most five times a second; the first and the last of a phase are always written."""
        now = time.time()
        soon = now - self._written < _SECONDS_BETWEEN_WRITES
        if soon and phase == self._phase and done < total:
            return
        if phase != self._phase:
            self._phase, self._first = phase, (done, now)
        self._written = now
        record = json.dumps(asdict(ProgressRecord(phase, done, total, text, now, *self._first)))
        with contextlib.suppress(OSError):  # a full disk must not end the work for the sake of a bar
            replace_file(self._path, record)


def read_progress(work_folder: Path) -> ProgressRecord | None:
    """The last report of a stage; None where it has not reported yet, or as another version does, or where
    a crash left the file empty."""
    try:
        return ProgressRecord(**json.loads((work_folder / PROGRESS_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
