"""`btx run`, or some stages alone, with the fake worker: drive.py RECIPE [torchrun] [STAGE...].

Exit codes and messages are btx's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fake_worker

from btx_megatron.errors import StageFailed, Stopped, UserError
from btx_megatron.launch.local import run_pipeline, run_stages
from btx_megatron.launch.machine import Machine
from btx_megatron.recipe_file import load_recipe


def main(arguments: list[str]) -> int:
    """Exit code of the run."""
    recipe, *stages = arguments
    command = fake_worker.torchrun_command if "torchrun" in stages else fake_worker.command_line
    stages = [stage for stage in stages if stage != "torchrun"]
    try:
        if stages:
            run_stages(load_recipe(recipe), stages, machine=Machine(cores=2), command_line=command)
        else:
            run_pipeline(load_recipe(recipe), Machine(cores=2), command)
    except (UserError, StageFailed, Stopped) as error:
        print(f"btx: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
