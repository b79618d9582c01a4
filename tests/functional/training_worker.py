"""What one optimizer step does, laid open: gradients, rates, moments, initial weights; kept for the tests.

torchrun --nproc-per-node 1 training_worker.py FOLDER      one process: the step itself
torchrun --nproc-per-node 2 training_worker.py FOLDER      two: initial weights of each rank, a shared end
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layout_worker import (
    DP2_DISTRIBUTED,
    EP2,
    EXPERTS,
    MODEL,
    PP2,
    TP2_SP,
    VOCABULARY,
    RandomSamples,
    gates_of,
)
from torch import Tensor

from btx_megatron.checkpoints.tracker import latest_checkpoint
from btx_megatron.data.blend import batches
from btx_megatron.data.folder import read_statistics
from btx_megatron.data.prepare import prepare
from btx_megatron.errors import StageFailed
from btx_megatron.job import Job
from btx_megatron.mixing.hashes import hash_tensors
from btx_megatron.recipe import Data, Domain, Layout, Moe, Recipe, Source, Stage, Stages, Tokenizer, Training
from btx_megatron.runtime import ranks

Weights = dict[str, Tensor]
Balance = Callable[[Tensor], Tensor]

ALPHA = 0.01
BETA1, BETA2 = 0.9, 0.95
# six micro-batches a step; the full learning rate from the first step on; no clipping
STEP = Training(
    train_iters=4,
    micro_batch_size=2,
    global_batch_size=12,
    lr=0.1,
    lr_decay_style="constant",
    lr_warmup_iters=0,
    weight_decay=0.0,
    adam_beta1=BETA1,
    adam_beta2=BETA2,
    clip_grad=0.0,
)
DECAY, CLIP = 0.1, 0.05

OVERLAP = replace(DP2_DISTRIBUTED, overlap_grad_reduce=True, overlap_param_gather=True)
LAYOUTS = {"EP2": EP2, "TP2+SP": TP2_SP, "PP2": PP2}
"""Where the gradient of balancing is held against one process."""

BREAKING: dict[str, tuple[Layout, dict[str, Any]]] = {
    "PP2": (PP2, {}),
    "TP2": (TP2_SP, {}),
    "EP2": (EP2, {}),
    "DP2": (Layout(data_parallel_size=2), {"experts": None}),
    "DP2, overlap": (OVERLAP, {"experts": None}),
    "DP2, overlap, bf16": (OVERLAP, {"experts": None, "bf16": True}),
}
"""Where one rank's gradient, or the loss, breaks."""

ITERATIONS, WARMUP, PEAK, LOWEST = 12, 4, 1e-2, 1e-3
SCHEDULE = Training(
    train_iters=ITERATIONS, micro_batch_size=2, global_batch_size=4, lr=PEAK, lr_warmup_iters=WARMUP
)
SCHEDULES = {
    "cosine": replace(SCHEDULE, lr_decay_style="cosine", min_lr=LOWEST),
    "linear": replace(SCHEDULE, lr_decay_style="linear", min_lr=LOWEST),
    "constant": replace(SCHEDULE, lr_decay_style="constant", min_lr=LOWEST),
    "lowest is a tenth": replace(SCHEDULE, lr_decay_style="linear"),
    "no warm-up": replace(SCHEDULE, lr_decay_style="linear", min_lr=LOWEST, lr_warmup_iters=0),
    "all warm-up": replace(SCHEDULE, lr_warmup_iters=100),
}


def new_trainer(
    training: Training,
    *,
    moe: Moe | None = None,
    layout: Layout | None = None,
    experts: int | None = EXPERTS,
    **model: Any,
) -> Any:
    """A trainer whose weights depend on the model and the layout alone; routers prefer some experts."""
    layout = layout or Layout()
    ranks.set_layout(layout, seed=7)
    from btx_megatron.training.trainer import Trainer

    recipe = Recipe(model=replace(MODEL, init_method_std=0.1, **model), training=training, moe=moe or Moe())
    stage = Stage(training=training, layout=layout)
    return Trainer(recipe, stage, padded_vocab_size=VOCABULARY, num_experts=experts)


