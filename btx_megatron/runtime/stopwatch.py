"""How long a stage has worked, over all its attempts.

The sum lies in the work folder and is written every few seconds, because an attempt may end by SIGKILL,
which leaves no time to write anything.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from btx_megatron.durable import replace_file

DURATION_FILE = "duration.json"
_SECONDS_BETWEEN_WRITES = 2.0


class Stopwatch:
    """Runs from its making; goes on from the attempts before."""

    def __init__(self, work_folder: Path) -> None:
        self._path = work_folder / DURATION_FILE
        self._before = read_duration(work_folder)
        self._start = self._written = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of all attempts so far."""
        return self._before + time.monotonic() - self._start

    def tick(self) -> None:
        """Write the sum down, if the last writing is long enough ago."""
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self.save()

    def save(self) -> None:
        """Write the sum down now."""
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk must not end the work for the sake of a clock
            replace_file(self._path, json.dumps(self.seconds))


def read_duration(work_folder: Path) -> float:
    """Seconds of the attempts so far; 0 where there was none, or a crash left the file empty."""
    try:
        return float(json.loads((work_folder / DURATION_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return 0.0
