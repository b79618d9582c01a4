"""AdamW and its schedule, from Megatron: fp32 masters under bf16, optionally cut over the DP ranks.

Weight decay follows Megatron: matrices decay (the router's too), one-dimensional weights do not.

Without Transformer Engine and apex Megatron falls back to torch's AdamW, whose ``step`` is a tensor for
each parameter. Its distributed optimizer can save that state but not load it, and afterwards all
parameters share one ``step`` tensor, which every parameter then advances: a silently wrong resume.
``ready_for_loading`` and ``unshare_steps`` mend both ends. This is so on a GPU without TE as well.
Nor does Megatron ask torch for its fused kernel, which takes one pass where the default takes ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from btx_megatron.recipe import Stage, Training
from btx_megatron.training.finite import FiniteOptimizer


def build_optimizer(model: Sequence[DistributedDataParallel], stage: Stage) -> FiniteOptimizer:
    """Megatron's optimizer over this rank's parameters; experts and the rest have one each, chained.

    Where all weights of one are frozen Megatron leaves an empty one in the chain, which cannot be saved.
    """
    training, layout = stage.training, stage.layout
    config = OptimizerConfig(
        optimizer=training.optimizer,
        lr=training.lr,
        min_lr=minimum_lr(training),
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.bf16,
        params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        use_distributed_optimizer=layout.use_distributed_optimizer,
        overlap_param_gather=layout.overlap_param_gather,
        fp8_recipe=training.fp8_recipe if training.fp8 else None,
    )
    optimizer = get_megatron_optimizer(config, list(model), use_gloo_process_groups=False)
    chained = [inner for inner in optimizer.chained_optimizers if inner.optimizer is not None]
    finite = FiniteOptimizer(chained)
    _fuse(finite)
    return finite


def build_scheduler(
    optimizer: MegatronOptimizer, training: Training, train_iters: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then the recipe's decay to ``min_lr``; counted in samples.

    Megatron's convention: step k takes the value after k - 1 steps, so with warm-up the first step has
    rate 0, and ``min_lr`` is reached after the last.
    """
    batch = training.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=minimum_lr(training),
        lr_warmup_steps=min(training.lr_warmup_iters, train_iters - 1) * batch,
        lr_decay_steps=train_iters * batch,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=train_iters * batch,
        wd_incr_style="constant",
    )


def minimum_lr(training: Training) -> float:
    """The learning rate at the end of the schedule: a tenth of the peak unless the recipe says otherwise."""
    return training.lr / 10 if training.min_lr is None else training.min_lr


def ready_for_loading(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state that Megatron expects to find before it loads a checkpoint."""
    for inner in _distributed_torch_adams(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter.data)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data)


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a ``step`` of its own again after a checkpoint was loaded."""
    _fuse(optimizer)  # the groups' options came with the checkpoint
    for inner in _torch_adams(optimizer):
        for parameter, state in inner.state.items():
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).clone().to(parameter.device)


def _fuse(optimizer: MegatronOptimizer) -> None:
    for inner in _torch_adams(optimizer):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(chained.optimizer, torch.optim.Adam):
            yield chained.optimizer


def _distributed_torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(chained, DistributedOptimizer):
            yield from _torch_adams(chained)


def _skip_step_when_copying() -> None:
    """Megatron copies every tensor of a parameter's state from the checkpoint, ``step`` among them,
    which its format keeps elsewhere: a KeyError without this."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def copy_states(self: DistributedOptimizer, model_param: Any, tensors: dict[str, Any]) -> None:
        original(self, model_param, {"step": None, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = copy_states


_skip_step_when_copying()
