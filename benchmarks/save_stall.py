"""What checkpoints cost: how long training stands still for one, and how much longer a run with saves takes.

    python benchmarks/save_stall.py --size 25M --blocks 10

One process trains one model, in blocks of a few steps. Odd blocks save once, after their first step, as the
training loop does (and poll after every step); even ones do not. A pair of neighbours gives one difference:
what a save costs in all, its stall and whatever it takes from the steps beside which it is written. Which of
the two comes first alternates, so that a machine that gets slower favours neither. A block is longer than a
save; the difference is put beside the time of ``--interval`` steps, of which one save is made.

Printed: the stall (from the call to its return), the cost, and the share of the run that it is, for
asynchronous and for synchronous saves: medians and quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import commit, machine, versions
from training_step import SEQUENCE, SIZES, VOCAB, batch_of, recipe_of

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3


@dataclass
class Costs:
    """Seconds, one entry a save."""

    stalls: list[float] = field(default_factory=list)
    extra: list[float] = field(default_factory=list)
    """A block with a save, less its neighbour without."""
    steps: list[float] = field(default_factory=list)
    """A step of a block without."""


def measure(take_step: Callable[[], Any], saver: Any, state: Any, blocks: int, length: int) -> Costs:
    """Alternate blocks with and without a save."""
    costs = Costs()
    for number in range(blocks):
        seconds = {}
        for saves in (True, False) if number % 2 else (False, True):
            started = time.perf_counter()
            for position in range(length):
                take_step()
                state.iteration += 1
                if saves and position == 0:
                    before = time.perf_counter()
                    saver.save(state, {})
                    costs.stalls.append(time.perf_counter() - before)
                saver.poll()
            if saves and not saver.poll():
                sys.exit(f"a save takes longer than {length} steps; give a larger --length")
            seconds[saves] = time.perf_counter() - started
        costs.extra.append(seconds[True] - seconds[False])
        costs.steps.append(seconds[False] / length)
    return costs


def row(name: str, costs: Costs, interval: int) -> str:
    """One line of the table: median (quartiles) of stall and cost, and the share of a run."""
    share = [100 * extra / (interval * statistics.median(costs.steps)) for extra in costs.extra]
    cells = [_spread(costs.stalls, 1000), _spread(costs.extra, 1000), _spread(share, 1)]
    return f"| {name} | " + " | ".join(cells) + " |"


def _spread(values: list[float], scale: float) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    digits = 0 if scale > 1 else 2
    return f"{scale * middle:.{digits}f} ({scale * low:.{digits}f} to {scale * high:.{digits}f})"


def run(options: argparse.Namespace, place: Path) -> None:
    """Measure in a process group of this process alone, and print."""
    import torch

    from btx_megatron.runtime import ranks

    with ranks.joined_ranks():
        recipe = recipe_of(SIZES[options.size], options.precision == "bf16", options.batch, 100_000)
        stage = recipe.stages.seed
        ranks.set_layout(stage.layout, seed=1)
        from btx_megatron.training.checkpoint import TrainingState
        from btx_megatron.training.saver import CheckpointSaver, Retention
        from btx_megatron.training.trainer import Trainer

        trainer = Trainer(recipe, stage, padded_vocab_size=VOCAB, num_experts=None)
        state = TrainingState(trainer.model, trainer.optimizer, trainer.scheduler, stage.layout)
        tokens = torch.randint(0, 64, (options.batch, SEQUENCE + 1))

        def take_step() -> None:
            trainer.step(iter([batch_of(tokens, 0)]))

        for _ in range(WARM_UP):
            take_step()
        print("| save | stall, ms | whole cost, ms | % of the run |\n|---|---|---|---|")
        for name, asynchronous in (("asynchronous", True), ("synchronous", False)):
            saver = CheckpointSaver(place / name, Retention(1), asynchronous)
            with contextlib.redirect_stdout(sys.stderr):  # it tells of every save
                saver.save(state, {})  # the first of a process loads code
                saver.wait()
                costs = measure(take_step, saver, state, options.blocks, options.length)
            print(row(name, costs, options.interval), flush=True)
        step = 1000 * statistics.median(costs.steps)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) / 2
        print(f"\na step takes {step:.0f} ms; a checkpoint is {size / 1e6:.0f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="25M")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--blocks", type=int, default=10, help="pairs of blocks for each kind of save")
    parser.add_argument("--length", type=int, default=5, help="steps of a block")
    parser.add_argument("--interval", type=int, default=100, help="steps between saves of the run told of")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    place = Path(tempfile.mkdtemp(dir=options.folder))
    told = machine(ROOT, place) | {"commit": commit(ROOT)}
    told["versions"] = versions(sys.executable, ["torch", "megatron-core"])
    told["step"] = f"{options.size} {options.precision}, {options.batch} x {SEQUENCE} tokens, 1 process"
    told["threads"] = str(options.threads)
    print("\n".join(f"- {key}: {value}" for key, value in told.items()), end="\n\n")
    try:
        run(options, place)
    finally:
        shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
