"""Train a tiny MoE with every kind of router and balancing under several layouts; losses go to a JSON file.

torchrun --nproc-per-node 1 router_worker.py FOLDER      the reference, and the initial checkpoints
torchrun --nproc-per-node 2 router_worker.py FOLDER      EP2, TP2+SP and others, from those checkpoints
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import layout_worker
import numpy as np
import torch
from layout_worker import CP2, EP2, EXPERTS, FULL, PP2, TP2_SP, Run

from btx_megatron.recipe import Layout, Moe
from btx_megatron.runtime import ranks

STEPS = 8
FREE = 1.0 * EXPERTS  # of capacity: nothing is dropped
MOES = {
    "switch": Moe(moe_router_type="switch", moe_expert_capacity_factor=FREE),
    "soft": Moe(moe_router_type="soft"),
    "sample": Moe(moe_router_type="sample_top1", moe_router_temperature_decay=0.1),
    "sample aux": Moe(moe_router_type="sample_top1", moe_router_load_balancing_type="aux_loss"),
    "normalised": Moe(moe_router_logit_norm_scale=1.5),
    "z-loss": Moe(moe_z_loss_coeff=0.01),
    "sequence": Moe(moe_router_load_balancing_type="seq_aux_loss"),
    "global": Moe(moe_router_load_balancing_type="global_aux_loss"),
    "adaptive": Moe(moe_aux_loss_adaptive=True),
    "masked": Moe(moe_router_time_mask=True),
    "masked soft": Moe(moe_router_type="soft", moe_router_time_mask=True),
    "masked sample": Moe(moe_router_type="sample_top1", moe_router_time_mask=True),
    "masked normalised": Moe(moe_router_logit_norm_scale=1.5, moe_router_time_mask=True),
}
MASKED = tuple(kind for kind in MOES if kind.startswith("masked"))
LAYOUTS = {"EP2": EP2, "TP2+SP": TP2_SP, "CP2": CP2}
RECOMPUTED = {
    "kept": Layout(),
    "full": FULL,
    "PP2, full": replace(PP2, **{k: v for k, v in vars(FULL).items() if k.startswith("recompute")}),
}
DROPPING = Moe(moe_router_type="switch", moe_expert_capacity_factor=0.5)


MORE = {"plain": Moe(), "aux": Moe(moe_router_load_balancing_type="aux_loss")}
EQUATIONS = ("plain", "aux", "switch", "soft", "normalised", "z-loss", "sequence", "global")


def equation(kind: str, folder: Path) -> dict[str, Any]:
    """Gates of a router for fixed logits, and the gradient of weighted gates and of its losses."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, pad_routing_map

    from btx_megatron.model.routers import batch_context, routers_of, take_balancing_loss

    router = routers_of(Run(kind, Layout(), folder).trainer.model)[1]
    generator = torch.Generator().manual_seed(11)
    logits = (2 * torch.randn(6, 2, EXPERTS, generator=generator)).requires_grad_()
    weights = torch.randn(12, EXPERTS, generator=generator)
    batch_context.loss_mask = None
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    gates, routes = router.routing(logits)
    pad_routing_map(routes, 4)  # as under FP8: it writes into them
    (gates * weights).sum().backward()
    assert logits.grad is not None
    take_balancing_loss()  # no step's
    tensors = {"logits": logits, "weights": weights, "gates": gates, "grad": logits.grad}
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def masked_experts_silenced(kind: str, layout: Layout, folder: Path) -> list[float]:
    """Held-out loss while experts 2 and 3 are masked; again once all their weights are NaN; and unmasked."""
    from megatron.core import parallel_state

    from btx_megatron.evaluation.loss import held_out_loss

    run, allowed = Run(kind, layout, folder), [True, True, False, False]
    options = (run.trainer.model, windows(8), run.trainer.stage, layout_worker.MODEL.seq_length)
    before = held_out_loss(*options, allowed)
    locals_ = EXPERTS // layout.expert_model_parallel_size
    first = parallel_state.get_expert_model_parallel_rank() * locals_
    for name, weight in run.trainer.model[0].named_parameters():
        expert = re.search(r"local_experts\.(\d+)\.", name)
        if expert and first + int(expert[1]) >= 2:
            weight.data.fill_(float("nan"))
        if name.endswith("router.weight"):
            weight.data[2:] = float("nan")
    return [before, held_out_loss(*options, allowed), held_out_loss(*options)]


