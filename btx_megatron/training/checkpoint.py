"""Checkpoints of a training stage, through Megatron's dist_checkpointing (format ``torch_dist``).

    checkpoints/latest_checkpointed_iteration.txt     written last: what it names is whole
    checkpoints/iter_0000100/                         weights, optimizer, schedule, RNG, recipe

What is in one, and how it is read back; how and when one is written is told in training/saver.py.
A stage resumes from everything; from one stage to the next only weights travel. Optimizer state is
``fully_reshardable``: it loads under another TP, PP or DP. Random generators are restored where the
layout is the same, for there alone they mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import is_graph_safe_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from btx_megatron.checkpoints.names import is_weight
from btx_megatron.checkpoints.tracker import find_checkpoint, latest_checkpoint
from btx_megatron.errors import UserError
from btx_megatron.model.build import unwrap
from btx_megatron.recipe import Layout
from btx_megatron.training.adaptive import AdaptiveBalancing
from btx_megatron.training.loss_watch import Skips
from btx_megatron.training.optimizer import ready_for_loading, unshare_steps
from btx_megatron.training.scales import EXTRA_STATE, scales_allowed


@dataclass
class TrainingState:
    """What a checkpoint holds beside the weights."""

    model: Sequence[torch.nn.Module]
    """The chunks of this rank."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    layout: Layout
    iteration: int = 0
    """Steps done."""
    consumed_samples: int = 0
    """Samples of the training order that have been used."""
    skips: Skips = field(default_factory=Skips)
    """Steps that were skipped."""
    adaptive: AdaptiveBalancing | None = None
    """Each layer's own weight of the balancing loss, where they have one."""


def state_to_save(state: TrainingState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Megatron's sharded state dict of all that a checkpoint holds, and metadata on how to read it.

    A collective; the tensors are the live ones.
    """
    if state.layout.overlap_param_gather:
        # the step's new weights would reach the other ranks in the next forward pass only
        with torch.no_grad():
            for chunk in state.model:
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
    metadata = _metadata()
    content = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    return _state_dict(state, metadata), content


def resume(folder: Path, state: TrainingState) -> bool:
    """Continue from the latest checkpoint of this stage; False where there is none."""
    path = latest_checkpoint(folder)
    if path is None:
        return False
    with _reading(path, f"delete {folder}, and the stage begins anew"):
        _resume(path, state)
    return True


def _resume(path: Path, state: TrainingState) -> None:
    common = load_common_state_dict(str(path))
    _check_reshardable(path, common["layout"], asdict(state.layout))
    ready_for_loading(state.optimizer)
    wanted = _state_dict(state, _metadata() | common["content_metadata"], loading=True)
    scales = common.get("precision", wanted["precision"]) == wanted["precision"]
    if not scales:
        wanted["model"] = _without_extra_state(wanted["model"])
    if not _drawing_alike(common["layout"], asdict(state.layout)):
        del wanted["rng_state"]
    loaded = dist_checkpointing.load(wanted, str(path))
    with scales_allowed(loaded["model"]):
        _take_weights(state.model, loaded["model"], strict=scales)
    state.optimizer.load_state_dict(loaded["optimizer"])
    unshare_steps(state.optimizer)
    state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if "rng_state" in loaded:
        _restore_rng(loaded["rng_state"])
    state.iteration = loaded["iteration"]
    state.consumed_samples = loaded["consumed_samples"]
    if state.adaptive:
        state.adaptive.coefficients = loaded["balancing_coefficients"]
        state.adaptive.apply(state.model)
    state.skips.total, state.skips.in_a_row = loaded["skips"]["total"], loaded["skips"]["in_a_row"]


def _drawing_alike(saved: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a rank of one layout draws what the same rank of the other would."""
    return all(
        saved.get(key) == value
        for key, value in wanted.items()
        if not key.startswith(("overlap_", "recompute_"))
    )


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    """Say which checkpoint it is that cannot be read, whatever the many hands that read it raise."""
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}, the log has more): it is damaged, or of "
            f"another model; restore it, or {remedy}"
        ) from error


