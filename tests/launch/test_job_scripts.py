"""What a job's script does with how ``btx`` ends: requeue, give up, or neither."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Job:
    """expert.sbatch in a run folder, with a shell script for btx and another for scontrol."""

    def __init__(self, folder: Path, btx: str, scontrol: str = "exit 0") -> None:
        scripts = folder / "run" / "slurm" / "scripts"
        scripts.mkdir(parents=True)
        self.folder = folder
        self.tracker = folder / "run" / ".work/experts/math/checkpoints/latest_checkpointed_iteration.txt"
        self.tracker.parent.mkdir(parents=True)
        self.tracker.write_text("100")
        for name in ("common.sh", "expert.sbatch"):
            (scripts / name).write_text((ROOT / "slurm" / name).read_text())
        self._program("btx", f"tracker={self.tracker}; {btx}")
        self._program("scontrol", f'echo "$@" >> {folder}/asked; {scontrol}')
        lines = [f"export BTX_SUPERVISOR_PYTHON={folder}/btx", "export BTX_MAX_RESTARTS=3"]
        (scripts / "environment.sh").write_text("\n".join([*lines, "export BTX_SECONDS_BETWEEN_TRIES=0"]))
        self.process: subprocess.Popen[str] | None = None

    def _program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def start(self, restarts: int = 0) -> None:
        environment = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        command = ["bash", "slurm/scripts/expert.sbatch", str(self.folder / "run"), "expert:math"]
        self.process = subprocess.Popen(
            command, cwd=self.folder / "run", env=environment, text=True, stdout=subprocess.PIPE
        )

    def tell(self, *signals: signal.Signals) -> None:
        """Once btx has begun, one after the other."""
        assert self.process
        deadline = time.monotonic() + 10
        while not (self.folder / "run" / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.2)

    def end(self) -> tuple[int, bool, str]:
        """Exit code, whether it asked to be put back into the queue, and what it said."""
        assert self.process
        told, _ = self.process.communicate(timeout=20)
        asked = self.folder / "asked"
        return self.process.returncode, asked.exists() and "requeue 7" in asked.read_text(), told


SAVES = (
    "trap 'echo 120 > $tracker; exit 75' USR1 TERM; touch begun; for ((i=0;i<200;i++)); do sleep 0.05; done"
)
"""A btx that saves when it is told to."""


@pytest.mark.parametrize(
    ("btx", "code", "requeued"),
    [
        ("exit 0", 0, False),
        ("exit 2", 2, False),
        ("exit 1", 1, False),  # it got no further: the next start would fail, too
        ("echo 110 > $tracker; exit 1", 1, True),
        ("echo 110 > $tracker; kill -9 $$", 137, True),
        ("echo 110 > $tracker; exit 2", 2, False),  # the user's mistake
        ("exit 75", 75, False),  # stopped by hand
    ],
)
def test_ends(tmp_path: Path, btx: str, code: int, requeued: bool) -> None:
    job = Job(tmp_path, btx)
    job.start()
    assert job.end()[:2] == (code, requeued)


def test_the_time_is_up(tmp_path: Path) -> None:
    job = Job(tmp_path, SAVES)
    job.start()
    job.tell(signal.SIGUSR1)
    code, requeued, told = job.end()
    assert (code, requeued) == (75, True)
    assert "saved; back into the queue" in told


def test_a_btx_that_cannot_hear_yet(tmp_path: Path) -> None:
    job = Job(tmp_path, "touch begun; sleep 5 & wait")  # USR1 ends it
    job.start()
    job.tell(signal.SIGUSR1)
    assert job.end()[:2] == (138, True)


def test_cancelled_jobs_do_not_come_back(tmp_path: Path) -> None:
    job = Job(tmp_path, SAVES.replace("exit 75", "sleep 0.6; exit 75"))
    job.start()
    job.tell(signal.SIGUSR1, signal.SIGTERM)  # the cancel comes while it saves because the time is up
    assert job.end()[:2] == (75, False)


def test_a_controller_that_is_away_is_asked_again(tmp_path: Path) -> None:
    job = Job(tmp_path, SAVES, scontrol=f"(($(wc -l < {tmp_path}/asked) > 2))")
    job.start()
    job.tell(signal.SIGUSR1)
    assert job.end()[1]
    assert (tmp_path / "asked").read_text().count("requeue") == 3


def test_restarts_come_to_an_end(tmp_path: Path) -> None:
    job = Job(tmp_path, SAVES)
    job.start(restarts=3)
    job.tell(signal.SIGUSR1)
    code, requeued, told = job.end()
    assert (code, requeued) == (1, False)
    assert "restarted 3 times (slurm.max_restarts); submit again" in told
