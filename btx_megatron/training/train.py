"""A training stage from start, or from where it stopped, to its end: seed, expert, MoE, dense baseline."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from btx_megatron.errors import StageFailed, Stopped
from btx_megatron.expert_masks import allowed_experts
from btx_megatron.job import Job
from btx_megatron.recipe import Stage
from btx_megatron.recipe_file import recipe_to_dict
from btx_megatron.runtime import ranks
from btx_megatron.runtime.heartbeat import Heartbeat
from btx_megatron.runtime.stop import stop_requested
from btx_megatron.training.loss_watch import LossWatch

# so that the supervisor names the rank that hangs before the others say that somebody did not come
_LONGER_THAN_THE_SUPERVISOR = timedelta(minutes=1)


def run_training(job: Job) -> dict[str, Any]:
    """Train one stage on this rank; returns what the manifest tells of it.

    Raises Stopped after a checkpoint where a stop was asked for.
    """
    timeout = timedelta(minutes=job.recipe.stage(job.stage).training.distributed_timeout_minutes)
    rank = int(os.environ.get("RANK", "0"))
    with (
        Heartbeat(job.work_folder, rank, timeout.total_seconds()) as heartbeat,
        ranks.joined_ranks(timeout + _LONGER_THAN_THE_SUPERVISOR),
    ):
        return _run_training(job, heartbeat)


def _run_training(job: Job, heartbeat: Heartbeat) -> dict[str, Any]:
    stage = job.recipe.stage(job.stage)
    heartbeat.tell(0, "loading")
    graphs = stage.training.cuda_graph_impl != "none"
    ranks.set_layout(stage.layout, stage.training.seed, graphs)
    # Megatron may be imported only now, behind the CPU backend
    from btx_megatron.training.checkpoint import TrainingState, load_weights, resume
    from btx_megatron.training.reporter import Reporter
    from btx_megatron.training.trainer import Trainer

    statistics = json.loads((job.data_folder / "statistics.json").read_text())
    trainer = Trainer(
        job.recipe,
        stage,
        padded_vocab_size=statistics["padded_vocab_size"],
        num_experts=job.recipe.num_experts(job.stage),
    )
    state = TrainingState(
        trainer.model, trainer.optimizer, trainer.scheduler, stage.layout, adaptive=trainer.adaptive
    )
    if not resume(job.work_folder / "checkpoints", state) and job.load_from is not None:
        weights = load_weights(job.load_from, trainer.model)
        # the fp32 masters were made from the initial weights
        trainer.optimizer.reload_model_params(weights if stage.training.fp8_param_gather else None)
    extra = {"recipe": recipe_to_dict(job.recipe), "vocab_size": statistics["vocab_size"]}
    with Reporter(job, stage, trainer.model, state.iteration) as reporter:
        seconds = _train(job, stage, trainer, state, extra, heartbeat, reporter)
    tokens = state.consumed_samples * job.recipe.model.seq_length
    return {
        "tokens": tokens,
        "iterations": state.iteration,
        "skipped_iterations": state.skips.total,
        "training_seconds": round(seconds, 3),
    }


def _train(
    job: Job,
    stage: Stage,
    trainer: Any,
    state: Any,
    extra: dict[str, Any],
    heartbeat: Heartbeat,
    reporter: Any,
) -> float:
    from btx_megatron.training.communication import CommunicationLog
    from btx_megatron.training.saver import CheckpointSaver, Retention

    training = stage.training
    assert training.train_iters is not None
    first = torch.distributed.get_rank() == 0
    retention = Retention(training.save_total_limit, training.save_retain_interval)
    saver = CheckpointSaver(job.checkpoints, retention, training.async_save)
    watch = LossWatch(state.skips, training.max_consecutive_skipped_steps, training.loss_spike_factor)
    samples = _samples(job, stage)
    if first:
        epochs = ", ".join(f"{source} {count:.2f}" for source, count in samples.epochs.items())
        print(f"epochs over each source: {epochs}", flush=True)
    batches = _batches(job, samples, stage, state.consumed_samples)
    communication = CommunicationLog(job, stage)
    started = time.perf_counter()
    while state.iteration < training.train_iters:
        heartbeat.tell(state.iteration + 1, f"step {state.iteration + 1}")
        with communication.step():
            result = trainer.step(batches, first and stop_requested(job.work_folder))
        state.iteration += 1
        state.consumed_samples += training.global_batch_size
        reporter.step(state.iteration, state.consumed_samples, result)
        _watch_losses(watch, saver, state.iteration, result)
        at_end = state.iteration == training.train_iters
        heartbeat.tell(state.iteration, f"saving after step {state.iteration}")
        last = result.stop or at_end
        if last or state.iteration % training.save_interval == 0:
            saver.save(state, extra, last)
        saver.poll()
        if result.stop and not at_end:
            raise Stopped(f"{job.stage}: stopped and saved at step {state.iteration}")
    communication.close()
    return time.perf_counter() - started


def _watch_losses(watch: LossWatch, saver: Any, iteration: int, result: Any) -> None:
    """Rank 0 tells what is remarkable; where the stage ends over it, the save under way is finished first."""
    try:
        line = watch.step(iteration, result)
    except StageFailed:
        saver.wait()
        raise
    if line and torch.distributed.get_rank() == 0:
        print(line, flush=True)


def _samples(job: Job, stage: Stage) -> Any:
    from btx_megatron.data.blend import TrainingSamples
    from btx_megatron.data.weights import order_seed, stage_blend

    training = stage.training
    assert training.train_iters is not None
    return TrainingSamples(
        job.data_folder,
        job.recipe.domains_of(job.stage),
        stage_blend(job.recipe, job.stage),
        job.recipe.model.seq_length,
        training.train_iters * training.global_batch_size,
        order_seed(job.recipe, job.stage),
        job.work_folder / "cache",
    )


def _batches(job: Job, samples: Any, stage: Stage, consumed_samples: int) -> Iterator[dict[str, Any]]:
    from megatron.core import parallel_state

    from btx_megatron.data.loader import loader

    batches = loader(job.recipe.data.loader, ranks.device())(
        samples,
        consumed_samples=consumed_samples,
        micro_batch_size=stage.training.micro_batch_size,
        global_batch_size=stage.training.global_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    if job.recipe.num_experts(job.stage) and job.recipe.moe.moe_router_time_mask:
        return _masked_by_time(batches, job, samples)
    return batches


def _masked_by_time(batches: Iterator[dict[str, Any]], job: Job, samples: Any) -> Iterator[dict[str, Any]]:
    """Micro-batches that say which experts each sample may take, by the domain that it is drawn from."""
    recipe = job.recipe
    allowed_DE = torch.tensor([allowed_experts(recipe, domain, job.stage) for domain in recipe.domain_names])
    for batch in batches:
        domain_B = samples.domain_numbers(batch["sample_index"].numpy())
        yield batch | {"allowed_experts": allowed_DE[torch.from_numpy(domain_B)]}
