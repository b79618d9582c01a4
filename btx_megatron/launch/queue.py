"""What Slurm says of jobs: squeue where it still knows them, sacct where there is one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from btx_megatron.errors import UserError

_ALIVE = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "STAGE_OUT"),
)


@dataclass(frozen=True)
class JobState:
    """One job as Slurm sees it."""

    state: str
    """``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED``, ..."""
    reason: str = ""
    """Why it waits, or ended."""
    restarts: int = 0
    nodes: str = ""

    def __str__(self) -> str:
        """``RUNNING on n[1-2]``, ``PENDING (Dependency)``, ``RUNNING on n3, restarted 2 times``."""
        detail = f" on {self.nodes}" if self.state == "RUNNING" else ""
        if self.state != "RUNNING" and self.reason:
            detail = f" ({self.reason})"
        times = {0: "", 1: ", restarted once"}.get(self.restarts, f", restarted {self.restarts} times")
        return f"{self.state}{detail}{times}"

    @property
    def alive(self) -> bool:
        """Whether it runs or may still run."""
        return self.state in _ALIVE


def run_slurm(arguments: list[str]) -> str:
    """Output of a command of Slurm. Raises UserError where it is missing, or with its own message.

    Variables of a job that this process may itself run in stay here: they would become the other's.
    """
    ours = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM_", "BTX_"))}
    try:
        done = subprocess.run(
            arguments, env=ours, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"{arguments[0]}: not found; run this where Slurm is, or use btx run on this machine"
        ) from None
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{arguments[0]}: {why}")
    return done.stdout


def job_states(ids: Collection[int]) -> dict[int, JobState]:
    """The states of those jobs that Slurm still knows; a job that ended long ago is missing."""
    if not ids:
        return {}
    known = {number: state for number, state in _from_squeue(_squeue()) if number in ids}
    lost = sorted(set(ids) - set(known))
    return known | (_from_sacct(lost) if lost else {})


def _squeue() -> Any:
    try:
        return json.loads(run_slurm(["squeue", "--json", "--states=all"]))
    except ValueError:
        raise UserError("squeue --json: no JSON; Slurm 21.08 or later is needed") from None


def _from_squeue(told: Any) -> list[tuple[int, JobState]]:
    """The form of the JSON changes from version to version: states are words or lists of them."""
    found = []
    for job in told["jobs"]:
        states = job["job_state"]
        # of FAILED and COMPLETING the second says that its processes may still be there
        state = states if isinstance(states, str) else "COMPLETING" if "COMPLETING" in states else states[0]
        reason = job.get("state_reason") or ""
        restarts = _number(job.get("restart_cnt", 0))
        nodes = job.get("nodes") or ""
        shown = reason if reason != "None" else ""
        found.append((_number(job["job_id"]), JobState(state, shown, restarts, str(nodes))))
    return found


def _number(value: Any) -> int:
    return int(value["number"] if isinstance(value, dict) else value or 0)


def _from_sacct(ids: list[int]) -> dict[int, JobState]:
    command = ["sacct", "-X", "--noheader", "--parsable2", "--format=JobIDRaw,State,NodeList"]
    try:
        told = run_slurm([*command, f"--jobs={','.join(map(str, ids))}"])
    except UserError:  # clusters without accounting have none
        return {}
    rows = (line.split("|") for line in told.splitlines())
    told_of = {int(row[0]): JobState(row[1].split()[0], nodes=row[2]) for row in rows if row[0].isdigit()}
    # what squeue does not know does not run, whatever the accounting has missed
    return {number: state for number, state in told_of.items() if not state.alive}
