"""Megatron-Core on a machine without CUDA: every redirect in one place, each with its reason.

Megatron-Core asks for ``device="cuda"`` in a few dozen places (optimizer, schedules, dispatchers)
although nothing it computes there needs a GPU. ``install()`` sends those requests to the CPU, so that
the very same engine runs under gloo on a laptop and in CI. It must run before the first import of
``megatron.core`` and does nothing where CUDA is present. Huawei's ``transfer_to_npu`` is the field's
precedent for this kind of module.

What is redirected is Megatron's plumbing alone; no layer, schedule or optimizer is replaced here.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")
_installed = False


def have_cuda() -> bool:
    """True where ranks run on GPUs."""
    return torch.cuda.is_available()


def install() -> None:
    """Send Megatron's CUDA requests to the CPU, once; nothing happens where CUDA is present."""
    global _installed
    if _installed or have_cuda():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("cpu_backend.install() must run before the first import of megatron.core")
    _installed = True
    _redirect_tensor_factories()
    _redirect_device_queries()
    _redirect_tensor_types()
    _redirect_random_state()
    _redirect_uneven_collectives()
    _share_gloo_device()
    _quiet_hardware_warnings()
    _leave_out_transformer_engine()
    with _nothing_compiled():
        _patch_megatron()


class _Stream:
    """Stands where Megatron holds a CUDA stream: on a CPU work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Stream:
        return self

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc: Any) -> None: ...


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # rotary positions under context parallelism: memory that a GPU reads
        return factory(*args, **kwargs)

    return make


def _redirect_tensor_factories() -> None:
    """Optimizer, schedules, clip_grads and the balancing-loss tracker say device="cuda" outright."""
    # ``with torch.device(...)`` knows the factories by identity, from a list that it makes once: made after
    # this, it would miss the real ones, and models built under such a context would be silently wrong.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _redirect_device_queries() -> None:
    """Megatron passes current_device() on as device=, and orders streams that a CPU does not have."""
    stream = _Stream()
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.Stream = _Stream  # type: ignore[misc, assignment]
    torch.cuda.Event = _Stream  # type: ignore[misc, assignment]
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda stream: _Stream()  # type: ignore[assignment, return-value]


def _redirect_tensor_types() -> None:
    """clip_grads and both optimizers compare Tensor.type() with 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if not args and not kwargs and _caller().startswith("megatron."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = tensor_type  # type: ignore[method-assign, assignment]


def _caller() -> str:
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _redirect_random_state() -> None:
    """The RNG tracker forks "the CUDA generator": here that is the CPU's one."""
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment, return-value]


def _redirect_uneven_collectives() -> None:
    """The all-to-all dispatcher gathers pieces of uneven length over expert tensor parallelism, and scatters
    their gradients; NCCL can, gloo wants equal ones."""
    all_gather, reduce_scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    @functools.wraps(all_gather)
    def gather(pieces: list[torch.Tensor], mine: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = _rows_if_uneven(pieces)
        if rows is None:
            return all_gather(pieces, mine, *args, **kwargs)
        padded = [_with_rows(piece, rows) for piece in pieces]
        all_gather(padded, _with_rows(mine, rows), *args, **kwargs)
        for piece, its in zip(pieces, padded, strict=True):
            piece.copy_(its[: len(piece)])
        return None

    @functools.wraps(reduce_scatter)
    def scatter(mine: torch.Tensor, pieces: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        rows = _rows_if_uneven(pieces)
        if rows is None:
            return reduce_scatter(mine, pieces, *args, **kwargs)
        padded = _with_rows(mine, rows)
        reduce_scatter(padded, [_with_rows(piece, rows) for piece in pieces], *args, **kwargs)
        mine.copy_(padded[: len(mine)])
        return None

    torch.distributed.all_gather = gather  # type: ignore[assignment]
    torch.distributed.reduce_scatter = scatter  # type: ignore[assignment]


def _rows_if_uneven(pieces: list[torch.Tensor]) -> int | None:
    """Rows of the longest piece, where they are not all as long."""
    lengths = {len(piece) if piece.dim() else 1 for piece in pieces}
    return max(lengths) if len(lengths) > 1 else None


def _with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    return padded


def _share_gloo_device() -> None:
    """Each gloo device has a thread that wakes a hundred times a second, and each of Megatron's dozens of
    groups would have a device of its own."""
    from torch.distributed import distributed_c10d

    original: Any = distributed_c10d.ProcessGroupGloo
    device = None

    class OnOneDevice(original):  # type: ignore[misc]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            nonlocal device
            device = device or original.create_default_device()
            options = original._Options()
            options._devices, options._timeout = [device], timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnOneDevice  # type: ignore[misc]


def _quiet_hardware_warnings() -> None:
    """Apex, Transformer Engine and GPUs are rightly missing here; a warning a rank helps nobody."""
    for text in (".*[Aa]pex.*", ".*ransformer ?_?[Ee]ngine.*", ".*CUDA.*", ".*jit.script.*"):
        warnings.filterwarnings("ignore", message=text)


def _leave_out_transformer_engine() -> None:
    """Where it is installed Megatron takes its optimizer, norms of gradients and routers' product for both
    builds, and these compute on a GPU alone."""
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Megatron's fused functions are for GPUs, and none is called here; but to decorate them loads
    Inductor, a quarter of a rank's start."""
    compile = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
        from megatron.core import jit

        jit.disable_jit_fuser()  # for Megatron's modules that are imported later
    finally:
        torch.compile = compile


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import random as tp_random

    tp_random._set_cuda_rng_state = _set_rng_state
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.maybe_move_tensor_to_cpu = _to_numpy
    token_dispatcher.maybe_move_tensor_to_cpu = _to_numpy


def _set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    """SILENT when missing: the state would never be restored, and recompute would draw other dropout.

    Megatron queues the call for the moment CUDA is initialised, which never comes here.
    """
    torch.set_rng_state(state)


def _to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The all-to-all dispatcher wants split sizes as numpy; Megatron converts CUDA tensors alone."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