def windows(count: int) -> list[tuple[np.ndarray[Any, Any], ...]]:
    """Held-out windows, all of whose tokens count."""
    samples = [layout_worker.RandomSamples()[i] for i in range(count)]
    return [(s["tokens"].numpy(), s["labels"].numpy(), np.ones(len(s["tokens"]))) for s in samples]


def filled_up(layout: Layout, folder: Path) -> list[float]:
    """Held-out loss of one window, with half the room, in batches that empty windows fill up."""
    from btx_megatron.evaluation.loss import held_out_loss

    run = Run("dropping", layout, folder)
    stage, length = run.trainer.stage, layout_worker.MODEL.seq_length
    stages = [replace(stage, training=replace(stage.training, micro_batch_size=size)) for size in (1, 2, 4)]
    return [held_out_loss(run.trainer.model, windows(1), stage, length) for stage in stages]


def resumed(folder: Path) -> dict[str, Any]:
    """Sample Top-1 and adaptive balancing, interrupted half way and not."""
    from btx_megatron.training.checkpoint import resume
    from btx_megatron.training.saver import save

    result = {}
    for kind in ("sample", "adaptive"):
        run = Run(kind, EP2, folder)
        run.steps(STEPS // 2)
        save(folder / f"half-{kind}", run.state, {}, keep=1)
        whole = run.steps(STEPS // 2)
        again = Run(kind, EP2, folder)
        assert resume(folder / f"half-{kind}", again.state)
        result[kind] = {"whole": whole, "resumed": again.steps(STEPS // 2)}
    return result


def dropped(folder: Path) -> dict[str, Any]:
    """Routes that were taken and dropped in one step with half the room."""
    from btx_megatron.model.routers import routers_of

    run = Run("dropping", Layout(), folder)
    run.steps(1)
    routers = routers_of(run.trainer.model)
    return {
        "taken": [router.take_load().tolist() for router in routers.values()],
        "dropped": [int(router.take_drops()) for router in routers.values()],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world = torch.distributed.get_world_size()
    layout_worker.MOES |= MOES | MORE | {"dropping": DROPPING}
    layouts = {"1 process": Layout()} if world == 1 else LAYOUTS
    result: dict[str, Any] = {
        f"{kind} {name}": Run(kind, layout, folder).steps(STEPS)
        for kind in MOES
        for name, layout in layouts.items()
    }
    layout = Layout() if world == 1 else EP2
    result[f"filled up {world}"] = filled_up(layout, folder)
    result[f"silenced {world}"] = {k: masked_experts_silenced(k, layout, folder) for k in MASKED}
    if world == 1:
        result["dropping"] = dropped(folder)
        result["equations"] = {kind: equation(kind, folder) for kind in EQUATIONS}
        equation("sample", folder)  # drawn: that there is a gradient, whatever becomes of the routes
        for name in ("kept", "full"):
            for kind in ("sample", "masked"):
                result[f"{kind} recomputed {name}"] = Run(kind, RECOMPUTED[name], folder).steps(STEPS)
    else:
        for kind in ("sample", "masked"):
            result[f"{kind} recomputed PP2"] = Run(kind, RECOMPUTED["PP2, full"], folder).steps(STEPS)
        result["resumes"] = resumed(folder)
    if torch.distributed.get_rank() == 0:
        (folder / f"routers-{world}.json").write_text(json.dumps(result, indent=1))
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
