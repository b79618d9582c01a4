"""A stage inside a Slurm job: ``btx`` supervises on the first node, and srun starts its ranks on all of them.

One task a node, and in it a torchrun with static rendezvous, so that rank 0 is on the first node. Signals
come to the batch script alone (``--signal=B:``), and from there to ``btx``, which makes the ranks save.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from btx_megatron.errors import UserError
from btx_megatron.launch.machine import Machine
from btx_megatron.pipeline import PipelineStage
from btx_megatron.recipe import Recipe
from btx_megatron.runtime.cores import NEEDS_GPU

IN_A_JOB = "BTX_SLURM_JOB"
"""Environment variable that slurm/common.sh sets: this ``btx`` runs one stage in its own job."""

_WORKER = "-m btx_megatron.launch.worker"
_FIRST_PORT, _PORTS = 20_000, 10_000
_SECONDS_TO_START = 1800  # nodes of a cloud may still be booting


@dataclass(frozen=True)
class Allocation(Machine):
    """The nodes of a job. Slurm says which GPUs a rank sees."""

    nodes: int = 1
    job_id: int = 0
    address: str = "127.0.0.1"
    """Of the first node, as the others reach it."""
    srun_options: tuple[str, ...] = ()
    needs_gpu: bool = False
    """Ranks must find one each."""
    container: bool = False
    """Ranks run in an image of their own."""
    lock_patience_seconds: float = 600.0
    """A file system lets go of a dead node's lock minutes after the job is somewhere else."""

    def environment(self, gpus: tuple[str, ...]) -> dict[str, str]:
        """Nothing: what the batch script has set reaches the ranks."""
        return {}

    def check_accelerator(self, recipe: Recipe, stages: list[PipelineStage]) -> None:
        """Nothing: ranks look for themselves."""

    def check_packages(self, recipe: Recipe, stages: list[PipelineStage]) -> None:
        """As on any machine; what is in an image shows there."""
        if not self.container:
            super().check_packages(recipe, stages)

    def command(self, stage: PipelineStage, job_file: Path) -> list[str]:
        """Program and arguments that run a stage on the nodes."""
        of_models = stage.task in ("train", "evaluate")
        nodes = self.nodes if of_models else 1
        worker = f"{_WORKER} {shlex.quote(str(job_file))}"
        if of_models:
            here = os.environ.get("SLURM_GPUS_ON_NODE", "")
            most = int(here) if here.isdigit() and self.needs_gpu else stage.ranks
            if stage.ranks % nodes or stage.ranks // nodes > most:
                raise UserError(
                    f"stage {stage.name}: {stage.ranks} ranks do not fit the job's {nodes} nodes of {most} "
                    "GPUs, its layout was changed; btx cancel, then btx submit"
                )
        if stage.ranks > 1:
            worker = (
                f"-m torch.distributed.run --nnodes={nodes} --node-rank=$SLURM_NODEID "
                f"--nproc-per-node={stage.ranks // nodes} --master-addr={self.address} "
                f"--master-port={_FIRST_PORT + self.job_id % _PORTS} {worker}"
            )
        # an image's own PYTHONPATH would hide the frozen code
        variables = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        if of_models and self.needs_gpu:
            variables[NEEDS_GPU] = "1"
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items() if value)
        # the guardian of a process is on the first node alone; Slurm ends the ranks with their job
        line = f"unset BTX_GUARDIAN_PID; {exports} exec {shlex.quote(_python())} {worker}"
        return [
            "srun",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
            "--kill-on-bad-exit=1",
            "--export=ALL",  # sites' SBATCH_EXPORT=NONE would take away what the script has set
            # Slurm may hold cores for a step of a start that a node's death ended; ours is the only step
            "--overlap",
            # a start that gets no resources would wait until the job's time limit
            f"--immediate={_SECONDS_TO_START}",
            *self.srun_options,
            "bash",
            "-c",
            line,
        ]


def this_allocation(recipe: Recipe) -> Allocation | None:
    """The job that this ``btx`` runs in; None where it runs on its own."""
    if IN_A_JOB not in os.environ:
        return None
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    return Allocation(
        cores=_cpus_of_a_node() * nodes,
        nodes=nodes,
        job_id=int(os.environ["SLURM_JOB_ID"]),
        address=_first_address(),
        srun_options=tuple(_srun_options(recipe)),
        needs_gpu=recipe.launch.device != "cpu",
        container=recipe.slurm.container_image is not None,
    )


def _cpus_of_a_node() -> int:
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE", "1"))


def _srun_options(recipe: Recipe) -> list[str]:
    # srun does not take it from sbatch since Slurm 22.05, and might bind all ranks of a node to one core
    options = [f"--cpus-per-task={_cpus_of_a_node()}"]
    if recipe.slurm.container_image:
        options.append(f"--container-image={recipe.slurm.container_image}")
    if recipe.slurm.container_mounts:
        options.append(f"--container-mounts={','.join(recipe.slurm.container_mounts)}")
    return options


def _python() -> str:
    return os.environ.get("BTX_PYTHON", sys.executable)


def _first_address() -> str:
    """Of the job's first node: its NodeAddr, since a node's name need not be one that resolves."""
    node = os.environ.get("SLURMD_NODENAME", "")
    told = subprocess.run(
        ["scontrol", "--oneliner", "show", "node", node], capture_output=True, text=True, check=False
    )
    values = dict(part.split("=", 1) for part in told.stdout.split() if "=" in part)
    return values.get("NodeAddr", node)
