"""Counts what ranks send each other: known calls, and training steps under many layouts; into a JSON file.

torchrun --nproc-per-node 2|4 comm_worker.py FOLDER
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layout_worker import (
    DP2_DISTRIBUTED,
    EP2,
    EXPERTS,
    LAYOUTS,
    MODEL,
    PP2,
    TRAINING,
    VOCABULARY,
    RandomSamples,
)

from btx_megatron.job import Job
from btx_megatron.recipe import Layout, Moe, Recipe, Stage, Training
from btx_megatron.runtime import ranks
from btx_megatron.runtime.comm_meter import CommMeter

STEPS, NODE = 2, 2  # a node of two ranks
ALLGATHER = Moe(moe_token_dispatcher_type="allgather")
SAMPLED = Moe(moe_router_type="sample_top1", moe_router_load_balancing_type="none")
PLAIN: tuple[Moe, dict[str, Any], bool] = (Moe(), {}, False)  # router, other model, bf16
TIED = {"untie_embeddings_and_output_weights": False}
DP4 = Layout(data_parallel_size=4)

TWO: dict[str, tuple[Layout, Moe, dict[str, Any], bool]] = {
    f"{kind} {name}": (layout, *PLAIN) for kind in ("dense", "moe") for name, layout in LAYOUTS[kind].items()
} | {
    "dense PP2, tied": (PP2, Moe(), TIED, False),
    "dense TP2+SP, bf16": (LAYOUTS["dense"]["TP2+SP"], Moe(), {}, True),
    "dense DP2+distributed, bf16": (DP2_DISTRIBUTED, Moe(), {}, True),
    "moe EP2, allgather": (EP2, ALLGATHER, {}, False),
    "moe EP2, bf16": (EP2, Moe(), {}, True),
    "moe EP2, sample_top1": (EP2, SAMPLED, {}, False),
    "moe PP2, sample_top1": (PP2, SAMPLED, {}, False),
    "moe TP2+SP, allgather, bf16": (LAYOUTS["moe"]["TP2+SP"], ALLGATHER, {}, True),
}
FOUR: dict[str, tuple[Layout, Moe, dict[str, Any], bool]] = {
    "dense DP4": (DP4, *PLAIN),
    "dense DP4+distributed": (replace(DP4, use_distributed_optimizer=True), *PLAIN),
    "dense TP2+SP DP2": (replace(LAYOUTS["dense"]["TP2+SP"], data_parallel_size=2), *PLAIN),
    "dense PP2 DP2+distributed": (replace(DP2_DISTRIBUTED, pipeline_model_parallel_size=2), *PLAIN),
    "dense TP2 PP2": (replace(PP2, tensor_model_parallel_size=2), *PLAIN),
    "moe DP4 EP2+distributed": (
        Layout(data_parallel_size=4, expert_model_parallel_size=2, use_distributed_optimizer=True),
        *PLAIN,
    ),
    "moe DP4 EP2+distributed+overlap": (
        Layout(
            data_parallel_size=4,
            expert_model_parallel_size=2,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        *PLAIN,
    ),
    "moe DP4+distributed": (replace(DP4, use_distributed_optimizer=True), *PLAIN),
    "moe DP4 EP4": (Layout(data_parallel_size=4, expert_model_parallel_size=4), *PLAIN),
    "moe TP2+SP DP2 EP2 ETP1": (replace(LAYOUTS["moe"]["TP2+SP+EP2"], data_parallel_size=2), *PLAIN),
    "moe TP2+SP DP2 EP2 ETP2, allgather": (  # alltoall gathers uneven pieces here, which gloo cannot
        replace(LAYOUTS["moe"]["TP2+SP"], data_parallel_size=2, expert_model_parallel_size=2),
        ALLGATHER,
        {},
        False,
    ),
    "dense CP2+TP2+SP": (replace(LAYOUTS["dense"]["TP2+SP"], context_parallel_size=2), *PLAIN),
    "dense CP2 DP2+distributed, bf16": (replace(DP2_DISTRIBUTED, context_parallel_size=2), Moe(), {}, True),
    "moe CP2 DP2 EP2": (replace(EP2, context_parallel_size=2), *PLAIN),
    "moe PP2 DP2 EP2": (replace(EP2, pipeline_model_parallel_size=2), *PLAIN),
}
SETUPS = {2: TWO, 4: FOUR}


def trainer_of(layout: Layout, moe: Moe, model: dict[str, Any], bf16: bool, experts: int | None) -> Any:
    ranks.set_layout(layout, seed=7)
    from btx_megatron.training.trainer import Trainer

    training = replace(TRAINING, bf16=bf16)
    recipe = Recipe(model=replace(MODEL, **model), training=training, moe=moe)
    stage = Stage(training=training, layout=layout)
    return Trainer(recipe, stage, padded_vocab_size=VOCABULARY, num_experts=experts)


def stream(training: Training) -> Any:
    from megatron.core import parallel_state

    from btx_megatron.data.blend import batches

    return batches(
        RandomSamples(),  # type: ignore[arg-type]
        consumed_samples=0,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def counted_run(name: str) -> list[list[dict[str, Any]]]:
    """What each step sent, one after the other."""
    layout, moe, model, bf16 = SETUPS[dist.get_world_size()][name]
    trainer = trainer_of(layout, moe, model, bf16, EXPERTS if name.startswith("moe") else None)
    batches, steps = stream(TRAINING), []
    for _ in range(STEPS):
        with CommMeter(NODE) as meter, meter.step():
            trainer.step(batches)
        steps.append(meter.over_ranks().rows())
    return steps


def losses(counted: bool) -> list[float]:
    """Losses of some steps of a MoE, with the meter on or off."""
    trainer = trainer_of(replace(EP2, use_distributed_optimizer=True), *PLAIN, EXPERTS)
    batches, meter, found = stream(TRAINING), CommMeter(NODE), []
    if counted:
        meter.__enter__()
    for _ in range(5):
        with meter.step():
            result = trainer.step(batches)
        found += [result.lm_loss, result.grad_norm]
    if counted:
        meter.__exit__(None, None, None)
    assert bool(meter.traffic.lines) == counted
    return found


def known_calls() -> dict[str, Callable[[], Any]]:
    """Calls of every form, on tensors of known size: 6 fp32 numbers a rank (24 bytes)."""
    import torch.distributed._functional_collectives as functional
    import torch.distributed.nn.functional as differentiable
    from torch.distributed import all_reduce as bound_early
    from torch.distributed.distributed_c10d import _coalescing_manager

    world, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert world is not None
    x, pieces = torch.ones(6), [torch.empty(6) for _ in range(size)]
    whole, part = torch.empty(6 * size), torch.empty(6 // size)

    def coalesced() -> None:
        with _coalescing_manager(async_ops=True) as manager:
            dist.all_reduce(x)
            dist.all_reduce(torch.ones(4))
        manager.wait()

    def coalesced_scatter() -> None:
        with _coalescing_manager():
            dist.reduce_scatter_tensor(part, x)

    def coalesced_gather() -> None:
        with _coalescing_manager():
            dist.all_gather_into_tensor(whole, x)

    def batched() -> None:
        sends = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, torch.empty(6), 1 - rank)]
        for request in dist.batch_isend_irecv(sends):
            request.wait()

    def uneven() -> None:  # rank 0 keeps 1 row and sends 5, rank 1 sends 2 and keeps 4
        mine, its = ([1, 5], [1, 2]) if rank == 0 else ([2, 4], [5, 4])
        dist.all_to_all_single(torch.empty(sum(its)), x, its, mine)

    def backward() -> None:
        weight = torch.ones(6, requires_grad=True)
        differentiable.all_reduce(weight).sum().backward()

    def autograd_functional() -> None:
        weight = torch.ones(6, requires_grad=True)
        (functional.all_gather_tensor_autograd(weight, 0, world) ** 2).sum().backward()

    def own_ddp() -> None:
        wrapped(torch.ones(1, 2)).sum().backward()

    def inference() -> None:
        with torch.inference_mode():
            dist.all_reduce(torch.ones(6))

    wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    return {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_reduce, async": lambda: dist.all_reduce(x, async_op=True).wait(),
        "all_reduce, a name bound at import": lambda: bound_early(x),
        "all_reduce, coalesced": coalesced,
        "all_reduce, functional": lambda: functional.wait_tensor(functional.all_reduce(x, "sum", world)),
        "all_reduce, inference mode": inference,
        "all_reduce, forward and backward": backward,
        "all_reduce, torch's own DDP": own_ddp,
        "all_gather, list": lambda: dist.all_gather(pieces, x),
        "all_gather, one tensor": lambda: dist.all_gather_into_tensor(whole, x),
        "all_gather, coalesced": coalesced_gather,
        "all_gather, functional, and backward": autograd_functional,
        "reduce_scatter, one tensor": lambda: dist.reduce_scatter_tensor(part, x),
        "reduce_scatter, list": lambda: dist.reduce_scatter(part, list(x.split(6 // size))),
        "reduce_scatter, coalesced": coalesced_scatter,
        "all_to_all, even": lambda: dist.all_to_all_single(torch.empty(6), x),
        "all_to_all, uneven": uneven,
        "broadcast": lambda: dist.broadcast(x, 1),
        "reduce": lambda: dist.reduce(x, 0),
        "gather": lambda: dist.gather(x, pieces if rank == 0 else None, 0),
        "scatter": lambda: dist.scatter(torch.empty(6), pieces if rank == 0 else None, 0),
        "send and recv, batched": batched,
        "barrier": dist.barrier,
    }


def count_known_calls() -> dict[str, Any]:
    """Lines of each call, summed over the ranks; and that nothing is counted outside a step, or after."""
    found: dict[str, Any] = {}
    for name, call in known_calls().items():
        with CommMeter(ranks_per_node=1) as meter:
            call()
            with meter.step():
                call()
            call()
        call()
        found[name] = meter.over_ranks().rows()
    return found


def reported(folder: Path, asked_for: bool) -> tuple[list[str], str]:
    """Names of the files that a stage's communication log leaves in its folder, and what it prints."""
    from btx_megatron.training.communication import CommunicationLog

    trainer = trainer_of(EP2, *PLAIN, EXPERTS)
    training = replace(TRAINING, log_communication=asked_for)
    job = Job("train", "finetune", Recipe(model=MODEL), folder, folder)
    folder.mkdir(exist_ok=True)
    log, batches, printed = CommunicationLog(job, Stage(training, EP2)), stream(TRAINING), io.StringIO()
    for _ in range(STEPS):
        with log.step():
            trainer.step(batches)
    with contextlib.redirect_stdout(printed):
        log.close()
    return sorted(path.name for path in folder.iterdir()), printed.getvalue()


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world = dist.get_world_size()
    result: dict[str, Any] = {"layouts": {name: counted_run(name) for name in SETUPS[world]}}
    if world == 2:
        result["known"] = count_known_calls()
        names, result["log"] = reported(folder / "stage", True)
        result["nothing"], _ = reported(folder / "stage without", False)
        if dist.get_rank() == 0:
            result["report"] = json.loads((folder / "stage" / names[0]).read_text())
        result["losses"] = [losses(counted) for counted in (False, True)]
    if dist.get_rank() == 0:
        (folder / f"comm-{world}.json").write_text(json.dumps(result, indent=1))
    ranks.stop_ranks()


def setup_of_name(world: int, name: str) -> Any:
    """The formulas' setup of a named layout."""
    from btx_megatron.estimate_comm import Setup

    layout, moe, model, bf16 = SETUPS[world][name]
    return Setup(
        model=replace(MODEL, **model),
        layout=layout,
        padded_vocab_size=VOCABULARY,
        micro_batch_size=TRAINING.micro_batch_size,
        global_batch_size=TRAINING.global_batch_size,
        bf16=bf16,
        num_experts=EXPERTS if name.startswith("moe") else None,
        moe=moe,
    )


if __name__ == "__main__":
    main()
