"""No orphans: a process that dies together with the one that started it.

``btx`` may be killed with SIGKILL, which nothing can catch. Linux then still delivers a signal that each
child asked for in advance (prctl PR_SET_PDEATHSIG), down the whole chain: btx, torchrun, rank, and the
helper processes of a rank. The request is not inherited, so each link must make its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

SUPERVISOR_VARIABLE = "BTX_SUPERVISOR_PID"
"""Environment variable by which a worker knows the supervisor that must be above it."""

_PR_SET_PDEATHSIG = 1
_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None) if _LINUX else None  # loaded here: a forked child must not load libraries


def die_with_parent() -> None:
    """Ask for SIGKILL when the process (strictly: the thread) that started this one ends. Linux only."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def before_exec() -> Callable[[], None]:
    """A ``preexec_fn``: as die_with_parent, and ends at once if the parent is gone already."""
    parent = os.getpid()

    def prepare_child() -> None:
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)

    return prepare_child


def die_if_orphaned() -> None:
    """End this worker if its supervisor went away before die_with_parent was in force.

    The supervisor is the parent, or (under torchrun) the parent's parent. Where the environment names no
    supervisor, as under Slurm, nothing is checked.
    """
    supervisor = int(os.environ.get(SUPERVISOR_VARIABLE, "0"))
    if _LINUX and supervisor and supervisor not in (os.getppid(), _parent_of(os.getppid())):
        os._exit(1)


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])  # the name, in brackets, may hold spaces
