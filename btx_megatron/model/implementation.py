"""Which layers a rank builds, Megatron's own or Transformer Engine's, and what its GPU must be able to do."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from btx_megatron.errors import UserError
from btx_megatron.recipe import Launch, Stage, Training
from btx_megatron.recipe_gpu_checks import (
    minimum_capability,
    needed_capability,
    needs_transformer_engine,
)
from btx_megatron.runtime.cpu_backend import have_cuda

LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"


def transformer_impl(launch: Launch, training: Training) -> str:
    """``local`` or ``transformer_engine``. Raises UserError where the recipe asks for what is not here.

    In fp32 the local layers are the default: Transformer Engine's fast attention knows 16 bits alone.
    """
    installed = find_spec("transformer_engine") is not None
    if launch.transformer_impl == TRANSFORMER_ENGINE and not (installed and have_cuda()):
        lacking = "there is no GPU" if installed else "the package transformer_engine is not installed"
        raise UserError(
            f"launch.transformer_impl transformer_engine: {lacking} here; set it to null or local"
        )
    default = TRANSFORMER_ENGINE if installed and have_cuda() and training.bf16 else LOCAL
    return launch.transformer_impl or default


def check_stage(stage: Stage, impl: str) -> None:
    """Raise UserError where a stage asks for something that this rank cannot do; ``impl``: its layers."""
    for asked in needs_transformer_engine(stage) if impl != TRANSFORMER_ENGINE else ():
        raise UserError(
            f"{asked} needs Transformer Engine's layers, and this rank builds local ones, on "
            f"{_device_name()}; install the extra 'gpu', or leave it out"
        )
    training = stage.training
    if training.fp8 is not None and torch.cuda.get_device_capability() < minimum_capability(training):
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"training.fp8 {training.fp8} with fp8_recipe {training.fp8_recipe} needs "
            f"{needed_capability(training)}; this is {_device_name()}, {major}.{minor}; leave fp8 out"
        )


def _device_name() -> str:
    return torch.cuda.get_device_name() if have_cuda() else "a CPU"