def stream(training: Training, layout: Layout | None = None) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches, from the first sample on."""
    shards = layout.data_parallel_size if layout else 1
    return batches(
        RandomSamples(),  # type: ignore[arg-type]
        consumed_samples=0,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        data_parallel_rank=torch.distributed.get_rank() % shards,
        data_parallel_size=shards,
    )


def weights_of(trainer: Any) -> Weights:
    """Copies of this rank's weights, by their names in the model."""
    return {name: weight.detach().clone() for name, weight in trainer.model[0].module.named_parameters()}


def gradients_of(trainer: Any) -> Weights:
    """Copies of the gradients of the last step as the optimizer took them (clipped, if they were)."""
    return {name: weight.main_grad.clone() for name, weight in trainer.model[0].module.named_parameters()}


def moments_of(trainer: Any, moment: str) -> Weights:
    """Copies of AdamW's state (``exp_avg``, ``exp_avg_sq``), by the names of the weights."""
    states: dict[Tensor, Any] = {}
    for optimizer in trainer.optimizer.chained_optimizers:
        states |= optimizer.optimizer.state
    named = trainer.model[0].module.named_parameters()
    return {name: states[weight][moment].clone() for name, weight in named}


def soft_balance(logits_TE: Tensor) -> Tensor:
    """The paper's N * sum_i u_i p_i: u the mean gate value, p the mean probability."""
    return EXPERTS * (gates_of(logits_TE).mean(0) * logits_TE.softmax(-1).mean(0)).sum()


def switch_balance(logits_TE: Tensor) -> Tensor:
    """Switch's N * sum_i f_i p_i: f the share of the routes that went to expert i."""
    routes = torch.nn.functional.one_hot(logits_TE.topk(2, dim=-1).indices, EXPERTS)
    return EXPERTS * (routes.float().mean((0, 1)) * logits_TE.softmax(-1).mean(0)).sum()


BALANCES: dict[str, Balance] = {
    "btx": soft_balance,
    "aux_loss": switch_balance,
    "global_aux_loss": switch_balance,
}


def training_for(kind: str, layout: Layout | None = None) -> Training:
    """The global loss is of the whole batch where all of it is one micro-batch, on the DP ranks together."""
    if kind != "global_aux_loss":
        return STEP
    ranks_of_data = layout.data_parallel_size if layout else 1
    return replace(STEP, micro_batch_size=STEP.global_batch_size // ranks_of_data)


def objective(trainer: Any, balance: Balance) -> tuple[Tensor, Tensor]:
    """What the paper trains on, without alpha, with its graph: mean loss a token of the whole batch, and
    the balancing loss summed over layers and averaged over micro-batches, from the routers' inputs."""
    from btx_megatron.model.routers import batch_context

    batch_context.loss_mask = None  # that of an earlier step
    model, seen = trainer.model[0].module, []
    routers = [module for name, module in model.named_modules() if name.endswith(".router")]
    for router in routers:
        router.register_forward_pre_hook(lambda router, inputs: seen.append(inputs[0] @ router.weight.T))
    losses, balancing = [], []
    for _, batch in zip(range(trainer.micro_batches), stream(trainer.stage.training), strict=False):
        losses.append(
            model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])
        )
        assert len(seen) == len(routers) == MODEL.num_layers
        balancing.append(torch.stack([balance(logits.flatten(0, 1)) for logits in seen]).sum())
        seen.clear()
    return torch.cat(losses).mean(), torch.stack(balancing).mean()


def save_initial(path: Path) -> None:
    """The weights that every layout starts from, where gradients are compared."""
    from btx_megatron.training.checkpoint import TrainingState
    from btx_megatron.training.saver import save

    trainer = new_trainer(STEP)
    save(path, TrainingState(trainer.model, trainer.optimizer, trainer.scheduler, Layout()), {}, keep=1)


