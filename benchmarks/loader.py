"""How long a training step waits for its data, with each loader.

    python benchmarks/loader.py --size 25M --rounds 20

The text is this interpreter's own standard library, prepared as ``btx prepare`` does, in three sources of two
domains. One model is trained by our loop; the loaders take turns, one step each, on the same samples, so that
a slow moment hits all. The stall is the time that a step spends in asking for micro-batches; its share of the
step is told, median and quartiles. DALI is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measure import commit, machine, versions
from training_step import ROOT, SEQUENCE, SIZES, WARM_UP, recipe_of

SOURCES = {"one": ["json", "email"], "two": ["asyncio"]}
VOCABULARY = 4096


class Timed:
    """An iterator that adds up the time in which somebody waits for it."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - started


def prepared_samples(recipe: Any, folder: Path, count: int) -> Any:
    from btx_megatron.data.blend import TrainingSamples
    from btx_megatron.data.prepare import prepare
    from btx_megatron.data.weights import stage_blend
    from btx_megatron.recipe import Domain, Source

    recipe.data.domains = [
        Domain(name, [Source(s, path=f"package:{s}", include=["**/*.py"]) for s in sources])
        for name, sources in SOURCES.items()
    ]
    recipe.tokenizer.vocab_size = VOCABULARY
    prepare(recipe, folder, lambda phase, done, total: None)
    blend = stage_blend(recipe, "seed")
    return TrainingSamples(folder, recipe.data.domains, blend, SEQUENCE, count, 1, folder / "cache")


def measure(recipe: Any, rounds: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Of each loader the pairs (seconds stalled, seconds of the step)."""
    from btx_megatron.data.loader import loader
    from btx_megatron.runtime.ranks import device
    from btx_megatron.training.trainer import Trainer

    training = recipe.training
    steps = WARM_UP + rounds
    samples = prepared_samples(recipe, folder, steps * training.global_batch_size)
    kinds = ["megatron"] + (["dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])
    batches = {
        kind: Timed(
            loader(kind, device())(  # type: ignore[arg-type]
                samples,
                consumed_samples=0,
                micro_batch_size=training.micro_batch_size,
                global_batch_size=training.global_batch_size,
                data_parallel_rank=0,
                data_parallel_size=1,
            )
        )
        for kind in kinds
    }
    trainer = Trainer(recipe, recipe.stages.seed, padded_vocab_size=VOCABULARY, num_experts=None)
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for number in range(steps):
        for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
            before, started = batches[kind].seconds, time.perf_counter()
            trainer.step(batches[kind])
            if number >= WARM_UP:
                seconds = time.perf_counter() - started
                taken[kind].append((batches[kind].seconds - before, seconds))
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="25M")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from btx_megatron.runtime import ranks

    told = machine(ROOT, ROOT) | {"commit": commit(ROOT), "rounds": str(options.rounds)}
    told["versions"] = versions(sys.executable, ["torch", "megatron-core", "nvidia-dali-cuda130"])
    told["step"] = f"{options.size}, {options.batch} x {SEQUENCE} tokens, micro-batch {options.micro_batch}"
    print("\n".join(f"- {key}: {value}" for key, value in told.items()))
    recipe = recipe_of(SIZES[options.size], False, options.batch, 2 * (WARM_UP + options.rounds))
    recipe.training.micro_batch_size = options.micro_batch
    with ranks.joined_ranks(), tempfile.TemporaryDirectory() as folder:
        ranks.set_layout(recipe.stages.seed.layout, seed=1)
        taken = measure(recipe, options.rounds, Path(folder))
    print("\n| loader | ms a step | ms stalled | share of the step | quartiles |\n|---|---|---|---|---|")
    for kind, pairs in taken.items():
        shares = [100 * stalled / step for stalled, step in pairs]
        low, _, high = statistics.quantiles(shares, n=4)
        step = 1000 * statistics.median(step for _, step in pairs)
        stalled = 1000 * statistics.median(stalled for stalled, _ in pairs)
        share = statistics.median(shares)
        print(f"| {kind} | {step:.0f} | {stalled:.2f} | {share:.3f} % | {low:.3f}-{high:.3f} % |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
