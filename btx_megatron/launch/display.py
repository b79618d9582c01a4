"""What a person sees of a run: a live bar a running stage, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
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


@dataclass
class Pace:
    """Speed within a phase, measured from the first report on, so that a resumed stage is not flattered."""

    first: ProgressRecord
    last: ProgressRecord

    @classmethod
    def follow(cls, before: Pace | None, record: ProgressRecord) -> Pace:
        """The pace with one report more; a new phase starts over."""
        same = before is not None and before.first.phase == record.phase
        return cls(before.first if before is not None and same else record, record)

    @property
    def rate(self) -> float | None:
        """Units a second; None until there is something to measure."""
        seconds, units = self.last.time - self.first.time, self.last.done - self.first.done
        return units / seconds if seconds > 0 and units > 0 else None

    @property
    def text(self) -> str:
        """``1.9/s, 1:08 left, loss 3.21``."""
        parts = []
        if self.rate:
            left = (self.last.total - self.last.done) / self.rate
            parts += [f"{self.rate:.3g}/s", f"{clock(left)} left"]
        return ", ".join([*parts, self.last.text] if self.last.text else parts)


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
        self._paces: dict[str, Pace] = {}
        self._spoken: dict[str, float] = {}

    def start(self, stage: str, detail: str) -> None:
        self._spoken[stage] = time.monotonic()
        self.say(f"{stage}: started ({detail})")

    def progress(self, stage: str, record: ProgressRecord) -> None:
        pace = self._paces[stage] = Pace.follow(self._paces.get(stage), record)
        if time.monotonic() - self._spoken[stage] >= _SECONDS_BETWEEN_LINES:
            self._spoken[stage] = time.monotonic()
            text = f", {pace.text}" if pace.text else ""
            self.say(f"{stage}: {record.phase} {record.done}/{record.total}{text}")

    def end(self, stage: str, outcome: Outcome, seconds: float) -> None:
        pace = self._paces.get(stage)
        self.say(end_line(stage, outcome, seconds, pace.last if pace else None))

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
        self._paces: dict[str, Pace] = {}

    def start(self, stage: str, detail: str) -> None:
        self._tasks[stage] = self._bars.add_task(stage, total=None, detail=detail)
        self._bars.refresh()

    def progress(self, stage: str, record: ProgressRecord) -> None:
        before = self._paces.get(stage)
        if before and before.last == record:
            return
        pace = self._paces[stage] = Pace.follow(before, record)
        self._bars.update(
            self._tasks[stage],
            description=f"{stage} {record.phase}",
            total=record.total,
            completed=record.done,
            detail=pace.text,
        )
        self._bars.refresh()

    def end(self, stage: str, outcome: Outcome, seconds: float) -> None:
        self._bars.remove_task(self._tasks.pop(stage))
        self._bars.refresh()
        pace = self._paces.pop(stage, None)
        self.say(end_line(stage, outcome, seconds, pace.last if pace else None))

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
