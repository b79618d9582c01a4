"""Train with frozen parts under several layouts; what moved and what is remembered goes to a JSON file.

torchrun --nproc-per-node 2 freeze_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layout_worker import EP2, FULL, OVERLAP, PP2, Run

from btx_megatron.recipe import Layout
from btx_megatron.runtime import ranks

STEPS = 3
DISTRIBUTED = replace(EP2, use_distributed_optimizer=True)
RECOMPUTED = replace(
    DISTRIBUTED, **{key: value for key, value in vars(FULL).items() if key.startswith("recompute")}
)
CASES: dict[str, tuple[str, Layout, list[str]]] = {
    "moe, shared": ("moe", DISTRIBUTED, ["shared"]),
    "moe, shared, recomputed": ("moe", RECOMPUTED, ["shared"]),
    "moe, shared and router": ("moe", DISTRIBUTED, ["shared", "router"]),
    "moe, experts": ("moe", DISTRIBUTED, ["experts"]),
    "moe, experts and router, overlap": (
        "moe",
        replace(OVERLAP, expert_model_parallel_size=2),
        ["experts", "router"],
    ),
    "moe, router, PP2": ("moe", PP2, ["router"]),
    "moe, shared and experts, PP2": ("moe", PP2, ["shared", "experts"]),
    "dense, shared": ("dense", Layout(data_parallel_size=2), ["shared"]),
}


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    chunks = run.trainer.model
    if run.state.layout.overlap_param_gather:
        for chunk in chunks:
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)
    return {
        name: weight.detach().clone() for chunk in chunks for name, weight in chunk.module.named_parameters()
    }


def remembered(run: Run) -> int:
    """Numbers that AdamW keeps a first moment of, over all ranks."""
    states = [
        state
        for optimizer in run.trainer.optimizer.chained_optimizers
        for state in optimizer.optimizer.state.values()
    ]
    count = torch.tensor(sum(state["exp_avg"].numel() for state in states))
    torch.distributed.all_reduce(count)
    return int(count)


def over_ranks(mine: set[str]) -> list[str]:
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, mine)
    return sorted(set().union(*gathered))


def case(name: str, folder: Path) -> dict[str, Any]:
    """Parts whose weights moved or stayed, what AdamW remembers, and losses of a run that was interrupted."""
    from btx_megatron.model.freeze import part_of
    from btx_megatron.training.checkpoint import resume
    from btx_megatron.training.saver import save

    kind, layout, frozen = CASES[name]
    run = Run(kind, layout, folder, freeze=frozen)
    before = weights_of(run)
    first = run.steps(STEPS)
    after = weights_of(run)
    save(folder / name, run.state, {}, keep=1)
    whole = run.steps(STEPS)
    again = Run(kind, layout, folder, freeze=frozen)
    assert resume(folder / name, again.state)
    moved = {key: not torch.equal(before[key], after[key]) for key in before}
    return {
        "losses": first["loss"],
        "moved": over_ranks({part_of(key) for key, yes in moved.items() if yes}),
        "stayed": over_ranks({part_of(key) for key, yes in moved.items() if not yes}),
        "remembered": remembered(run),
        "whole": whole,
        "resumed": again.steps(STEPS),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    for kind, layout in (("moe", EP2), ("dense", Layout(data_parallel_size=2))):
        Run(kind, layout, folder)  # saves the initial checkpoint, which a distributed optimizer cannot do
    result = {name: case(name, folder) for name in CASES}
    if torch.distributed.get_rank() == 0:
        (folder / "frozen.json").write_text(json.dumps(result, indent=1))
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
