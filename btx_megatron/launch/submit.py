"""The pipeline as a graph of Slurm jobs: one a stage, each started when those that it needs have ended well.

    RUN/slurm/scripts/   the sbatch scripts as they were sent, environment.sh, and submit.sh: the same by hand
    RUN/slurm/code/      the package as it was when the run was submitted, with its commit
    RUN/slurm/logs/      output of each stage's job
    RUN/slurm/jobs.json  the job of each stage

What is finished is not submitted, what waits or runs is left alone: the same command repairs a graph that a
failure has cut.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import btx_megatron
from btx_megatron.durable import write_durably
from btx_megatron.errors import UserError
from btx_megatron.evaluation.tasks import check_documents
from btx_megatron.launch.queue import JobState, job_states, run_slurm
from btx_megatron.launch.sbatch import JobRequest, job_request
from btx_megatron.manifest import code_commit
from btx_megatron.pipeline import stages_of, stages_to_run
from btx_megatron.recipe import Recipe
from btx_megatron.run_folder import RunFolder

_PACKAGE = Path(btx_megatron.__file__).parent


@dataclass(frozen=True)
class SubmittedJob:
    """A stage's job, as jobs.json keeps it."""

    id: int
    after: tuple[int, ...]
    """Jobs that it waits for."""
    submitted: str
    nodes: str = ""
    """``2 nodes x 8``; empty where it is not known."""


def slurm_folder(run: RunFolder) -> Path:
    """Where all that belongs to Slurm lies."""
    return run.path / "slurm"


def read_jobs(run: RunFolder) -> dict[str, SubmittedJob]:
    """The last job of each stage. Raises UserError for a file that is broken."""
    path = slurm_folder(run) / "jobs.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            stage: SubmittedJob(
                int(job["id"]), tuple(job["after"]), str(job["submitted"]), str(job.get("nodes", ""))
            )
            for stage, job in content.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: broken; delete it once none of its jobs is queued (squeue --me)") from None


def submit(
    recipe: Recipe, only: Collection[str] = (), dry_run: bool = False, update_code: bool = False
) -> list[str]:
    """Send what is not finished and not queued; returns lines that tell of each stage.

    ``only``: these stages alone. ``dry_run``: write scripts, code and submit.sh, and send nothing. Raises
    UserError for a task's file that cannot be read, for a stage that is none, or needs one that is neither
    finished nor queued, and where a dry run or new code would change what jobs read that are there.
    """
    for task in recipe.evaluate.tasks:
        check_documents(task, recipe.evaluate.execute_code)
    run = RunFolder(recipe.run_folder)
    names = [stage.name for stage in stages_of(recipe)]
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: no such stage; the recipe has {', '.join(names)}")
    _check_left_alone(run, dry_run, update_code)
    with run.claim(recipe), run.lock("submit"):
        lines = _freeze(recipe, slurm_folder(run), update_code)
        requests = _requests(recipe, run, only)
        _write_submit_script(requests, run)
        if dry_run:
            return [*lines, *_dry_run_lines(requests, run)]
        submission = _Submission(run, requests)
        return [*lines, *submission.cancel_all_but(names), *submission.send()]


def _check_left_alone(run: RunFolder, dry_run: bool, update_code: bool) -> None:
    jobs = read_jobs(run) if dry_run or update_code else {}
    states = job_states([job.id for job in jobs.values()])
    alive = {
        stage: states[job.id] for stage, job in jobs.items() if job.id in states and states[job.id].alive
    }
    if dry_run and alive:
        raise UserError(
            f"--dry-run: {run.path} has jobs ({', '.join(alive)}), which would read what it writes; see "
            "btx status, or give another run_folder"
        )
    running = [stage for stage, state in alive.items() if state.state != "PENDING"]
    if running:
        raise UserError(
            f"--update-code: {', '.join(running)} is running by the old code; wait for it, or btx cancel"
        )


def _requests(recipe: Recipe, run: RunFolder, only: Collection[str]) -> list[JobRequest]:
    stages = stages_to_run(stages_of(recipe), run, set(only) or {"report", "export"})
    chosen = [stage for stage in stages if not only or stage.name in only]
    return [job_request(recipe, stage, slurm_folder(run) / "logs") for stage in chosen]


