"""How a stage ended, as its worker says: one file in the work folder.

torchrun's exit code does not tell a wrong corpus from a crash (every failure of a rank becomes 1), so the
ranks write what happened and the supervisor believes the files: ``result.json`` (done), ``stopped.json``
(saved after a request to stop), ``error-RANK.json`` (the exception). None of them: the worker was killed.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from btx_megatron.durable import replace_file
from btx_megatron.errors import EXIT_FAILURE, EXIT_USER_ERROR, StageFailed, UserError

RESULT_FILE = "result.json"
STOPPED_FILE = "stopped.json"


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    kind: Literal["done", "stopped", "failed", "user_error"]
    message: str = ""
    """One line; empty when done."""
    result: dict[str, Any] = field(default_factory=dict)
    """What the worker returned, when done."""


def write_result(work_folder: Path, result: dict[str, Any]) -> None:
    """The stage is done; rank 0 alone writes this."""
    replace_file(work_folder / RESULT_FILE, json.dumps(result))


def write_stopped(work_folder: Path) -> None:
    """The stage saved what it needs to go on; rank 0 alone writes this."""
    replace_file(work_folder / STOPPED_FILE, "{}")


def write_error(work_folder: Path, rank: int, exit_code: int, message: str) -> None:
    """A rank failed; each rank has a file of its own, so that none waits for or overwrites another."""
    content = {"exit_code": exit_code, "message": message, "rank": rank, "time": time.time()}
    replace_file(work_folder / f"error-{rank}.json", json.dumps(content))


def clear_outcome(work_folder: Path) -> None:
    """Forget how an earlier attempt ended."""
    for path in _outcome_files(work_folder):
        path.unlink()


def read_outcome(work_folder: Path) -> Outcome | None:
    """How the stage ended, or None if its worker left no word."""
    errors = [told for path in work_folder.glob("error-*.json") if (told := _read(path))]
    if errors:
        return _first_cause(errors)
    if (result := _read(work_folder / RESULT_FILE)) is not None:
        return Outcome("done", result=result)
    return Outcome("stopped") if (work_folder / STOPPED_FILE).exists() else None


def _read(path: Path) -> dict[str, Any] | None:
    """None where it is not there, was published a moment ago, or a crash of the machine has left it empty."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def error_line(error: BaseException) -> tuple[int, str]:
    """Exit code and the one line that says what an exception is."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | StageFailed):
        return error.exit_code, text
    return EXIT_FAILURE, f"{type(error).__name__}: {text}"


def _first_cause(errors: list[dict[str, Any]]) -> Outcome:
    """A user's mistake, of the lowest rank that saw it; else the earliest failure.

    When one rank fails the others fail soon after, with "connection closed" and the like.
    """
    mistakes = [error for error in errors if error["exit_code"] == EXIT_USER_ERROR]
    if mistakes:
        return Outcome("user_error", min(mistakes, key=lambda error: error["rank"])["message"])
    return Outcome("failed", min(errors, key=lambda error: error["time"])["message"])


def _outcome_files(work_folder: Path) -> list[Path]:
    fixed = [work_folder / RESULT_FILE, work_folder / STOPPED_FILE]
    return [path for path in fixed if path.exists()] + list(work_folder.glob("error-*.json"))
