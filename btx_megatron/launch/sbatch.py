"""What each stage asks Slurm for: the arguments of sbatch, from the recipe alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from btx_megatron.errors import UserError
from btx_megatron.pipeline import PipelineStage
from btx_megatron.recipe import Recipe, SlurmJob

SCRIPTS = {
    "prepare": "prepare.sbatch",
    "cluster": "mix.sbatch",
    "import": "mix.sbatch",
    "mix": "mix.sbatch",
    "average": "mix.sbatch",
    "evaluate": "evaluate.sbatch",
    "report": "evaluate.sbatch",
    "export": "export.sbatch",
}
"""The script of each task; training has one for experts and one for all else."""

_OF_MODELS = ("train", "evaluate")
_RESUMED = ("train", "prepare")


@dataclass(frozen=True)
class JobRequest:
    """One stage's job."""

    stage: str
    script: str
    nodes: int
    ranks_per_node: int
    options: tuple[str, ...]
    """Of sbatch, without the dependency."""
    after: tuple[str, ...]
    """The stages that must be finished before."""


def job_request(recipe: Recipe, stage: PipelineStage, logs: Path) -> JobRequest:
    """The job of a stage; ``logs``: folder of its output. Raises UserError for ranks that fill no nodes."""
    asked = asked_for(recipe, stage)
    nodes, ranks = _nodes(stage, asked)
    gpus = ranks if stage.task in _OF_MODELS and recipe.launch.device != "cpu" else 0
    options = (
        f"--job-name={recipe.name}:{stage.name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *_resources(asked, gpus),
        # the others have nothing to save, and would begin anew
        *([f"--signal=B:USR1@{recipe.slurm.signal_seconds}"] if stage.task in _RESUMED else []),
        "--requeue",
        "--open-mode=append",
        "--propagate=NONE",  # limits of the login node are none of the ranks'
        # Slurm fills in what follows a single %
        f"--output={logs / stage.name.replace(':', '-')}.log".replace("%", "%%"),
        *asked.options,
    )
    return JobRequest(stage.name, _script(stage), nodes, ranks, options, stage.inputs)


def asked_for(recipe: Recipe, stage: PipelineStage) -> SlurmJob:
    """``slurm`` of the recipe, then ``slurm.cpu``, then ``slurm.stages``: the last that says something."""
    slurm, kind = recipe.slurm, stage.name.partition(":")[0]
    layers: list[SlurmJob] = [slurm, *([] if stage.task in _OF_MODELS else [slurm.cpu])]
    layers += [slurm.stages[name] for name in dict.fromkeys((kind, stage.name)) if name in slurm.stages]
    result = SlurmJob()
    for layer in layers:
        for field in fields(SlurmJob):
            value = getattr(layer, field.name)
            if field.name == "options":
                result.options = [*result.options, *value]
            elif value is not None:
                setattr(result, field.name, value)
    return result


def _script(stage: PipelineStage) -> str:
    if stage.task != "train":
        return SCRIPTS[stage.task]
    return "expert.sbatch" if stage.name.startswith("expert:") else "finetune.sbatch"


def _nodes(stage: PipelineStage, asked: SlurmJob) -> tuple[int, int]:
    """Nodes of a stage, and its ranks on each."""
    limit = asked.gpus_per_node or stage.ranks
    if stage.ranks <= limit:
        return 1, stage.ranks
    if stage.ranks % limit:
        raise UserError(
            f"stage {stage.name}: {stage.ranks} ranks do not fill nodes of slurm.gpus_per_node {limit}; "
            "change its layout, or gpus_per_node (for this stage: slurm.stages)"
        )
    return stage.ranks // limit, limit


def _resources(asked: SlurmJob, gpus: int) -> Iterator[str]:
    if gpus:
        yield f"--gres=gpu:{f'{asked.gpu_type}:' if asked.gpu_type else ''}{gpus}"
    named = {
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "reservation": asked.reservation,
        "time": asked.time,
        "cpus-per-task": asked.cpus_per_node,
        "mem": asked.mem,
    }
    exclusive = asked.exclusive
    if exclusive is None:  # else Slurm would give all GPUs of a node and one core
        exclusive = gpus > 0 and gpus == asked.gpus_per_node and asked.cpus_per_node is None
    if exclusive and asked.mem is None:
        named["mem"] = "0"
    yield from (f"--{name}={value}" for name, value in named.items() if value is not None)
    if exclusive:
        yield "--exclusive"