class _Submission:
    def __init__(self, run: RunFolder, requests: list[JobRequest]) -> None:
        self.run, self.requests = run, requests
        self.jobs = read_jobs(run)
        self.states = job_states([job.id for job in self.jobs.values()])

    def send(self) -> list[str]:
        if not self.requests:
            return [f"nothing to submit: finished already, in {self.run.path}"]
        lines = []
        for request in self.requests:
            after = self._after(request)
            state = self._state(request.stage)
            if state and state.alive and self._is_current(request, after):
                lines.append(f"{request.stage}: job {self.jobs[request.stage].id} is {state.state.lower()}")
                continue
            if state and state.alive:  # it waits for a job that is no more, or is of another shape
                _end_job(self.jobs[request.stage].id)
            # what a site's own sbatch says beside it comes before
            told = run_slurm(_sbatch(request, self.run, after)).split()
            number = int(told[-1].partition(";")[0])
            submitted = datetime.now(UTC).isoformat(timespec="seconds")
            self.jobs[request.stage] = SubmittedJob(number, after, submitted, _nodes_text(request))
            self.states[number] = JobState("PENDING")
            _write_jobs(self.jobs, self.run)
            waits = f", after {', '.join(map(str, after))}" if after else ""
            lines.append(f"{request.stage}: job {number} on {_nodes_text(request)}{waits}")
        return lines

    def cancel_all_but(self, names: Collection[str]) -> list[str]:
        """End the jobs of stages that the recipe no longer has: others may wait for them in vain."""
        lines = []
        for stage in [stage for stage in self.jobs if stage not in names]:
            state, job = self._state(stage), self.jobs.pop(stage)
            if state and state.alive:
                _end_job(job.id)
                lines.append(f"{stage}: job {job.id} is cancelled, the recipe has no such stage now")
            _write_jobs(self.jobs, self.run)
        return lines

    def _after(self, request: JobRequest) -> tuple[int, ...]:
        """The jobs of the stages that it needs and that are not finished."""
        needed = [stage for stage in request.after if self.run.manifest(stage) is None]
        for stage in needed:
            state = self._state(stage)
            if not (state and state.alive):
                raise UserError(
                    f"stage {request.stage} needs {stage}, which is neither finished nor queued; "
                    "submit that too (without --only everything that is missing is)"
                )
        return tuple(self.jobs[stage].id for stage in needed)

    def _is_current(self, request: JobRequest, after: tuple[int, ...]) -> bool:
        """Whether its job runs, or waits for the jobs that are there (and for others only if they have ended
        well meanwhile) and for as many nodes as the recipe says now."""
        state, job = self._state(request.stage), self.jobs[request.stage]
        if state is None or state.state != "PENDING":
            return True
        ended_well = {self.jobs[stage].id for stage in self.jobs if self.run.manifest(stage) is not None}
        waits = set(after) <= set(job.after) <= set(after) | ended_well
        return waits and job.nodes in ("", _nodes_text(request))

    def _state(self, stage: str) -> JobState | None:
        return self.states.get(self.jobs[stage].id) if stage in self.jobs else None


def cancel(recipe: Recipe, now: bool = False) -> list[str]:
    """End the run's jobs: those that train save first, unless ``now``. Returns a line for each."""
    run = RunFolder(recipe.run_folder)
    jobs = read_jobs(run)
    states = job_states([job.id for job in jobs.values()])
    alive = {stage: job.id for stage, job in jobs.items() if job.id in states and states[job.id].alive}
    waiting = {stage: number for stage, number in alive.items() if states[number].state == "PENDING"}
    lines = []
    for stage, number in [*waiting.items(), *((s, n) for s, n in alive.items() if s not in waiting)]:
        gently = stage not in waiting and not now
        if gently and _end_job(number, "--batch", "--signal=TERM"):
            how = "saves and ends"
        elif _end_job(number):  # it waits, or went back into the queue a moment ago
            how = "is cancelled"
        else:
            how = "has just ended, or cannot be cancelled at this moment; say it again"
        lines.append(f"{stage}: job {number} {how}")
    return lines or [f"nothing to cancel: no job of {run.path} is queued"]


def _end_job(number: int, *options: str) -> bool:
    """scancel; False where Slurm refuses, as for a job that has just ended."""
    try:
        run_slurm(["scancel", *options, str(number)])
    except UserError:
        return False
    return True


# what lies in the run folder


