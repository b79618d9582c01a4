"""Counts what the ranks send each other, whoever calls: Megatron, this package or torch itself.

    with CommMeter() as meter:
        for batch in batches:
            with meter.step():
                train(batch)
        traffic = meter.over_ranks()      # a collective: all ranks

What "bytes" means is said in btx_megatron.traffic. Only what happens inside ``step()`` is counted, so that
loading and checkpoints do not blur the figures of a step.

**Where it hooks, and why there.** Every collective of torch, on gloo and NCCL alike, ends in an operator of
the namespace ``c10d`` (``c10d::allreduce_``, ``c10d::alltoall_base_``, ...). The meter puts a kernel of its
own in front of those operators, at the dispatch key BackendSelect, which is on for every call and which no
c10d operator uses; it notes the sizes and passes the call on, unchanged. Five places were tried (torch 2.11,
gloo, the calls of tests/functional/comm_worker.py):

| calls | functions of torch.distributed | methods of ProcessGroup | TorchDispatchMode | c10d operators |
|---|---|---|---|---|
| all_reduce(...) and its like | seen | seen | seen | seen |
| by a name bound at import (Megatron's DDP, its TP layers) | missed | seen | seen | seen |
| in a coalescing manager (Megatron's gradient buckets) | parts | seen | seen | seen |
| batch_isend_irecv | breaks | seen | seen | seen |
| functional collectives, DTensor, torch.compile | missed | missed | other operators | seen |
| from C++ (torch's own DDP) | missed | missed | seen | seen |
| price | none | none | each operator of the model | none |

A replaced isend fails torch's check of what a P2POp may hold. A dispatch mode runs Python for every operator,
and torch's backward takes other formulas while one is on. The profiler, fifth, has no record_param_comms
on gloo; what it has instead are gloo's own doings, where a reduce-scatter is an all-reduce, without groups.

Cost: some microseconds a call while the meter is on (docs/communication.md); off, nothing is registered.
Not seen, because they never become torch operators: Transformer Engine's userbuffers, DeepEP and other
NVSHMEM kernels, collectives replayed by a CUDA graph (counted once, at the capture).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch._C import DispatchKey
from torch._C._distributed_c10d import ProcessGroup

from btx_megatron.errors import UserError
from btx_megatron.traffic import Amount, Line, Traffic, amount_of, sent_to, summed

# operator: (collective, position of the argument that a rank hands in)
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "allgather_coalesced_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "recv_any_source_": ("recv", 0),
    "barrier": ("barrier", 0),
    "monitored_barrier_": ("barrier", 0),
}
_ROOT_POSITION = {"broadcast": 2, "reduce": 3, "gather": 3, "scatter": 3, "send": 2}

# the descriptions that Megatron's parallel_state gives its groups
_SHORT_NAMES = {
    "default_pg": "world",
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "MODEL_PARALLEL_GROUP": "tp x pp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",  # what Megatron reduces gradients over, with or without CP
    "DATA_PARALLEL_GROUP_WITH_CP_AG": "dp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp x cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tp x dp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp x dp",
    "EMBEDDING_GROUP": "embedding",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "etp x ep",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "etp x ep x pp",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "etp x ep x pp",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
    "EXPERT_DATA_PARALLEL_GROUP_AG": "edp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer",
}


@dataclass(frozen=True)
class _Group:
    name: str
    ranks: tuple[int, ...]
    """Global ranks in the group's order."""
    me: int
    """This rank's place in it."""


class CommMeter:
    """Counts this rank's collectives between entering and leaving it; one at a time in a process."""

    def __init__(self, ranks_per_node: int | None = None) -> None:
        """``ranks_per_node``: None takes torchrun's LOCAL_WORLD_SIZE."""
        self.ranks_per_node = ranks_per_node or ranks_of_a_node()
        self.steps = 0
        self.traffic = Traffic()
        self._counting = False
        self._groups: dict[str, _Group] = {}
        self._lock = threading.Lock()  # overlapped reductions start in autograd's threads
        self._library: torch.library.Library | None = None

    def __enter__(self) -> Self:
        self._library = torch.library.Library("c10d", "IMPL")
        for name in _operators_of_torch():
            kernel = self._kernel(name, getattr(torch.ops.c10d, name).default)
            self._library.impl(name, kernel, "BackendSelect", with_keyset=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._library is not None
        self._library._destroy()
        self._library = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count what happens inside as one step."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False
        self.steps += 1

    def over_ranks(self) -> Traffic:
        """The sum over all ranks, on every rank; a collective, and not counted itself."""
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self.traffic)
        return summed(parts)

    def _kernel(self, name: str, operator: Any) -> Callable[..., Any]:
        def count_and_go_on(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if self._counting:
                self._count(name, args)
            return operator.redispatch(keyset.remove(DispatchKey.BackendSelect), *args, **kwargs)

        return count_and_go_on

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = self._group(args)
        if len(group.ranks) == 1:
            return
        amount = _measure(name, args, group, self.ranks_per_node)
        with self._lock:
            self.traffic.add(_line(_OPERATORS[name][0], group), amount)

    def _group(self, args: tuple[Any, ...]) -> _Group:
        handle = ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        name = handle.group_name
        if name not in self._groups:
            ranks = tuple(torch.distributed.get_process_group_ranks(handle))
            kind = _SHORT_NAMES.get(handle.group_desc, handle.group_desc.lower())
            self._groups[name] = _Group(kind, ranks, handle.rank())
        return self._groups[name]


def ranks_of_a_node() -> int:
    """Ranks that share a node, from torchrun's environment; all of them where it does not tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or torch.distributed.get_world_size()


def _operators_of_torch() -> list[str]:
    """Names of torch's collectives. Raises UserError where this torch has one that is unknown here."""
    operators = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    found = [name for space, _, name in operators if space == "c10d"]
    unknown = sorted(set(found) - set(_OPERATORS))
    if unknown:
        raise UserError(
            f"training.log_communication: torch {torch.__version__} has collectives that the meter does not "
            f"know ({', '.join(unknown)}); set it to false, or use torch 2.11"
        )
    return found


def _line(collective: str, group: _Group) -> Line:
    if group.name == "world" and collective in ("send", "recv"):
        # Megatron's way back between two pipeline stages: their own group serves the way there alone
        return Line("pp", 2, collective)
    return Line(group.name, len(group.ranks), collective)


def _measure(name: str, args: tuple[Any, ...], group: _Group, ranks_per_node: int) -> Amount:
    collective, position = _OPERATORS[name]
    handed_in = args[position]
    if collective == "all_to_all":
        pieces = dict(enumerate(_pieces(name, args, handed_in, len(group.ranks))))
        payload = round(sum(pieces.values()))
        pieces.pop(group.me)
        return sent_to(pieces, payload, group.ranks, group.me, ranks_per_node)
    root = args[_ROOT_POSITION[collective]] if collective in _ROOT_POSITION else 0
    return amount_of(collective, _bytes(handed_in), group.ranks, group.me, ranks_per_node, root)


def _pieces(name: str, args: tuple[Any, ...], handed_in: Any, size: int) -> list[float]:
    """Bytes for each member of an all-to-all."""
    if name == "alltoall_":
        return [_bytes(piece) for piece in handed_in]
    total, splits = _bytes(handed_in), args[4]
    if not splits:
        return [total / size] * size
    rows = sum(splits)
    return [total * split / rows if rows else 0.0 for split in splits]


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(inner) for inner in tensors)
