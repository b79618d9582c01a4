"""The request to stop: a file in a stage's work folder.

torchrun handles signals in ways that lose work (SIGUSR1 kills it and orphans its workers, SIGTERM gives
them 30 seconds, and every exit code becomes 1). So signals end at the supervisor, which writes this file;
rank 0 looks for it at the end of a step and tells the others, and all save the same step.
"""

from __future__ import annotations

from pathlib import Path

STOP_FILE = "stop"


def request_stop(work_folder: Path) -> None:
    """Ask the stage that works in this folder to save and end."""
    (work_folder / STOP_FILE).touch()


def stop_requested(work_folder: Path) -> bool:
    """True once somebody asked; a stat of one file, cheap enough for every step."""
    return (work_folder / STOP_FILE).exists()


def clear_stop(work_folder: Path) -> None:
    """Forget an old request, before the stage starts again."""
    (work_folder / STOP_FILE).unlink(missing_ok=True)
