"""What this machine has to share out: CPU cores, and GPUs where there are any."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from btx_megatron.errors import UserError
from btx_megatron.pipeline import PipelineStage

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Machine:
    """Cores and GPUs that this process may use."""

    cores: int
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them."""

    def gpus_of(self, stage: PipelineStage) -> int:
        """GPUs that a stage needs: one a rank where models run, none for work on files."""
        return stage.ranks if self.gpus and stage.task in ("train", "evaluate") else 0

    def check(self, stages: list[PipelineStage]) -> None:
        """Raise UserError if a stage needs more GPUs than there are. Cores may be shared, GPUs not."""
        for stage in stages:
            if self.gpus_of(stage) > len(self.gpus):
                raise UserError(
                    f"stage {stage.name} has {stage.ranks} ranks and this machine {len(self.gpus)} GPUs; "
                    "make its layout smaller, or run it where there are more"
                )


def this_machine() -> Machine:
    """Cores of this process (affinity and container quota), GPUs from CUDA_VISIBLE_DEVICES or /dev."""
    return Machine(_cores(), _gpus())


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no container, or "max": no quota
        pass
    return max(1, cores)


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip())
    devices = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return tuple(str(number) for number in range(len([name for name in devices if name.isdigit()])))