def balancing_case(kind: str, initial: Path) -> dict[str, Any]:
    """Gradients with and without balancing, and those that autograd finds for the paper's objective."""
    from btx_megatron.training.checkpoint import load_weights

    moe = Moe(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=ALPHA)  # type: ignore[arg-type]
    training = training_for(kind)
    reference = new_trainer(training, moe=replace(moe, moe_aux_loss_coeff=0.0))
    load_weights(initial, reference.model)
    lm_loss, balancing_loss = objective(reference, BALANCES[kind])
    names, parameters = zip(*reference.model[0].module.named_parameters(), strict=True)
    case: dict[str, Any] = {"lm_loss": lm_loss.item(), "balancing_loss": balancing_loss.item()}
    for name, value in (("of lm_loss", lm_loss), ("of balancing", ALPHA * balancing_loss)):
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        case[name] = dict(zip(names, gradients, strict=True))
    for name, coefficient in (("without", 0.0), ("with", ALPHA)):
        trainer = new_trainer(training, moe=replace(moe, moe_aux_loss_coeff=coefficient))
        load_weights(initial, trainer.model)
        case[f"step {name}"] = trainer.step(stream(training))
        case[name] = gradients_of(trainer)
    return case


def router_gradients(kind: str, layout: Layout, initial: Path) -> list[dict[int, Tensor]]:
    """What balancing adds to the gradient of each router, by layer; of both ranks."""
    from btx_megatron.training.checkpoint import load_weights

    found: list[dict[int, Tensor]] = []
    training = training_for(kind, layout)
    for coefficient in (0.0, ALPHA):
        moe = Moe(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=coefficient)  # type: ignore[arg-type]
        trainer = new_trainer(training, moe=moe, layout=layout)
        load_weights(initial, trainer.model)
        trainer.step(stream(training, layout))
        layers = trainer.model[0].module.decoder.layers
        found.append({layer.layer_number - 1: layer.mlp.router.weight.main_grad.clone() for layer in layers})
    without, balanced = found
    return both({number: balanced[number] - without[number] for number in without})


def schedule_case(training: Training) -> dict[str, Any]:
    """The learning rate of every step, and the one that a step after the last would take."""
    trainer, samples = new_trainer(training, experts=None), stream(training)
    rates = [trainer.step(samples).learning_rate for _ in range(ITERATIONS)]
    return {"rates": rates, "next": trainer.optimizer.param_groups[0]["lr"]}


def step_case(**options: Any) -> dict[str, Any]:
    """Everything about one first step."""
    training = replace(STEP, **options)
    trainer = new_trainer(training)
    before = weights_of(trainer)
    result = trainer.step(stream(training))
    return {
        "before": before,
        "after": weights_of(trainer),
        "gradient": gradients_of(trainer),
        "exp_avg": moments_of(trainer, "exp_avg"),
        "exp_avg_sq": moments_of(trainer, "exp_avg_sq"),
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
    }


def overflow(trainer: Any) -> None:
    """Logits and loss stay what they were, while the last norm's gradient is so large (about 1e30, yet
    finite) that the sum of its squares is not: as when weights drift far apart."""
    parameters = dict(trainer.model[0].module.named_parameters())
    with torch.no_grad():
        parameters["decoder.final_layernorm.weight"] *= 1e-30
        parameters["output_layer.weight"] *= 1e30


def broken_gradient(value: float) -> Callable[[Any], None]:
    """One entry of the gradient of the first layer's fc2 of each expert (or of the feed-forward) breaks, in
    the next step alone."""

    def provoke(trainer: Any) -> None:
        def break_one(gradient: Tensor) -> Tensor:
            broken = gradient.clone()
            broken.view(-1)[3] = value
            return broken

        for name, parameter in trainer.model[0].module.named_parameters():
            if "layers.0." in name and "linear_fc2" in name:
                handles.append(parameter.register_hook(break_one))

    handles: list[Any] = []
    provoke.mend = lambda: [handle.remove() for handle in handles]  # type: ignore[attr-defined]
    return provoke


def broken_loss(trainer: Any) -> None:
    """The loss is not a number."""
    for name, parameter in trainer.model[0].module.named_parameters():
        if name.endswith("output_layer.weight"):  # on the last stage
            with torch.no_grad():
                parameter[0, 0] = float("nan")


