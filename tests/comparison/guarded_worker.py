"""A worker that ends with an error if its stage reads a part of the recipe that the stage's key leaves out.

Runs in the place of ``python -m btx_megatron.launch.worker JOB``.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from btx_megatron import job as jobs
from btx_megatron.comparison.sharing import SHARED_TASKS, read_by
from btx_megatron.launch import worker
from btx_megatron.pipeline import stages_of
from btx_megatron.recipe_file import recipe_to_dict


class Guard:
    """Stands for a part of the recipe: what may be read can be, anything else is an error."""

    def __init__(self, key: str, values: Any, allowed: set[str]) -> None:
        self.__dict__["_told"] = key, values, allowed

    def __getattr__(self, name: str) -> Any:
        key, values, allowed = self.__dict__["_told"]
        if name.startswith("__") or name in allowed or callable(getattr(type(values), name, None)):
            return getattr(values, name)
        raise AssertionError(f"{key}.{name} is read, and is not in the stage's key")

    def __deepcopy__(self, memo: Any) -> Any:  # the whole recipe goes into checkpoints
        values = self.__dict__["_told"][1]
        return dataclasses.asdict(values) if dataclasses.is_dataclass(values) else values  # type: ignore[arg-type]


def guarded(path: Any) -> jobs.Job:
    job = jobs.read_job(path)
    if job.task not in SHARED_TASKS:
        return job
    (stage,) = (stage for stage in stages_of(job.recipe) if stage.name == job.stage)
    read = read_by(stage, recipe_to_dict(job.recipe))
    for section in ("moe", "mix", "evaluate", "training"):
        values = getattr(job.recipe, section)
        allowed = set(read.get(section, {}))
        if allowed != {field.name for field in dataclasses.fields(values)}:
            setattr(job.recipe, section, Guard(section, values, allowed))
    return job


if __name__ == "__main__":
    worker.read_job = guarded  # type: ignore[attr-defined]
    sys.exit(worker.main())
