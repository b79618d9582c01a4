"""What this process may compute on: cores, fewer than there are on a shared node or in a container."""

from __future__ import annotations

import math
import os
from pathlib import Path

NEEDS_GPU = "BTX_NEEDS_GPU"
"""Environment variable: the stage was given GPUs; a rank that finds none must not compute on cores."""

ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # any: the rank takes it and keeps it
}
"""What torchrun tells a rank, for one that needs no torchrun, since there is no other."""

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Cores by affinity and by the container's quota, rounded up; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no container, or "max": no quota
        pass
    return max(1, cores)
