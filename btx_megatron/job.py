"""A job: what a worker process is told, as one JSON file in its work folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from btx_megatron.durable import write_durably
from btx_megatron.manifest import CHECKPOINTS as CHECKPOINTS
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import parse_recipe, recipe_to_dict
from btx_megatron.runtime.progress import PROGRESS_FILE
from btx_megatron.runtime.stop import STOP_FILE
from btx_megatron.runtime.stopwatch import DURATION_FILE

Task = Literal["prepare", "import", "cluster", "train", "mix", "average", "evaluate", "report", "export"]

JOB_FILE = "job.json"
LOG_FILE = "log.txt"
PASSING_FILES = (JOB_FILE, PROGRESS_FILE, STOP_FILE, DURATION_FILE)
"""Files of a work folder that say nothing any more once the stage is finished."""
LAUNCH_FILES = (*PASSING_FILES, LOG_FILE)
"""Files of a work folder that are not the stage's own."""

_BRANCHES_FROM = {
    "expert": "seed",
    "dense": "seed",
    "finetune": "mix",
    "sparse_upcycling_dm": "upcycle",
    "sparse_upcycling_cm": "upcycle",
}


def branches_from(stage: str) -> str | None:
    """The stage whose model a training stage goes on from; None: from scratch."""
    return _BRANCHES_FROM.get(stage.partition(":")[0])


@dataclass(frozen=True)
class Job:
    """One stage's work. Every rank of the stage reads the same job."""

    task: Task
    """What kind of work it is."""
    stage: str
    """``seed``, ``expert:DOMAIN``, ``finetune``, ..."""
    recipe: Recipe
    """The resolved recipe."""
    run_folder: Path
    """Where finished stages lie; read only for the worker."""
    work_folder: Path
    """Where the worker writes; the supervisor publishes it."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each stage that this one reads."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Of the evaluation: row -> its part of ``held_out_loss`` and ``tasks``, where both are known."""

    @property
    def data_folder(self) -> Path:
        """Tokenizer and token files: what ``prepare`` published, or for c-BTM's experts ``cluster``."""
        clusters = self.recipe.domains_of(self.stage) is not self.recipe.data.domains
        return self.run_folder / ("cluster" if clusters else "data")

    @property
    def checkpoints(self) -> Path:
        """Where this stage saves its model."""
        return self.work_folder / CHECKPOINTS

    @property
    def load_from(self) -> Path | None:
        """Checkpoint folder of the model that this stage goes on from; None: from scratch."""
        source = branches_from(self.stage)
        return self.run_folder / source / CHECKPOINTS if source else None


def write_job(job: Job) -> Path:
    """Write ``job.json`` into the work folder; returns its path."""
    content: dict[str, Any] = {
        "task": job.task,
        "stage": job.stage,
        "recipe": recipe_to_dict(job.recipe),
        "run_folder": str(job.run_folder),
        "work_folder": str(job.work_folder),
        "inputs": job.inputs,
        "measured": job.measured,
    }
    path = job.work_folder / JOB_FILE
    write_durably(path, json.dumps(content, indent=1))
    return path


def read_job(path: Path) -> Job:
    """The job of a ``job.json``."""
    content = json.loads(path.read_text())
    return Job(
        task=content["task"],
        stage=content["stage"],
        recipe=parse_recipe(content["recipe"], where=str(path)),
        run_folder=Path(content["run_folder"]),
        work_folder=Path(content["work_folder"]),
        inputs=content["inputs"],
        measured=content["measured"],
    )
