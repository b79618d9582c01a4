"""No orphans: a process that dies together with the one that started it.

``btx`` may be killed with SIGKILL, which nothing can catch. Linux then still delivers a signal that each
child asked for in advance (prctl PR_SET_PDEATHSIG), down the whole chain: btx, torchrun, rank, and the
helper processes of a rank. The request is not inherited, so each link must make its own; and it comes too
late for a parent that died while the child was starting, so each link also looks whether it still has one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_GUARDIAN = "BTX_GUARDIAN_PID"
"""Environment variable: the process that must be this one's parent, or (under torchrun) grandparent."""

_PR_SET_PDEATHSIG = 1
_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None) if _LINUX else None  # loaded here: a forked child must not load libraries


def guardian_environment() -> dict[str, str]:
    """Variables for a child that calls die_with_guardian: this process is its guardian."""
    return {_GUARDIAN: str(os.getpid())}


def before_exec() -> Callable[[], None]:
    """A ``preexec_fn`` for a program that knows nothing of guardians, such as torchrun.

    It and what it starts ignore SIGUSR1 and SIGUSR2, which schedulers send to every process of a job: they
    are for the supervisor, and would kill a torchrun, which leaves its ranks behind.
    """
    parent = os.getpid()

    def prepare_child() -> None:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        _die_with_parent()
        if os.getppid() != parent:
            os._exit(1)

    return prepare_child


def die_with_guardian() -> None:
    """End with SIGKILL when the parent ends, or now if the guardian is gone; be the next one's guardian.

    Holds for processes forked from here on; a spawned one must call it itself. Where the environment
    names no guardian (as under Slurm) none is missed. Linux only.
    """
    _take_guardian()
    os.register_at_fork(after_in_child=_take_guardian)


def _take_guardian() -> None:
    _die_with_parent()
    guardian = int(os.environ.get(_GUARDIAN, "0"))
    if _LINUX and guardian and guardian not in (os.getppid(), _parent_of(os.getppid())):
        os._exit(1)
    os.environ |= guardian_environment()


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # the name, in brackets, may hold spaces