def everything_of(trainer: Any) -> list[bytes]:
    """All that a step moves: weights, masters, moments and their counters, the schedule."""
    tensors = list(trainer.model[0].module.parameters())
    for chained in trainer.optimizer.chained_optimizers:
        tensors += [parameter for group in chained.optimizer.param_groups for parameter in group["params"]]
        tensors += [
            value
            for state in chained.optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        ]
    found = [tensor.detach().float().numpy().tobytes() for tensor in tensors]
    return [*found, str(trainer.scheduler.state_dict()).encode()]


def skipped_step(provoke: Callable[[Any], None], clip_grad: float = 1.0, **options: Any) -> dict[str, Any]:
    """What a step says, and whether it moves anything, that was provoked to fail after a good one."""
    training = replace(STEP, clip_grad=clip_grad, bf16=options.pop("bf16", False))
    trainer = new_trainer(training, **options)
    samples = stream(training, options.get("layout"))
    good = trainer.step(samples)
    if options.get("layout") == OVERLAP:  # the new weights would come in the next forward pass only
        with torch.no_grad():
            trainer.model[0].start_param_sync(force_sync=True)
    provoke(trainer)
    before = everything_of(trainer)
    result = trainer.step(samples)
    return {
        "good": good.skipped,
        "skipped": result.skipped,
        "loss": result.lm_loss,
        "grad_norm": result.grad_norm,
        "unmoved": everything_of(trainer) == before,
        "told": len(before),
    }


def failures() -> dict[str, dict[str, Any]]:
    """Gradients whose norm is not finite under a loss that is, and a loss that is not."""
    return {
        "overflow": skipped_step(overflow),
        "overflow, dense": skipped_step(overflow, experts=None),
        "overflow, no clipping": skipped_step(overflow, clip_grad=0.0),
        "inf": skipped_step(broken_gradient(float("inf"))),
        "nan": skipped_step(broken_gradient(float("nan"))),
        "inf, no clipping": skipped_step(broken_gradient(float("inf")), clip_grad=0.0),
        "nan, bf16": skipped_step(broken_gradient(float("nan")), bf16=True),
        "loss": skipped_step(broken_loss),
    }


def beside_a_skipped_step() -> dict[str, list[float]]:
    """Losses of three batches, and of the same with a step that is skipped before the last."""
    losses: dict[str, list[float]] = {}
    for name in ("whole", "skipped"):
        trainer, samples = new_trainer(STEP), stream(STEP)
        batches_of_steps = [[next(samples) for _ in range(trainer.micro_batches)] for _ in range(3)]
        told = [trainer.step(iter(batches_of_steps[0])), trainer.step(iter(batches_of_steps[1]))]
        if name == "skipped":
            provoke = broken_gradient(float("nan"))
            provoke(trainer)
            assert trainer.step(iter(batches_of_steps[0])).skipped
            provoke.mend()  # type: ignore[attr-defined]
        told.append(trainer.step(iter(batches_of_steps[2])))
        losses[name] = [one.lm_loss for one in told]
    return losses


def prepared_run(folder: Path) -> Job:
    """A run folder with data, and the job of its seed."""
    source = Source(name="json", path="package:json", include=["*.py"])
    training = replace(
        STEP,
        train_iters=9,
        micro_batch_size=1,
        global_batch_size=2,
        clip_grad=1.0,
        save_interval=2,
        save_total_limit=9,
        max_consecutive_skipped_steps=3,
    )
    recipe = Recipe(
        run_folder=str(folder / "run"),
        data=Data(domains=[Domain(name="json", sources=[source])], held_out_fraction=0.2, num_workers=1),
        tokenizer=Tokenizer(vocab_size=600),
        model=MODEL,
        training=training,
        stages=Stages(seed=Stage(training=training)),
    )
    job = Job("train", "seed", recipe, run_folder=folder / "run", work_folder=folder / "work")
    for path in (job.data_folder, job.work_folder):
        path.mkdir(parents=True)
    prepare(recipe, job.data_folder, lambda phase, done, total: None)
    return job


