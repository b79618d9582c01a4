"""A training stage from start, or from where it stopped, to its end: seed, expert, MoE, dense baseline."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import torch

from btx_megatron.errors import Stopped
from btx_megatron.job import Job
from btx_megatron.recipe import Stage
from btx_megatron.recipe_file import recipe_to_dict
from btx_megatron.runtime import ranks
from btx_megatron.runtime.progress import Progress
from btx_megatron.runtime.stop import stop_requested
from btx_megatron.training.metrics import LossFile, iteration_line


def run_training(job: Job) -> dict[str, Any]:
    """Train one stage on this rank; returns what the manifest tells of it.

    Raises Stopped after a checkpoint where a stop was asked for.
    """
    with ranks.joined_ranks():
        return _run_training(job)


def _run_training(job: Job) -> dict[str, Any]:
    stage = job.recipe.stage(job.stage)
    ranks.set_layout(stage.layout, stage.training.seed)
    # Megatron may be imported only now, behind the CPU backend
    from btx_megatron.training.checkpoint import TrainingState, load_weights, resume
    from btx_megatron.training.trainer import Trainer

    statistics = json.loads((job.data_folder / "statistics.json").read_text())
    trainer = Trainer(
        job.recipe,
        stage,
        padded_vocab_size=statistics["padded_vocab_size"],
        num_experts=len(job.recipe.expert_names) if job.stage == "finetune" else None,
    )
    state = TrainingState(trainer.model, trainer.optimizer, trainer.scheduler, stage.layout)
    if not resume(job.work_folder / "checkpoints", state) and job.load_from is not None:
        load_weights(job.load_from, trainer.model)
        trainer.optimizer.reload_model_params()  # the fp32 masters were made from the initial weights
    extra = {"recipe": recipe_to_dict(job.recipe), "vocab_size": statistics["vocab_size"]}
    seconds = _train(job, stage, trainer, state, extra)
    tokens = state.consumed_samples * job.recipe.model.seq_length
    return {"tokens": tokens, "iterations": state.iteration, "training_seconds": round(seconds, 3)}


def _train(job: Job, stage: Stage, trainer: Any, state: Any, extra: dict[str, Any]) -> float:
    from btx_megatron.training.checkpoint import save

    training = stage.training
    assert training.train_iters is not None
    first = torch.distributed.get_rank() == 0
    folder = job.work_folder / "checkpoints"
    reporter = _Reporter(job, stage, state.iteration) if first else None
    samples = _samples(job, stage)
    if first:
        epochs = ", ".join(f"{source} {count:.2f}" for source, count in samples.epochs.items())
        print(f"epochs over each source: {epochs}", flush=True)
    batches = _batches(samples, stage, state.consumed_samples)
    started = time.perf_counter()
    while state.iteration < training.train_iters:
        result = trainer.step(batches, first and stop_requested(job.work_folder))
        state.iteration += 1
        state.consumed_samples += training.global_batch_size
        if reporter:
            reporter.step(state.iteration, state.consumed_samples, result)
        at_end = state.iteration == training.train_iters
        if result.stop or at_end or state.iteration % training.save_interval == 0:
            save(folder, state, extra, training.save_total_limit)
        if result.stop and not at_end:
            raise Stopped(f"{job.stage}: stopped and saved at step {state.iteration}")
    if reporter:
        reporter.close()
    return time.perf_counter() - started


def _samples(job: Job, stage: Stage) -> Any:
    from btx_megatron.data.blend import TrainingSamples

    training = stage.training
    assert training.train_iters is not None
    return TrainingSamples(
        job.data_folder,
        job.recipe.data.domains,
        blend_of(job, stage),
        job.recipe.model.seq_length,
        training.train_iters * training.global_batch_size,
        training.seed,
        job.work_folder / "cache",
    )


def _batches(samples: Any, stage: Stage, consumed_samples: int) -> Iterator[dict[str, Any]]:
    from megatron.core import parallel_state

    from btx_megatron.data.blend import batches

    return batches(
        samples,
        consumed_samples=consumed_samples,
        micro_batch_size=stage.training.micro_batch_size,
        global_batch_size=stage.training.global_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def blend_of(job: Job, stage: Stage) -> dict[str, float]:
    """Sampling weight of each domain: the stage's own, or its kind's default (see ``recipe.Stage.blend``)."""
    kind, _, domain = job.stage.partition(":")
    if not stage.blend and kind == "dense":
        stage = job.recipe.stages.finetune
    if stage.blend:
        return dict(stage.blend)
    return {domain: 1.0} if kind == "expert" else dict.fromkeys(job.recipe.domain_names, 1.0)


class _Reporter:
    """Rank 0 tells: a line in the log, a line in losses.jsonl, the progress bar."""

    def __init__(self, job: Job, stage: Stage, done: int) -> None:
        self.training, self.sequence = stage.training, job.recipe.model.seq_length
        self.losses = LossFile(job.work_folder / "losses.jsonl", done)
        self.progress = Progress(job.work_folder)
        self.seconds: list[float] = []

    def step(self, iteration: int, consumed_samples: int, result: Any) -> None:
        total = self.training.train_iters or 0
        self.losses.write(iteration, consumed_samples * self.sequence, result)
        self.progress.update("training", iteration, total, f"loss {result.lm_loss:.3f}")
        self.seconds.append(result.seconds)
        if iteration % self.training.log_interval == 0 or iteration == total:
            mean_ms = 1000 * sum(self.seconds) / len(self.seconds)
            batch = self.training.global_batch_size
            print(iteration_line(iteration, total, consumed_samples, batch, mean_ms, result), flush=True)
            self.seconds.clear()

    def close(self) -> None:
        self.losses.close()
