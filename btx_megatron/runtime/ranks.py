"""Ranks and their groups: one process a rank, Megatron's groups over gloo (CPU) or NCCL (GPU)."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from btx_megatron.errors import StageFailed, Stopped
from btx_megatron.quick_import import quick_import
from btx_megatron.recipe import Layout
from btx_megatron.runtime import cpu_backend
from btx_megatron.runtime.cores import ALONE, NEEDS_GPU

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others, where no recipe says otherwise."""


def device() -> torch.device:
    """Where this rank computes."""
    if cpu_backend.have_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start_ranks(timeout: timedelta = TIMEOUT) -> None:
    """Join the process group that torchrun's environment describes; without one, be the only rank.

    Must run before Megatron is imported.

    ``timeout``: of every collective.
    """
    _quiet_logs()
    if "RANK" not in os.environ:
        os.environ |= ALONE
    if NEEDS_GPU in os.environ and not cpu_backend.have_cuda():
        raise StageFailed(
            f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: torch finds no GPU, though the "
            "stage was given one; look at nvidia-smi there, and in a container at NVIDIA_VISIBLE_DEVICES"
        )
    with quick_import():
        cpu_backend.install()
    if cpu_backend.have_cuda():
        torch.cuda.set_device(device())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    backend = "nccl" if cpu_backend.have_cuda() else "gloo"
    torch.distributed.init_process_group(backend, timeout=timeout)


def _quiet_logs() -> None:
    """Deprecations of torch that Megatron calls into, once a rank and a save, would bury the log."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint|megatron\.")
    warnings.filterwarnings("ignore", message=".*(ShardedTensor|torch.distributed is disabled|of load has).*")


def stop_ranks() -> None:
    """Leave the process group."""
    torch.distributed.destroy_process_group()


@contextmanager
def joined_ranks(timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """start_ranks, and stop_ranks where all ranks come to the end together.

    After an error the others may never come, and to leave in order would be to wait for them.
    """
    start_ranks(timeout)
    try:
        yield
    except Stopped:  # on all ranks, after the same step
        stop_ranks()
        raise
    stop_ranks()


def _leave_groups() -> None:
    """End the groups of the last layout: Megatron forgets them, but gloo keeps threads for each of them."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def set_layout(layout: Layout, seed: int, cuda_graphs: bool = False) -> None:
    """(Re)build Megatron's groups for a layout, and seed every generator.

    ``cuda_graphs``: with generators that graphs can hold, which are Transformer Engine's. May be called again
    with another layout of the same number of ranks.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    # every pipeline stage draws its own weights and dropout, as in Megatron's training script
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, te_rng_tracker=cuda_graphs, force_reset_rng=True)