def _freeze(recipe: Recipe, folder: Path, update_code: bool) -> list[str]:
    """Scripts and environment as the recipe says now; the code once, so that all jobs of a run have one."""
    for name in ("scripts", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for script in sorted(_scripts().iterdir()):
        if script.suffix in (".sbatch", ".sh"):
            shutil.copyfile(script, folder / "scripts" / script.name)
    code, commit = folder / "code", code_commit() or "no commit"
    if (code / "COMMIT").exists() and not update_code:
        frozen = (code / "COMMIT").read_text(encoding="utf-8").strip()
        lines = []
        if frozen != commit:
            lines = [
                f"the code is that of the first submission ({frozen[:10]}); --update-code takes this one's"
            ]
    else:
        shutil.rmtree(code, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_PACKAGE, code / _PACKAGE.name, ignore=ignored)
        write_durably(code / "COMMIT", f"{commit}\n")
        lines = []
    write_durably(folder / "scripts" / "environment.sh", environment_text(recipe, code))
    return lines


def _scripts() -> Path:
    """slurm/ of the repository; of an installed package, its copy."""
    for place in (_PACKAGE.parent / "slurm", Path(sys.prefix) / "share" / "btx-megatron" / "slurm"):
        if (place / "common.sh").exists():
            return place
    raise UserError(f"{_PACKAGE}: the sbatch scripts are missing; install the package again")


def environment_text(recipe: Recipe, code: Path) -> str:
    """environment.sh: modules, set-up and variables of the recipe."""
    slurm = recipe.slurm
    python = "python3" if slurm.container_image else sys.executable
    values = {
        **slurm.environment,
        "BTX_SUPERVISOR_PYTHON": sys.executable,
        "BTX_PYTHON": python,
        "BTX_MAX_RESTARTS": str(slurm.max_restarts),
    }
    lines = ["# Written by btx submit: what the recipe's slurm section says.", *slurm.setup]
    if slurm.modules:
        names = " ".join(map(shlex.quote, slurm.modules))
        lines.insert(
            1, f"module load {names} || {{ echo '== slurm.modules could not be loaded' >&2; exit 2; }}"
        )
    lines += [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    lines.append(
        "export PYTHONSAFEPATH=1  # else a checkout in the working directory comes before the frozen code"
    )
    lines.append(f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    return "\n".join(lines) + "\n"


def _write_submit_script(requests: list[JobRequest], run: RunFolder) -> None:
    """submit.sh: the commands of sbatch, for whoever wants to read or to send them."""
    names: dict[str, str] = {}
    for request in requests:
        name = "".join(letter if letter.isalnum() else "_" for letter in request.stage)
        names[request.stage] = f"{name}_{len(names)}" if name in names.values() else name  # of a-b and a_b
    lines = [
        "#!/bin/bash",
        "# What btx submit does, by hand. Jobs sent so are not known to btx status.",
        "set -e",
    ]
    for request in requests:
        command = [shlex.quote(word) for word in _sbatch(request, run, ())]
        after = [f"${names[stage]}" for stage in request.after if stage in names]
        if after:
            command[2:2] = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        lines.append(f"{names[request.stage]}=$({' '.join(command)})")
    write_durably(slurm_folder(run) / "scripts" / "submit.sh", "\n".join(lines) + "\n")


def _sbatch(request: JobRequest, run: RunFolder, after: tuple[int, ...]) -> list[str]:
    dependency = f"--dependency=afterok:{':'.join(map(str, after))}"
    options = [dependency, "--kill-on-invalid-dep=yes"] if after else []
    script = slurm_folder(run) / "scripts" / request.script
    return ["sbatch", "--parsable", *options, *request.options, str(script), str(run.path), request.stage]


def _dry_run_lines(requests: list[JobRequest], run: RunFolder) -> list[str]:
    lines = []
    for request in requests:
        after = [stage for stage in request.after if run.manifest(stage) is None]
        waits = f", after {', '.join(after)}" if after else ""
        lines.append(f"{request.stage}: {request.script} on {_nodes_text(request)}{waits}")
    return [*lines, f"nothing was sent; the commands are in {slurm_folder(run) / 'scripts' / 'submit.sh'}"]


def _nodes_text(request: JobRequest) -> str:
    nodes = "1 node" if request.nodes == 1 else f"{request.nodes} nodes"
    return f"{nodes} x {request.ranks_per_node}"


def _write_jobs(jobs: Mapping[str, SubmittedJob], run: RunFolder) -> None:
    content = {stage: asdict(job) for stage, job in jobs.items()}
    write_durably(slurm_folder(run) / "jobs.json", json.dumps(content, indent=1) + "\n")
