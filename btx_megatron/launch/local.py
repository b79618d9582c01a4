"""The pipeline on this machine: each stage in processes of its own, side by side as far as it allows.

Every training stage has its own ranks, so that nothing of one expert (memory, threads, a crash, its
parallel layout) reaches another. A stage that fails stops what needs it and nothing else.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import btx_megatron
from btx_megatron.errors import StageFailed, Stopped, UserError
from btx_megatron.job import JOB_FILE, LAUNCH_FILES, LOG_FILE, PASSING_FILES, Job, read_job, write_job
from btx_megatron.launch.allocation import this_allocation
from btx_megatron.launch.display import Display, make_display
from btx_megatron.launch.machine import Machine, this_machine
from btx_megatron.manifest import make_manifest
from btx_megatron.pipeline import PipelineStage, input_fingerprints, stages_of, stages_to_run
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import recipe_to_dict
from btx_megatron.run_folder import RunFolder
from btx_megatron.runtime.cores import ALONE
from btx_megatron.runtime.outcome import Outcome
from btx_megatron.runtime.progress import read_progress
from btx_megatron.runtime.supervisor import Command, Supervisor

_SECONDS_BETWEEN_POLLS = 0.1


def run_pipeline(
    recipe: Recipe, machine: Machine | None = None, measured: dict[str, Any] | None = None
) -> None:
    """Run all stages that are not finished, in the recipe's run folder, on this (or the given) machine.

    ``measured``: row -> what the evaluation takes as it is (``Job.measured``).
    Raises UserError, StageFailed (after everything that could go on has), or Stopped.
    """
    _run(recipe, {"report", "export"}, machine or this_machine(recipe.launch.device), measured=measured)


def run_stages(
    recipe: Recipe, names: Collection[str], again: bool = False, machine: Machine | None = None
) -> None:
    """Run the named stages alone, where they are not finished (``again``: even if). Raises as run_pipeline.

    A stage whose inputs are not finished is refused. In a job of Slurm it runs on that job's nodes.
    """
    known = [stage.name for stage in stages_of(recipe)]
    for name in names:
        if name not in known:
            raise UserError(f"no stage '{name}'; the recipe has {', '.join(known)}")
    machine = machine or this_allocation(recipe) or this_machine(recipe.launch.device)
    _run(recipe, names, machine, alone=True, again=again)


def _run(
    recipe: Recipe,
    targets: Collection[str],
    machine: Machine,
    alone: bool = False,
    again: bool = False,
    measured: dict[str, Any] | None = None,
) -> None:
    run = RunFolder(recipe.run_folder)
    with Supervisor() as supervisor, run.claim(recipe):  # signals are heard from here on
        stages = stages_to_run(stages_of(recipe), run, targets)
        if alone:
            stages = _alone(stages_of(recipe) if again else stages, run, targets)
        if stages:
            machine.check_packages(recipe, stages)
            machine.check_accelerator(recipe, stages)
            if any(stage.task == "import" for stage in stages):
                from btx_megatron.mixing.pretrained import check_pretrained

                check_pretrained(recipe)
            machine.check(stages)
        with make_display() as display:
            if not stages:
                gone = "" if alone else _what_is_gone(recipe, run)
                display.say(f"nothing to do: finished already, in {run.path}{gone}")
            local = _LocalRun(recipe, run, machine, supervisor, display, measured or {})
            local.work_off(stages, again=set(targets) if again else set())


def _what_is_gone(recipe: Recipe, run: RunFolder) -> str:
    """Stages that somebody took away after the report was written from them."""
    gone = [stage.name for stage in stages_of(recipe) if run.manifest(stage.name) is None]
    if not gone:
        return ""
    return f" (no longer there: {', '.join(gone)}; to make them again, delete what was made from them, too)"


def _alone(stages: list[PipelineStage], run: RunFolder, targets: Collection[str]) -> list[PipelineStage]:
    chosen = [stage for stage in stages if stage.name in targets]
    for stage in chosen:
        input_fingerprints(stage, run)  # refuses what lacks an input
    return chosen


class _LocalRun:
    """Starts stages as their inputs and the machine allow, and publishes those that end well."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        machine: Machine,
        supervisor: Supervisor,
        display: Display,
        measured: dict[str, Any],
    ) -> None:
        self.recipe, self.run, self.machine = recipe, run, machine
        self.supervisor, self.display, self.measured = supervisor, display, measured
        self.waiting: list[PipelineStage] = []
        self.made_anew: set[str] = set()
        self.jobs: dict[str, Job] = {}
        self.locks: dict[str, IO[str]] = {}
        self.cores_used: dict[str, int] = {}
        self.gpus_used: dict[str, tuple[str, ...]] = {}
        self.bad_ends: dict[str, Outcome] = {}
        self.told_of_stop = False

    def work_off(self, stages: list[PipelineStage], again: set[str]) -> None:
        """Run the stages, ``again`` even if they are finished; returns when none is left, raises what
        run_pipeline says."""
        self.waiting = list(stages)
        self.made_anew = again
        self._start_what_fits()
        while self.supervisor.running:
            time.sleep(_SECONDS_BETWEEN_POLLS)
            ended = self.supervisor.poll()
            for name, (outcome, seconds) in ended.items():
                self._end(name, outcome, seconds)
            if ended and not self.supervisor.stop_signal:
                self._start_what_fits()
            self._show_progress()
        self._raise_bad_end()

    # starting

    def _start_what_fits(self) -> None:
        chosen: list[PipelineStage] = []
        for stage in self.waiting:
            if self._has_inputs(stage) and self._fits(stage, chosen):
                chosen.append(stage)
        threads = self._threads(chosen)
        overtaken = False
        for stage in chosen:
            self.waiting.remove(stage)
            try:
                self.locks[stage.name] = self.run.lock(stage.name, self.machine.lock_patience_seconds)
                if self.run.manifest(stage.name) and stage.name not in self.made_anew:
                    self.display.say(f"{stage.name}: finished by another btx")
                    self._unlock(stage.name)
                    overtaken = True
                else:
                    self._start(stage, threads)
            except UserError as error:  # of this stage alone: the others go on
                self._unlock(stage.name)
                self.bad_ends[stage.name] = Outcome("user_error", str(error))
        if overtaken:
            self._start_what_fits()  # what waited for it

    def _has_inputs(self, stage: PipelineStage) -> bool:
        return all(self.run.manifest(name) for name in stage.inputs)

    def _fits(self, stage: PipelineStage, chosen: list[PipelineStage]) -> bool:
        names = [*self.supervisor.running, *(other.name for other in chosen)]
        if not names:
            return True  # a stage of more ranks than cores runs too, alone
        limit = self.recipe.launch.max_parallel_experts
        experts = sum(name.startswith("expert:") for name in names)
        if stage.name.startswith("expert:") and limit and experts >= limit:
            return False
        cores = self._free_cores() - sum(self._least_cores(other) for other in chosen)
        gpus = len(self._free_gpus()) - sum(self.machine.gpus_of(other) for other in chosen)
        return self._least_cores(stage) <= cores and self.machine.gpus_of(stage) <= gpus

    def _least_cores(self, stage: PipelineStage) -> int:
        return stage.ranks * max(1, self.recipe.launch.threads_per_rank)

    def _free_cores(self) -> int:
        return self.machine.cores - sum(self.cores_used.values())

    def _free_gpus(self) -> list[str]:
        used = {gpu for gpus in self.gpus_used.values() for gpu in gpus}
        return [gpu for gpu in self.machine.gpus if gpu not in used]

    def _threads(self, chosen: list[PipelineStage]) -> int:
        """CPU threads of a rank: as the recipe says, or the free cores shared out over the new ranks."""
        ranks = max(1, sum(stage.ranks for stage in chosen))
        return self.recipe.launch.threads_per_rank or max(1, self._free_cores() // ranks)

    def _start(self, stage: PipelineStage, threads: int) -> None:
        gpus = tuple(self._free_gpus()[: self.machine.gpus_of(stage)])
        job = self._prepare_work(stage)
        self.jobs[stage.name] = job
        self.cores_used[stage.name] = stage.ranks * threads
        self.gpus_used[stage.name] = gpus
        command = Command(
            arguments=self.machine.command(stage, write_job(job)),
            environment=_environment(threads, stage) | self.machine.environment(gpus),
            work_folder=job.work_folder,
            log=job.work_folder / LOG_FILE,
            can_stop=stage.task == "train",
            timeout_seconds=_timeout(self.recipe, stage),
        )
        self.display.start(stage.name, _detail(self.recipe, stage))
        self.supervisor.start(stage.name, command)

    def _prepare_work(self, stage: PipelineStage) -> Job:
        """Make the work folder, or take the one of an attempt before; mixing and the like begin anew."""
        work = self.run.work(stage.name)
        work.mkdir(parents=True, exist_ok=True)
        inputs = input_fingerprints(stage, self.run)
        if stage.task not in ("train", "prepare"):  # these two go on
            _empty(work)
        elif (work / JOB_FILE).exists() and read_job(work / JOB_FILE).inputs != inputs:
            raise UserError(
                f"{work} was begun from another {', '.join(stage.inputs)} than lies in {self.run.path} now; "
                "delete it to begin anew"
            )
        measured = self.measured if stage.task == "evaluate" else {}
        return Job(stage.task, stage.name, self.recipe, self.run.path, work, inputs, measured)

    # watching and ending

    def _show_progress(self) -> None:
        if self.supervisor.stop_signal and not self.told_of_stop:
            self.told_of_stop = True
            saves = any(command.can_stop for command in self.supervisor.running.values())
            how = "saving; Ctrl-C now stops without saving" if saves else "stopping"
            self.display.say(f"{self.supervisor.stop_signal}: {how}")
        for name, command in self.supervisor.running.items():
            record = read_progress(command.work_folder)
            if record:
                self.display.progress(name, record)

    def _end(self, name: str, outcome: Outcome, seconds: float) -> None:
        job = self.jobs.pop(name)
        del self.cores_used[name], self.gpus_used[name]
        record = read_progress(job.work_folder)
        if record:
            self.display.progress(name, record)
        if outcome.kind == "done":
            self._publish(job, outcome.result, seconds)
        else:
            self.bad_ends[name] = outcome
        self._unlock(name)
        self.display.end(name, outcome, seconds)

    def _unlock(self, name: str) -> None:
        lock = self.locks.pop(name, None)
        if lock:
            lock.close()

    def _publish(self, job: Job, result: dict[str, Any], seconds: float) -> None:
        for name in PASSING_FILES:
            (job.work_folder / name).unlink(missing_ok=True)
        manifest = make_manifest(
            stage=job.stage,
            recipe=recipe_to_dict(job.recipe),
            inputs=job.inputs,
            outputs=result["outputs"],
            tokens=result.get("tokens"),
            duration_seconds=seconds,
            versions=result.get("versions"),
        )
        self.run.publish(manifest)

    def _raise_bad_end(self) -> None:
        failed = {name: end for name, end in self.bad_ends.items() if end.kind == "failed"}
        mistakes = [end.message for end in self.bad_ends.values() if end.kind == "user_error"]
        if failed:
            lines = [
                f"stage {name} failed: {end.message}; log: {self.run.work(name) / LOG_FILE}"
                for name, end in failed.items()
            ]
            raise StageFailed("\n".join(lines + mistakes))
        if mistakes:
            raise UserError("\n".join(mistakes))
        if self.bad_ends or self.waiting:
            by = f" by {self.supervisor.stop_signal}" if self.supervisor.stop_signal else ""
            how = "goes on from the last checkpoint" if self.supervisor.killed else "goes on where it was"
            raise Stopped(f"stopped{by}; the same command {how}")


def _timeout(recipe: Recipe, stage: PipelineStage) -> float | None:
    if stage.task != "train":
        return None
    return 60 * recipe.stage(stage.name).training.distributed_timeout_minutes


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.name in LAUNCH_FILES:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _environment(threads: int, stage: PipelineStage) -> dict[str, str]:
    package_parent = str(Path(btx_megatron.__file__).parents[1])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    alone = ALONE if stage.ranks == 1 else {}  # else torchrun tells it
    return alone | {
        "OMP_NUM_THREADS": str(threads),
        # threads that spin while they wait bring two runs on the same cores to a tenth of their speed
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        "PYTHONPATH": os.pathsep.join(paths),  # the very code that runs here, installed or not
        "PYTHONUNBUFFERED": "1",
    }


def _detail(recipe: Recipe, stage: PipelineStage) -> str:
    if stage.task == "train":
        return str(recipe.stage(stage.name).layout)
    return str(recipe.evaluate.layout) if stage.task == "evaluate" else "1 process"
