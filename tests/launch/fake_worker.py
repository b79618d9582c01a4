"""The real worker with other tasks: what each stage does is told by the variable FAKE (JSON by stage).

Only the supervisor's mechanics are tested with it; what the real tasks do is tested elsewhere.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from btx_megatron.errors import Stopped, UserError
from btx_megatron.job import Job
from btx_megatron.launch import worker
from btx_megatron.launch.machine import Machine
from btx_megatron.runtime.parent import die_with_guardian
from btx_megatron.runtime.progress import Progress
from btx_megatron.runtime.stop import stop_requested


def behave(job: Job) -> dict[str, Any]:
    """Steps of 20 ms; the number reached is the checkpoint."""
    behaviour = json.loads(os.environ.get("FAKE", "{}")).get(job.stage, {})
    _note_pids(job, behaviour)
    if "crash" in behaviour:
        raise RuntimeError(behaviour["crash"])
    if "mistake" in behaviour:
        raise UserError(behaviour["mistake"])
    if "kill" in behaviour:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(60)
    steps = _train(job, behaviour) if job.task == "train" else _work(behaviour)
    return {"outputs": {"made": f"{job.stage} {steps}"}, "tokens": steps if job.task == "train" else None}


def _note_pids(job: Job, behaviour: dict[str, Any]) -> None:
    pids = [os.getpid()]
    if behaviour.get("children"):
        for method in ("spawn", "fork"):
            child = multiprocessing.get_context(method).Process(target=time.sleep, args=(60,))
            child.start()
            pids.append(child.pid or 0)
    path = job.work_folder / f"pids-{os.environ.get('RANK', '0')}.json"
    path.with_suffix(".tmp").write_text(json.dumps(pids))
    path.with_suffix(".tmp").rename(path)


def _train(job: Job, behaviour: dict[str, Any]) -> int:
    job.checkpoints.mkdir(exist_ok=True)
    saved, total = job.checkpoints / "step", behaviour.get("steps", 2)
    step = int(saved.read_text()) if saved.exists() else 0
    with (job.work_folder / "attempts.txt").open("a") as file:
        file.write(f"{step} {time.time()}\n")
    progress = Progress(job.work_folder)
    while step < total and not (job.work_folder / "enough").exists():
        time.sleep(0.02)
        step += 1
        progress.update("training", step, total, "loss 1.0")
        if behaviour.get("deaf"):
            continue
        saved.with_suffix(".tmp").write_text(str(step))
        saved.with_suffix(".tmp").rename(saved)  # it may be killed between opening and writing
        if stop_requested(job.work_folder):
            raise Stopped("saved")
    if "crash_after" in behaviour:
        raise RuntimeError("no such luck")
    (job.work_folder / "ended").write_text(str(time.time()))
    return step


def _work(behaviour: dict[str, Any]) -> int:
    time.sleep(behaviour.get("seconds", 0))
    return 1


class FakeMachine(Machine):
    """A stage as one process, without torchrun."""

    def command(self, stage: Any, job_file: Path) -> list[str]:
        return [sys.executable, __file__, str(job_file)]


class TorchrunMachine(Machine):
    """A stage as `btx` runs it, but with this worker."""

    def command(self, stage: Any, job_file: Path) -> list[str]:
        real = super().command(stage, job_file)
        at = real.index("btx_megatron.launch.worker")
        return [*real[: at - 1], __file__, *real[at + 1 :]]


if __name__ in ("__main__", "__mp_main__"):
    die_with_guardian()

if __name__ == "__main__":
    for task in worker._TASKS:
        worker._TASKS[task] = behave
    sys.exit(worker.main())
