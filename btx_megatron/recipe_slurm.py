"""The recipe's ``slurm``: what ``btx submit`` asks a cluster for. All of it is optional."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SlurmJob:
    """What one job asks for; a key that is null is not asked for, and the cluster's default holds."""

    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    reservation: str | None = None
    """Reservation."""
    time: str | None = None
    """Time limit of one job, as Slurm writes it (``24:00:00``). It may be shorter than the training: the job
    saves, goes back into the queue and goes on."""
    gpus_per_node: int | None = None
    """Ranks of a node, each with a GPU of its own (with ``launch.device: cpu``, with none): a job of more
    ranks takes several nodes."""
    gpu_type: str | None = None
    """Type in ``--gres=gpu:TYPE:N``."""
    cpus_per_node: int | None = None
    """CPU cores of a node that a job takes."""
    mem: str | None = None
    """Memory of a node that a job takes; ``0`` is all of it, and what null means with ``exclusive``."""
    exclusive: bool | None = None
    """Whole nodes, with all their cores. Null: for jobs that take all ``gpus_per_node``, unless
    ``cpus_per_node`` says how many cores they want."""
    options: list[str] = field(default_factory=list)
    """Any other options of sbatch, as ``--nice=100``."""


@dataclass
class Slurm(SlurmJob):
    """Running on a cluster: one job a stage, each on its own nodes."""

    gpus_per_node: int | None = 8
    """Ranks of a node, each with a GPU of its own (with ``launch.device: cpu``, with none): a job of more
    ranks takes several nodes."""
    cpu: SlurmJob = field(default_factory=SlurmJob)
    """What the jobs without GPUs (prepare, mix, report, export) ask for instead, key by key."""
    stages: dict[str, SlurmJob] = field(default_factory=dict)
    """The same for single stages, by name (``seed``, ``expert:math``, ``finetune``), or ``expert`` for all
    experts."""
    signal_seconds: int = 300
    """So long before its time limit a job that trains is told to save; it must hold a step and a save."""
    max_restarts: int = 100
    """After so many returns to the queue a job fails."""
    container_image: str | None = None
    """Image for pyxis (``--container-image``); null: no container."""
    container_mounts: list[str] = field(default_factory=list)
    """What pyxis mounts; the run folder and the code must be among it."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that make the environment, as ``source /opt/btx/bin/activate``."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for every job, as ``NCCL_IB_HCA: mlx5``."""
