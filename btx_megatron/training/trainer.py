"""The training step: Megatron's model, DDP, schedule and optimizer, put together once for every stage.

Shapes: B micro-batch, S sequence. Losses are summed over tokens and divided by the number of tokens of
the whole batch (``calculate_per_token_loss``), so that no layout and no micro-batch size changes them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from btx_megatron.errors import StageFailed
from btx_megatron.model.build import build_model
from btx_megatron.model.routers import batch_context, take_balancing_loss
from btx_megatron.recipe import Recipe, Stage
from btx_megatron.runtime.ranks import device
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
        self.optimizer: MegatronOptimizer = build_optimizer(self.model, stage)
        self.scheduler: OptimizerParamScheduler = build_scheduler(
            self.optimizer, stage.training, stage.training.train_iters
        )
        balancing = recipe.moe.moe_router_load_balancing_type != "none" and recipe.moe.moe_aux_loss_coeff > 0
        self.balanced = num_experts is not None and balancing
        self._connect()
        self._run = get_forward_backward_func()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in a step."""
        training = self.stage.training
        return training.global_batch_size // (
            training.micro_batch_size * self.stage.layout.data_parallel_size
        )

    def step(self, batches: Iterator[Batch], stop_requested: bool = False) -> StepResult:
        """One optimizer step over ``micro_batches`` batches; ``stop_requested`` on any rank reaches all."""
        started = time.perf_counter()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=self.micro_batches,
            seq_length=self.recipe.model.seq_length,
            micro_batch_size=self.stage.training.micro_batch_size,
            forward_only=False,
        )
        balancing = take_balancing_loss()
        loss_sum, tokens, balancing_sum, stops = sum_over_ranks(losses, balancing, float(stop_requested))
        loss = loss_sum / tokens
        if not math.isfinite(loss):
            raise StageFailed(f"the loss is {loss}: lower training.lr, or look at the data of this step")
        learning_rate = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise StageFailed(f"the gradient's norm is {grad_norm}; nothing of this step is saved")
        self.scheduler.step(increment=self.stage.training.global_batch_size)
        seconds = time.perf_counter() - started
        return StepResult(
            lm_loss=loss,
            tokens=int(tokens),
            grad_norm=float(grad_norm or 0.0),
            learning_rate=learning_rate,
            seconds=seconds,
            balancing_loss=self._mean_balancing(balancing_sum),
            stop=stops > 0,
        )

    def _mean_balancing(self, total: float) -> float | None:
        if not self.balanced:
            return None
        batches = self.micro_batches * self.stage.layout.data_parallel_size
        return total / (batches * self.recipe.model.num_layers)

    def _connect(self) -> None:
        """Hand Megatron's schedules the callbacks that its own training script would."""
        config, layout = get_model_config(self.model), self.stage.layout
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if layout.overlap_grad_reduce:
            config.no_sync_func = self.model.no_sync
        if layout.overlap_param_gather:
            config.param_sync_func = self.model.start_param_sync


def _wrap(model: torch.nn.Module, stage: Stage) -> DistributedDataParallel:
    layout = stage.layout
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
        use_distributed_optimizer=layout.use_distributed_optimizer,
    )
    return DistributedDataParallel(get_model_config(model), config, model)


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron's forward step: per-token losses [B, S], and how to sum them."""
    batch = next(batches)
    batch_context.step = int(batch["step"])
    batch_context.sample_index = batch["sample_index"]
    on_device = {key: value.to(device()) for key, value in batch.items() if key != "step"}
    batch_context.loss_mask = on_device["loss_mask"]
    output = model(
        on_device["tokens"], on_device["position_ids"], attention_mask=None, labels=on_device["labels"]
    )
    return output, partial(_sum_loss, on_device["loss_mask"])


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
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout, gradients or balancing."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