def save_poisoned(job: Job) -> None:
    """A checkpoint of one step whose next gradient has no finite norm."""
    from btx_megatron.training.checkpoint import TrainingState
    from btx_megatron.training.saver import save
    from btx_megatron.training.trainer import Trainer

    ranks.set_layout(Layout(), seed=7)
    size = read_statistics(job.data_folder)["padded_vocab_size"]
    stage = job.recipe.stages.seed
    trainer = Trainer(job.recipe, stage, padded_vocab_size=size, num_experts=None)
    trainer.step(stream(stage.training))
    overflow(trainer)
    batch = stage.training.global_batch_size
    state = TrainingState(trainer.model, trainer.optimizer, trainer.scheduler, Layout(), 1, batch)
    save(job.checkpoints, state, {}, keep=1)


def files_of(job: Job) -> dict[str, Any]:
    """What the stage has saved."""
    checkpoints = job.checkpoints
    latest = latest_checkpoint(checkpoints)
    losses = job.work_folder / "losses.jsonl"
    return {
        "latest": latest and latest.name,
        "names": sorted(path.name for path in checkpoints.iterdir()),
        "hashes": hash_tensors(checkpoints),
        "steps told": [json.loads(line) for line in losses.read_text().splitlines()]
        if losses.exists()
        else [],
    }


def failing_stage(folder: Path) -> dict[str, Any]:
    """A whole stage that goes on from a poisoned checkpoint: every step is skipped. Ends the ranks."""
    from btx_megatron.training.train import run_training

    job = prepared_run(folder)
    save_poisoned(job)
    before, message = files_of(job), ""
    ranks.stop_ranks()
    try:
        run_training(job)
    except StageFailed as error:
        message = str(error)
    return {"message": message, "before": before, "after": files_of(job)}


def one_process(folder: Path) -> dict[str, Any]:
    """Everything that one process can tell. Ends the ranks."""
    save_initial(folder / "initial")
    return {
        "balancing": {kind: balancing_case(kind, folder / "initial") for kind in BALANCES},
        "schedules": {name: schedule_case(training) for name, training in SCHEDULES.items()},
        "plain": step_case(),
        "decayed": step_case(weight_decay=DECAY),
        "clipped": step_case(clip_grad=CLIP),
        "clip far away": step_case(clip_grad=1e6),
        "failures": failures(),
        "beside": beside_a_skipped_step(),
        "stage": failing_stage(folder),
    }


def both(mine: Any) -> list[Any]:
    """Of both ranks."""
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def on_rank_0(provoke: Callable[[Any], None]) -> Callable[[Any], None]:
    """Provoke the first rank alone."""
    return provoke if torch.distributed.get_rank() == 0 else lambda trainer: None


def two_ranks(folder: Path) -> dict[str, Any]:
    """Everything that takes two; lists have an entry a rank."""
    tied = {"untie_embeddings_and_output_weights": False}
    drawn: dict[str, tuple[Layout, dict[str, Any]]] = {
        "PP2": (PP2, {}),
        "PP2, tied": (PP2, tied),
        "TP2": (TP2_SP, {}),
        "DP2": (Layout(data_parallel_size=2), {}),
    }
    return {
        "drawn": {
            name: both(weights_of(new_trainer(STEP, layout=layout, **model)))
            for name, (layout, model) in drawn.items()
        },
        "balancing": {
            (kind, name): router_gradients(kind, layout, folder / "initial")
            for kind in BALANCES
            for name, layout in LAYOUTS.items()
        },
        "failures": {
            name: both(skipped_step(on_rank_0(broken_gradient(float("inf"))), layout=layout, **options))
            for name, (layout, options) in BREAKING.items()
        },
        "loss": {
            name: both(skipped_step(broken_loss, layout=layout, **options))
            for name, (layout, options) in BREAKING.items()
        },
    }


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    result = one_process(folder) if world == 1 else two_ranks(folder)
    if rank == 0:
        torch.save(result, folder / f"training-{world}.pt")
    if torch.distributed.is_initialized():
        ranks.stop_ranks()


if __name__ == "__main__":
    main()
