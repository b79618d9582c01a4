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
from btx_megatron.recipe_file import load_recipe


def main(arguments: list[str]) -> int:
    """Exit code of the run."""
    recipe, *stages = arguments
    kind = fake_worker.TorchrunMachine if "torchrun" in stages else fake_worker.FakeMachine
    stages = [stage for stage in stages if stage != "torchrun"]
    try:
        if stages:
            run_stages(load_recipe(recipe), stages, machine=kind(cores=2))
        else:
            run_pipeline(load_recipe(recipe), kind(cores=2))
    except (UserError, StageFailed, Stopped) as error:
        print(f"btx: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
