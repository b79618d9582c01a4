"""A model in this very process, in fp32 and through Megatron, for a look at its weights: no training.

What is planned (a checkpoint's copy, an average) goes into a temporary folder first and is loaded from there
as every stage loads, so what is looked at is what a stage would get.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import write_checkpoint
from btx_megatron.checkpoints.names import ROUTER
from btx_megatron.checkpoints.stream import PlannedTensor
from btx_megatron.errors import UserError
from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage, Training

if TYPE_CHECKING:
    import torch

EMBEDDING = "embedding.word_embeddings.weight"
_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Loaded:
    """A model that holds its weights."""

    model: list[torch.nn.Module]
    stage: Stage
    seq_length: int


def need_megatron(option: str) -> None:
    """Raise UserError where Megatron is not installed."""
    if find_spec("megatron") is None:
        raise UserError(f"{option} needs Megatron, which is not installed here; install the extra 'train'")


@contextmanager
def loaded_model(plan: list[PlannedTensor], config: ModelConfig, seq_length: int) -> Iterator[Loaded]:
    """The model of a plan, dense or a mixture. Raises UserError for a RoPE scaling other than Llama 3's."""
    tensors = {tensor.name: tensor.info for tensor in plan}
    rows = tensors[EMBEDDING].shape[0]
    experts = tensors[ROUTER].shape[1] if ROUTER in tensors else None
    stage = Stage(training=Training(micro_batch_size=_WINDOWS_AT_ONCE), layout=Layout())
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        write_checkpoint(weights, "megatron", [_in_fp32(tensor) for tensor in plan], config)
        with _one_rank(stage):
            from btx_megatron.model.build import build_model
            from btx_megatron.training.checkpoint import load_weights

            model = build_model(_recipe(config, seq_length), stage, rows, experts)
            load_weights(weights, model)
            yield Loaded(model, stage, seq_length)


@contextmanager
def _one_rank(stage: Stage) -> Iterator[None]:
    from btx_megatron.runtime import ranks

    with ranks.joined_ranks():
        ranks.set_layout(stage.layout, seed=1)
        yield


def _in_fp32(tensor: PlannedTensor) -> PlannedTensor:
    import torch

    return replace(tensor, info=replace(tensor.info, dtype=torch.float32))


def _recipe(config: ModelConfig, seq_length: int) -> Recipe:
    """A recipe that builds the model; what a model does not depend on is left as it is."""
    factor = config.rope_scaling_factor()
    model = Model(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        seq_length=seq_length,
        rotary_base=config.rotary_base,
        use_rope_scaling=factor is not None,
        rope_scaling_factor=factor or 8.0,
        norm_epsilon=config.norm_epsilon,
        untie_embeddings_and_output_weights=not config.tied,
    )
    moe = Moe(
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_load_balancing_type="none",
        **dict(config.moe_router),
    )
    for key in ("moe_router_one_per_group", "moe_router_time_mask"):
        if getattr(moe, key):
            raise UserError(
                f"{key}: which expert is of which domain is known to the run alone; evaluate it there, with "
                "btx evaluate"
            )
    return Recipe(model=model, moe=moe)