def _check_reshardable(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Optimizer state moves over TP, PP and DP; Megatron cannot move it over these two."""
    for key in ("use_distributed_optimizer", "expert_model_parallel_size"):
        if saved[key] != wanted[key]:
            raise UserError(
                f"{path}: saved with layout.{key}={saved[key]}, to go on with {wanted[key]} is not"
                f" possible (optimizer state does not reshard over it): set it back to {saved[key]}"
            )


def load_weights(folder: Path, model: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Take the weights alone of the latest checkpoint in ``folder``; every weight must be there.

    Returns them as they were read, as the optimizer's ``reload_model_params`` takes them: weights that the
    model keeps in FP8 are more exact there.
    """
    path = find_checkpoint(folder)
    # the local layers' _extra_state is empty, FP8's scales are of another stage; converters write none
    weights = _without_extra_state(_sharded_weights(model, _metadata()))
    with _reading(path, "make its stage again"):
        # Megatron calls "missing" what the checkpoint has beyond the model, and "unexpected" the reverse
        loaded, extra, absent = dist_checkpointing.load({"model": weights}, str(path), strict="return_all")
    left_over = sorted(key for key in extra if is_weight(key))
    if absent or left_over:
        raise UserError(
            f"{path}: not the weights of this model: "
            f"it lacks {sorted(absent)[:3]}, it has {left_over[:3]} too"
        )
    _take_weights(model, loaded["model"], strict=False)
    chunks = list(loaded["model"].values())
    return (
        {"model": chunks[0]} if len(chunks) == 1 else {f"model{n}": chunk for n, chunk in enumerate(chunks)}
    )


def _without_extra_state(model: dict[str, Any]) -> dict[str, Any]:
    return {
        number: {key: value for key, value in chunk.items() if EXTRA_STATE not in key.rpartition(".")[2]}
        for number, chunk in model.items()
    }


def _precision(model: torch.nn.Module) -> dict[str, Any]:
    """What the modules' ``_extra_state`` belongs to: Transformer Engine keeps FP8's scales there."""
    config: Any = unwrap(model).config
    of_fp8 = ("fp8_recipe", "fp8_amax_history_len") if config.fp8 else ()
    return {name: getattr(config, name) for name in ("transformer_impl", "fp8", *of_fp8)}


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_weights(model: Sequence[torch.nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    """By the number of the chunk. The files know nothing of chunks: a weight's key there is its layer's."""
    return {
        str(number): unwrap(chunk).sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for number, chunk in enumerate(model)
    }


def _take_weights(
    model: Sequence[torch.nn.Module], loaded: dict[str, dict[str, Any]], strict: bool = True
) -> None:
    for number, chunk in enumerate(model):
        unwrap(chunk).load_state_dict(loaded[str(number)], strict=strict)


def _state_dict(state: TrainingState, metadata: dict[str, Any], loading: bool = False) -> dict[str, Any]:
    model = _sharded_weights(state.model, metadata)
    return {
        "model": model,
        "optimizer": state.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        "opt_param_scheduler": state.scheduler.state_dict(),
        "rng_state": _rng_object(),
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "skips": asdict(state.skips),
        "balancing_coefficients": state.adaptive.coefficients if state.adaptive else None,
        "layout": asdict(state.layout),
        "precision": _precision(state.model[0]),
    }


def _rng_object() -> ShardedObject:
    """Every rank's generators."""
    rng = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        # with CUDA graphs the generators are objects
        "tracker": {
            name: tensor_parallel.convert_cuda_rng_state(state, to_graphable=False)
            for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()
        },
    }
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject("rng_state", rng, (world,), (rank,))


def _restore_rng(rng: dict[str, Any]) -> None:
    torch.cuda.set_rng_state(rng["device"])
    torch.set_rng_state(rng["torch"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    graphable = is_graph_safe_cuda_rng_tracker(tracker)
    tracker.set_states(
        {
            name: tensor_parallel.convert_cuda_rng_state(state, to_graphable=graphable)
            for name, state in rng["tracker"].items()
        }
    )
