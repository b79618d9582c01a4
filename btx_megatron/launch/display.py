"""What a person sees of a run: a live bar a running stage, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from btx_megatron.runtime.outcome import Outcome
from btx_megatron.runtime.progress import ProgressRecord

_SECONDS_BETWEEN_LINES = 30.0


class Display(Protocol):
    """Shows the stages; a context manager, since a live display must be left in order."""

    def start(self, stage: str, detail: str) -> None:
        """A stage starts; ``detail`` is its layout."""

    def progress(self, stage: str, record: ProgressRecord) -> None:
        """How far a running stage is; may be called with the same record again."""

    def end(self, stage: str, outcome: Outcome, seconds: float) -> None:
        """A stage ended after so many seconds."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def make_display() -> Display:
    """The live one on a terminal, else the plain one."""
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()


def pace(record: ProgressRecord) -> str:
    """``1.9/s, 1:08 left, loss 3.210, 3,890 tokens/s``; what is not known yet is left out."""
    parts = [record.text] if record.text else []
    if record.rate is not None and record.seconds_left is not None:
        parts = [f"{record.rate:.3g}/s", f"{clock(record.seconds_left)} left", *parts]
    return ", ".join(parts)


def how_far(record: ProgressRecord) -> str:
    """``training 30/100, 1.9/s, 1:08 left, ...``."""
    return ", ".join(filter(None, [f"{record.phase} {record.done}/{record.total}", pace(record)]))


def clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def end_line(stage: str, outcome: Outcome, seconds: float, last: ProgressRecord | None) -> str:
    """One line that stays when a stage has ended."""
    if outcome.kind == "done":
        text = f", last batch: {last.text}" if last and last.phase == "training" else ""
        return f"{stage}: done in {clock(seconds)}{text}"
    if outcome.kind == "stopped":
        return f"{stage}: stopped after {clock(seconds)}"
    return f"{stage}: failed after {clock(seconds)}: {outcome.message}"


class PlainDisplay:
    """A line when a stage starts and ends, and every 30 seconds between."""

    def __init__(self) -> None:
        self._last: dict[str, ProgressRecord] = {}
        self._spoken: dict[str, float] = {}

    def start(self, stage: str, detail: str) -> None:
        self._spoken[stage] = time.monotonic()
        self.say(f"{stage}: started ({detail})")

    def progress(self, stage: str, record: ProgressRecord) -> None:
        self._last[stage] = record
        if time.monotonic() - self._spoken[stage] >= _SECONDS_BETWEEN_LINES:
            self._spoken[stage] = time.monotonic()
            self.say(f"{stage}: {how_far(record)}")

    def end(self, stage: str, outcome: Outcome, seconds: float) -> None:
        self.say(end_line(stage, outcome, seconds, self._last.get(stage)))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class LiveDisplay:
    """One bar a running stage, drawn at each report (rich's own refresh thread stays off)."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

        name = TextColumn("{task.description}", markup=False)
        detail = TextColumn("{task.fields[detail]}", markup=False)
        self._bars = Progress(name, BarColumn(), MofNCompleteColumn(), detail, auto_refresh=False)
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, ProgressRecord] = {}

    def start(self, stage: str, detail: str) -> None:
        self._tasks[stage] = self._bars.add_task(stage, total=None, detail=detail)
        self._bars.refresh()

    def progress(self, stage: str, record: ProgressRecord) -> None:
        if self._last.get(stage) == record:
            return
        self._last[stage] = record
        self._bars.update(
            self._tasks[stage],
            description=f"{stage} {record.phase}",
            total=record.total,
            completed=record.done,
            detail=pace(record),
        )
        self._bars.refresh()

    def end(self, stage: str, outcome: Outcome, seconds: float) -> None:
        self._bars.remove_task(self._tasks.pop(stage))
        self._bars.refresh()
        self.say(end_line(stage, outcome, seconds, self._last.pop(stage, None)))

    def say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, emoji=False, highlight=False)
        self._bars.refresh()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()
