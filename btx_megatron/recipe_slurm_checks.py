"""What the recipe's ``slurm`` must satisfy, so that a cluster's refusal does not come job by job."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from btx_megatron.methods import training_stages
from btx_megatron.recipe import Recipe, SlurmJob
from btx_megatron.recipe_numbers import at_least

_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE")
_OURS = (
    *("--dependency", "--signal", "--requeue", "--open-mode", "--output", "--job-name"),
    *("--nodes", "--ntasks", "--ntasks-per-node"),
)

_LONGEST_SIGNAL = 65_535


def slurm_problems(recipe: Recipe, stages: Collection[str]) -> Iterator[str]:
    """One line for each thing that cannot hold; ``stages``: names of all stages that there are."""
    slurm = recipe.slurm
    yield from at_least("slurm", slurm, 0, ("signal_seconds", "max_restarts"))
    yield from _job_problems("slurm", slurm)
    saving = {"prepare", *training_stages(recipe)}  # the others are not signalled
    saving |= {name.partition(":")[0] for name in saving}
    signalled = [(f"slurm.stages.{name}", job) for name, job in slurm.stages.items() if name in saving]
    prepare = slurm.stages.get("prepare")
    of_cpu = [] if prepare is not None and prepare.time else [("slurm.cpu", slurm.cpu)]  # of it prepare alone
    if slurm.signal_seconds > _LONGEST_SIGNAL:
        yield f"slurm.signal_seconds {slurm.signal_seconds}: Slurm takes {_LONGEST_SIGNAL} at most"
    for key, job in (("slurm", slurm), *of_cpu, *signalled):
        seconds = time_limit_seconds(job.time) if job.time else None
        if seconds is not None and seconds <= slurm.signal_seconds:
            yield (
                f"{key}.time {job.time} is no longer than slurm.signal_seconds {slurm.signal_seconds}, so "
                "that jobs would be told to save before they have begun; raise it, or lower signal_seconds"
            )
    yield from _job_problems("slurm.cpu", slurm.cpu)
    known = [*dict.fromkeys(name.partition(":")[0] for name in stages), *(n for n in stages if ":" in n)]
    for name, job in slurm.stages.items():
        if name not in known:
            yield f"slurm.stages.{name}: no such stage; the recipe has {', '.join(known)}"
        yield from _job_problems(f"slurm.stages.{name}", job)
    for name in slurm.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"slurm.environment.{name}: no name of a variable; letters, digits and '_' make one"
    if slurm.container_mounts and not slurm.container_image:
        yield "slurm.container_mounts: there is no container; set slurm.container_image, or leave it out"


def time_limit_seconds(time: str) -> int | None:
    """Seconds of a time limit in Slurm's form: minutes, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M``, ``D-H:M:S``;
    None for one without end, or that is no time."""
    if not _TIME.fullmatch(time) or time[0].isalpha():
        return None
    days, dash, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))


def _job_problems(key: str, job: SlurmJob) -> Iterator[str]:
    yield from at_least(key, job, 1, ("gpus_per_node", "cpus_per_node"))
    if job.time is not None and not _TIME.fullmatch(job.time):
        yield f"{key}.time '{job.time}': no time of Slurm's; write it as 24:00:00, 90 (minutes) or 2-12:00:00"
    for option in job.options:
        name = option.partition("=")[0]
        if not option.startswith("-"):
            yield f"{key}.options '{option}': an option of sbatch begins with '-', as --nice=100"
        elif name in _OURS:
            yield f"{key}.options '{option}': btx submit sets {name} itself; leave it out"
