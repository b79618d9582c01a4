"""Losses of the same runs on this machine's CPU, in a process that sees no GPU.

python cpu_losses.py EXPERTS (0: dense) prints them as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys


def cpu_losses(experts: int | None) -> list[float]:
    """Five steps of the local build in fp32."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(experts or 0)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    losses: list[float] = json.loads(told.stdout.splitlines()[-1])
    return losses


def main() -> None:
    from gpu_run import LOCAL, Run

    from btx_megatron.runtime import ranks

    with ranks.joined_ranks():
        print(json.dumps(Run(LOCAL, int(sys.argv[1]) or None, {"bf16": False}).steps(5)))


if __name__ == "__main__":
    main()
