"""The one process that signals reach: it starts the stages' processes, watches them, and passes a stop on.

Each stage runs in a session of its own, so Ctrl-C in the terminal reaches the supervisor alone. On SIGINT,
SIGTERM, SIGUSR1, SIGUSR2 or SIGHUP (unless started with nohup) it asks every stage that can save to do so,
kills the others, and waits; a second Ctrl-C kills all at once. A stage whose ranks stand still for too long
is killed, too, with a word on which rank it was. There are no threads: a child's parent-death signal
(runtime/parent.py) is tied to the thread that started it, and forking beside threads is how programs hang.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from btx_megatron.runtime.heartbeat import HangWatch, clear_beats
from btx_megatron.runtime.outcome import Outcome, clear_outcome, read_outcome
from btx_megatron.runtime.parent import before_exec, guardian_environment
from btx_megatron.runtime.progress import PROGRESS_FILE
from btx_megatron.runtime.stop import clear_stop, request_stop
from btx_megatron.runtime.stopwatch import Stopwatch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_KILL_PATIENCE_SECONDS = 30.0
_LOG_TAIL_BYTES = 20_000
_CAUSE = re.compile(
    r"(?!.*ChildFailedError)[\w.]*(Error|Exception|Exit)\b.*|.*(Signal \d+ .* received by PID).*"
    r"|srun: error: Unable to create step .*"
)


@dataclass(frozen=True)
class Command:
    """What runs a stage."""

    arguments: list[str]
    """Program and arguments."""
    environment: dict[str, str]
    """Variables set on top of this process's own."""
    work_folder: Path
    """Where its outcome, progress and stop request lie."""
    log: Path
    """Output and errors are appended to it."""
    can_stop: bool
    """True: it looks for a stop request and saves. False: it is killed and starts over."""
    timeout_seconds: float | None = None
    """Once its ranks say how far they are (runtime/heartbeat.py): how long they may stand still; None: for
    ever."""


class _Child:
    """A running stage."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.told_to_stop = False
        self.hang: str | None = None
        timeout = command.timeout_seconds
        self._hang_watch = HangWatch(command.work_folder, timeout) if timeout is not None else None
        self.stopwatch = Stopwatch(command.work_folder)
        with command.log.open("ab") as log:
            log.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} ---\n".encode())
            log.flush()
            self.log_start = log.tell()
            self.process = subprocess.Popen(
                command.arguments,
                env=os.environ | command.environment | guardian_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before_exec(),
            )

    def stop(self) -> None:
        """Ask it to save and end, or end it."""
        self.told_to_stop = True
        if self.command.can_stop:
            request_stop(self.command.work_folder)
        else:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to its session; a torchrun's ranks, in sessions of their own, die with their parent."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def end_if_it_hangs(self) -> None:
        """Kill it once its ranks have stood still for too long, and keep who is to blame."""
        if self._hang_watch and not self.hang:
            self.hang = self._hang_watch.look()
            if self.hang:
                self.kill()

    def outcome(self, killed: bool) -> Outcome:
        """How it ended. Its files come first: torchrun's exit code tells little."""
        if self.hang:
            return Outcome("failed", self.hang)
        left = read_outcome(self.command.work_folder)
        interrupted = self.told_to_stop and (killed or not self.command.can_stop)
        if interrupted and (left is None or left.kind != "done"):
            return Outcome("stopped")
        return left or Outcome("failed", self._unexplained_end())

    def _unexplained_end(self) -> str:
        with self.command.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_start, size - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        causes = [line for line in lines if _CAUSE.fullmatch(line)]
        code = self.process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{causes[-1] if causes else 'ended without a word'} ({how})"


class Supervisor:
    """Context manager: takes the signals, and leaves no process behind."""

    def __init__(self) -> None:
        self._children: dict[str, _Child] = {}
        self._signals: list[int] = []
        self._killed = False
        self._handlers: dict[int, Any] = {}

    @property
    def running(self) -> dict[str, Command]:
        """The stages under way."""
        return {name: child.command for name, child in self._children.items()}

    @property
    def stop_signal(self) -> str | None:
        """Name of the signal that asked to stop, or None."""
        return signal.Signals(self._signals[0]).name if self._signals else None

    @property
    def killed(self) -> bool:
        """True after a second Ctrl-C: what ran was not given time to save."""
        return self._killed

    def start(self, name: str, command: Command) -> None:
        """Start a stage; what an earlier attempt left of outcome, progress and stop request is forgotten."""
        clear_outcome(command.work_folder)
        clear_stop(command.work_folder)
        clear_beats(command.work_folder)
        (command.work_folder / PROGRESS_FILE).unlink(missing_ok=True)
        self._children[name] = _Child(command)

    def poll(self) -> dict[str, tuple[Outcome, float]]:
        """Pass signals on; returns outcome and seconds (of all attempts) of the stages that ended since."""
        self._pass_signals_on()
        ended: dict[str, tuple[Outcome, float]] = {}
        for name, child in list(self._children.items()):
            if child.process.poll() is None:
                child.stopwatch.tick()
                child.end_if_it_hangs()
                continue
            del self._children[name]
            child.stopwatch.save()
            ended[name] = child.outcome(self._killed), child.stopwatch.seconds
        return ended

    def _pass_signals_on(self) -> None:
        if not self._signals:
            return
        if not self._killed and signal.SIGINT in self._signals[1:]:
            self._killed = True
            for child in self._children.values():
                child.told_to_stop = True
                child.kill()
        for child in self._children.values():
            if not child.told_to_stop:
                child.stop()

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started with nohup: the terminal may go
            self._handlers[number] = signal.signal(number, self._note_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in self._children.values():
            child.kill()
            child.process.wait(_KILL_PATIENCE_SECONDS)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
