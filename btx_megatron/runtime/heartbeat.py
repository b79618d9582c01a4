"""Which rank hangs: each rank says how far it is and where its program stands, in a small file of its own.

When a rank hangs, the others wait for it in a collective, and what they would say after their time-out is
that somebody did not come. So a thread of each rank writes, every few seconds, what its main thread does;
the supervisor looks whether anything moves, and if nothing does for too long it names the one to blame:

1. a rank whose file is not renewed any more: its process is stopped, or waits for a device or a disk;
2. else a rank that is steps behind the others;
3. else one that does not stand in torch.distributed while others do: it is not waiting, it is waited for;
4. else nobody, and it says where all of them stand.

The main thread only sets attributes, so a step pays nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from btx_megatron.durable import replace_file

_FILES = "heartbeat-*.json"
_WAITING = "torch/distributed/"
_BEATS_PER_TIMEOUT = 20
_MISSED_BEATS = 5  # so many, and a rank gives no sign of life
_LONGEST_LIST = 8


@dataclass(frozen=True)
class Beat:
    """What one rank said last."""

    rank: int
    step: int
    """The step that it is in, from 1; 0 before the first."""
    doing: str
    """``step 7``, ``saving step 7``, ``loading``."""
    where: str
    """File, line and function where its main thread stands."""
    time: float
    """Seconds since 1970, when it was written."""


class Heartbeat:
    """Context manager: writes this rank's file until it is left."""

    def __init__(self, work_folder: Path, rank: int, timeout_seconds: float) -> None:
        self._path = work_folder / _FILES.replace("*", str(rank))
        self._rank, self._pause = rank, seconds_between_beats(timeout_seconds)
        self._now = (0, "starting")
        self._main = threading.get_ident()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def tell(self, step: int, doing: str) -> None:
        """From here on this rank is in ``step``, doing that."""
        self._now = (step, doing)

    def _beat(self) -> None:
        while not self._left.is_set():
            step, doing = self._now
            beat = Beat(self._rank, step, doing, _where(self._main), time.time())
            with contextlib.suppress(OSError):  # a full disk must not end the work for the sake of this
                replace_file(self._path, json.dumps(asdict(beat)))
            self._left.wait(self._pause)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)


class HangWatch:
    """The supervisor's side, for one stage."""

    def __init__(self, work_folder: Path, timeout_seconds: float) -> None:
        self._folder, self._timeout = work_folder, timeout_seconds
        self._pause = seconds_between_beats(timeout_seconds)
        self._seen: object = None
        self._still = 0.0
        self._looked = time.monotonic()

    def look(self) -> str | None:
        """One line that says who hangs, once nothing has moved for the time-out; else None.

        Time in which nobody looked (this process was stopped, the machine asleep) does not count.
        """
        now = time.monotonic()
        since = now - self._looked
        if since < self._pause:
            return None
        self._looked = now
        beats = read_beats(self._folder)
        moved = {beat.rank: (beat.step, beat.doing) for beat in beats}
        if not beats or moved != self._seen:
            self._seen, self._still = moved, 0.0
            return None
        self._still += min(since, 2 * self._pause)
        if self._still < self._timeout:
            return None
        return f"nothing has moved for {self._still:.0f} s: " + blame(
            beats, time.time() - _MISSED_BEATS * self._pause
        )


def blame(beats: list[Beat], alive_since: float) -> str:
    """Which of the ranks hangs; a rank is alive if it has written at ``alive_since`` or later."""
    silent = [beat for beat in beats if beat.time < alive_since]
    if silent:
        verb = "gives" if len(silent) == 1 else "give"
        return f"{_ranks(silent)} {verb} no sign of life; last seen: {_places(silent)}"
    last = max(beat.step for beat in beats)
    behind = [beat for beat in beats if beat.step < last]
    if behind:
        return f"{_ranks(behind)} {_is(behind)} behind: {_places(behind)}; the others are in step {last}"
    awaited = [beat for beat in beats if _WAITING not in beat.where]
    if awaited and len(awaited) < len(beats):
        return f"{_ranks(awaited)} {_is(awaited)} waited for: {_places(awaited)}"
    return f"no rank is ahead of another: {_places(beats)}"


def read_beats(work_folder: Path) -> list[Beat]:
    """What the ranks said last, by rank."""
    beats = []
    for path in work_folder.glob(_FILES):
        # it has come to its end, or a file system over the network is between two versions of the file
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(path.read_text())))
    return sorted(beats, key=lambda beat: beat.rank)


def clear_beats(work_folder: Path) -> None:
    """Forget an earlier attempt."""
    for path in work_folder.glob(_FILES):
        path.unlink(missing_ok=True)


def seconds_between_beats(timeout_seconds: float) -> float:
    """A twentieth of the time-out, but no more than 10 s."""
    return min(10.0, timeout_seconds / _BEATS_PER_TIMEOUT)


def _where(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "nowhere"
    path = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"


def _is(beats: list[Beat]) -> str:
    return "is" if len(beats) == 1 else "are"


def _ranks(beats: list[Beat]) -> str:
    """``rank 1``, ``ranks 1, 3``."""
    numbers = ", ".join(str(beat.rank) for beat in beats[:_LONGEST_LIST])
    more = f" and {len(beats) - _LONGEST_LIST} more" if len(beats) > _LONGEST_LIST else ""
    return f"rank {numbers}" if len(beats) == 1 else f"ranks {numbers}{more}"


def _places(beats: list[Beat]) -> str:
    """``rank 1 in step 7 (torch/distributed/x.py:3 f)``, those at one place together."""
    places: dict[str, list[Beat]] = {}
    for beat in beats:
        places.setdefault(f"{beat.doing} ({beat.where})", []).append(beat)
    told = [f"{_ranks(there)} in {place}" for place, there in list(places.items())[:_LONGEST_LIST]]
    return "; ".join(told)
