"""The training step: Megatron's model, DDP, schedule and optimizer, put together once for every stage.

Shapes: B micro-batch, S sequence. Losses are summed over tokens and divided by the number of tokens of
the whole batch (``calculate_per_token_loss``), so that no layout and no micro-batch size changes them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from btx_megatron.model.build import build_model
from btx_megatron.model.context_parallel import my_part
from btx_megatron.model.routers import batch_context, take_balancing_loss
from btx_megatron.recipe import Recipe, Stage
from btx_megatron.runtime.ranks import device
from btx_megatron.training.adaptive import AdaptiveBalancing
from btx_megatron.training.metrics import StepResult
from btx_megatron.training.optimizer import build_optimizer, build_scheduler

Batch = dict[str, Any]


class Trainer:
    """Model, optimizer and schedule of one stage on this rank.

    Needs ``runtime.ranks.set_layout(stage.layout, seed)`` first.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, *, padded_vocab_size: int, num_experts: int | None
    ) -> None:
        assert stage.training.train_iters is not None
        self.recipe, self.stage = recipe, stage
        self.model = _wrap(build_model(recipe, stage, padded_vocab_size, num_experts), stage)
        """This rank's chunks: one, or several where the pipeline is interleaved."""
        self.optimizer = build_optimizer(self.model, stage)
        self.scheduler: OptimizerParamScheduler = build_scheduler(
            self.optimizer, stage.training, stage.training.train_iters
        )
        self.balanced = False
        self.adaptive: AdaptiveBalancing | None = None
        if num_experts is not None:
            moe = recipe.moe
            self.balanced = moe.moe_router_load_balancing_type != "none" and moe.moe_aux_loss_coeff > 0
            if self.balanced and moe.moe_aux_loss_adaptive:
                layers = recipe.model.num_layers
                self.adaptive = AdaptiveBalancing(layers, num_experts, moe.moe_aux_loss_coeff)
        self._connect()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in a step."""
        training = self.stage.training
        return training.global_batch_size // (
            training.micro_batch_size * self.stage.layout.data_parallel_size
        )

    def step(self, batches: Iterator[Batch], stop_requested: bool = False) -> StepResult:
        """One optimizer step over ``micro_batches`` batches; ``stop_requested`` on any rank reaches all.

        Where the loss or the gradient is not finite nothing moves: no weight, no moment, no schedule.
        """
        started = time.perf_counter()
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = run_micro_batches(
            self.model, batches, self.micro_batches, self.stage, self.recipe.model.seq_length
        )
        balancing = take_balancing_loss()
        loss_sum, tokens, balancing_sum, stops = sum_over_ranks(losses, balancing, float(stop_requested))
        loss = loss_sum / tokens
        learning_rate = self.optimizer.param_groups[0]["lr"]
        done, grad_norm = False, math.nan
        if math.isfinite(loss):
            done, grad_norm, _ = self.optimizer.step()
        if done:  # as in Megatron, the schedule waits where a step is skipped
            self.scheduler.step(increment=self.stage.training.global_batch_size)
        if self.adaptive:
            self.adaptive.update(self.model, move=done)
        seconds = time.perf_counter() - started
        return StepResult(
            lm_loss=loss,
            tokens=int(tokens),
            grad_norm=float(grad_norm),
            learning_rate=learning_rate,
            seconds=seconds,
            balancing_loss=self._mean_balancing(balancing_sum),
            stop=stops > 0,
            skipped=not done,
        )

    def _mean_balancing(self, total: float) -> float | None:
        if not self.balanced:
            return None
        batches = self.micro_batches * self.stage.layout.data_parallel_size
        return total / (batches * self.recipe.model.num_layers)

    def _connect(self) -> None:
        """Hand Megatron's schedules the callbacks that its own training script would."""
        config, layout = get_model_config(self.model[0]), self.stage.layout
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if layout.overlap_grad_reduce:
            config.no_sync_func = _each_or_only([chunk.no_sync for chunk in self.model])
        if layout.overlap_param_gather:
            config.param_sync_func = _each_or_only([chunk.start_param_sync for chunk in self.model])


def _each_or_only(callbacks: list[Any]) -> Any:
    """Megatron wants a list for several chunks, and the callback itself for one."""
    return callbacks if len(callbacks) > 1 else callbacks[0]


def _wrap(model: list[torch.nn.Module], stage: Stage) -> list[DistributedDataParallel]:
    layout = stage.layout
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        fp8_param_gather=stage.training.fp8_param_gather,
    )
    # as in Megatron's training script: the first chunk is the last to have its gradients, and is waited for
    return [
        DistributedDataParallel(get_model_config(chunk), config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model)
    ]


def run_micro_batches(
    model: Sequence[torch.nn.Module],
    batches: Iterator[Batch],
    count: int,
    stage: Stage,
    seq_length: int,
    forward_only: bool = False,
    step: Callable[[Iterator[Batch], torch.nn.Module], tuple[Tensor, Any]] | None = None,
) -> list[Tensor]:
    """``count`` micro-batches through the pipeline, and back; [loss sum, tokens] of each, where they are.

    The last pipeline stage alone has them; ``batches`` moves on by ``count`` in any case.
    """
    each = itertools.tee(batches, len(model))  # every chunk sees every micro-batch, at its own time
    losses: list[Tensor] = get_forward_backward_func()(
        forward_step_func=step or forward_step,
        data_iterator=_each_or_only(list(each)),
        model=list(model),
        num_microbatches=count,
        seq_length=seq_length,
        micro_batch_size=stage.training.micro_batch_size,
        forward_only=forward_only,
    )
    return losses


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron's forward step: per-token losses [B, S], and how to sum them."""
    batch = entered(next(batches))
    output = model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])
    return output, partial(_sum_loss, batch["loss_mask"])


def entered(batch: Batch) -> Batch:
    """A micro-batch on this rank's device, this rank's part of it; routers are told what passes."""
    batch_context.step = int(batch["step"])
    batch_context.sample_index = batch["sample_index"]
    batch_context.each_alone = bool(batch.get("each_alone", False))
    on_device = {key: value.to(device()) for key, value in batch.items() if isinstance(value, torch.Tensor)}
    on_device |= {key: my_part(on_device[key], dim=1) for key in _ALONG_THE_SEQUENCE}
    batch_context.loss_mask = on_device["loss_mask"]
    batch_context.positions = on_device["position_ids"][0]
    batch_context.allowed_experts = on_device.get("allowed_experts")
    return on_device


_ALONG_THE_SEQUENCE = ("tokens", "labels", "loss_mask", "position_ids")


def _sum_loss(mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = (losses_BS.float() * mask_BS).sum()
    tokens = mask_BS.sum()
    return loss, tokens.int(), torch.stack([loss.detach(), tokens])


def sum_over_ranks(losses: list[Tensor], *more: float) -> tuple[float, ...]:
    """Summed loss, its tokens, and sums of further values: equal on all ranks, in one collective.

    The last pipeline stage alone has losses, and its TP ranks hold the same ones.
    """
    total = torch.zeros(2 + len(more), dtype=torch.float64)
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        total[:2] = torch.stack(losses).double().sum(dim=0)
    total[2:] = torch.tensor(more, dtype=torch.float64)
    total = total.to(device())
    torch.distributed.all_reduce(total)
    return tuple(total.tolist())


@contextlib.contextmanager
def evaluating(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The chunks of a model without dropout, gradients or balancing."""
    were_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, was_training in zip(model, were_training, strict=True):
            chunk.train(was_training)
