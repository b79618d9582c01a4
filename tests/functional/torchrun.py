"""Run a script of this folder under torchrun, on gloo, as a user's machine would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(script: str, ranks: int, *arguments: object, timeout: float = 900) -> str:
    """Output of ``script`` on so many ranks; raises with its end if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--standalone", "--local-addr", "127.0.0.1"]
    command += [str(HERE / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # on gloo
    done = subprocess.run(
        command, env=environment, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        own = done.stdout.partition("torch/distributed/elastic/")[0]  # torchrun's own traceback tells nothing
        raise AssertionError(f"{script} on {ranks} ranks failed:\n{own[-6000:]}")
    return done.stdout
