"""Saves checkpoints while training goes on, and says when one counts.

A save has three parts. *Plan and copy*: all ranks agree who writes what, and each copies its share into host
memory; training stands still for this alone. *Write*: a thread of each rank writes its file and syncs it to
disk. *Publish*: when all ranks are done (one small all-reduce a step tells, while a save is under way),
``.metadata`` is written, everything is synced, the tracker moves, and older checkpoints go. Whatever kills a
rank before the tracker has moved leaves the checkpoint before in force.

Megatron's planner, file format and publishing are used as they are; who writes is ours. Of Megatron's two
background writers the persistent process cannot run without CUDA, and would get the live weights in shared
memory, which training then changes under its hands; the other one forks a process that holds the threads of
gloo and OpenMP, and the weights are then copied page by page in the step that follows. A thread needs neither
(docs/log.md has the figures); torch writes files without holding the interpreter's lock.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from btx_megatron.checkpoints.tracker import checkpoint_name, latest_checkpoint, prune, write_tracker
from btx_megatron.durable import sync, sync_tree
from btx_megatron.errors import StageFailed
from btx_megatron.runtime.ranks import device
from btx_megatron.training.checkpoint import TrainingState, state_to_save

_SECONDS_BETWEEN_POLLS = 0.05


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is published."""

    last: int = 1
    """The latest ones; at least 1."""
    every: int | None = None
    """And those whose step is a multiple of this."""


class _Save:
    """A save under way on this rank: its file is written, and synced to disk, by a thread."""

    def __init__(self, path: Path, iteration: int, request: AsyncRequest, results: queue.Queue[Any]) -> None:
        self.path, self.iteration, self.request = path, iteration, request
        self.error: Exception | None = None
        self.stall = 0.0
        """Seconds that training stood still to start it."""
        self.copied = False
        """Training goes on meanwhile."""
        self.started = time.perf_counter()
        self._results = results
        self._thread: threading.Thread | None = None

    def start(self, copy: bool) -> None:
        """Start writing; ``copy``: the tensors as they are now, whatever becomes of them."""
        self.copied = copy
        buckets = _copies(self.request.async_fn_args[1], copy) if self.request.async_fn else []
        self._thread = threading.Thread(target=self._write, args=(buckets,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Not on disk yet."""
        return self._thread is not None and self._thread.is_alive()

    def _write(self, buckets: list[Any]) -> None:
        write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
        results: dict[int, Any] = {}
        try:
            for number, bucket in enumerate(buckets):
                transforms = self.request.async_fn.args[0]
                _, results[number] = write(transforms, number, bucket, None, None, use_fsync=True)
                if isinstance(results[number], Exception):
                    raise results[number]
        except Exception as error:
            self.error = error
        self._results.put(results)


class CheckpointSaver:
    """Saves into ``folder``, one checkpoint at a time. All methods are collectives over all ranks."""

    def __init__(self, folder: Path, retention: Retention, asynchronous: bool = True) -> None:
        self.folder, self.retention, self.asynchronous = folder, retention, asynchronous
        self._save: _Save | None = None

    def save(self, state: TrainingState, extra: dict[str, Any], last: bool = False) -> None:
        """Save ``state`` as it is now; ``extra`` holds plain values that travel along (the recipe).

        Returns when training may go on: at once where saves are asynchronous. ``last``: it will not go on, so
        nothing is copied, and the save is finished here. A save that is still under way is finished first.
        Raises StageFailed, on all ranks, where it failed.
        """
        asynchronous = self.asynchronous and not last
        started = time.perf_counter()
        self.wait()
        path = self.folder / checkpoint_name(state.iteration)
        with self._telling_failure(path):
            self._make_folder(path)
            results: queue.Queue[Any] = queue.Queue()
            # Megatron would start a manager process for this queue, which costs seconds and imports the main
            # module again; the results pass from thread to thread here.
            filesystem_async._results_queue = results
            content, metadata = state_to_save(state)
            request = dist_checkpointing.save(
                content | extra,
                str(path),
                content_metadata=metadata,
                async_sharded_save=True,
                async_strategy="mcore",
            )
            save = _Save(path, state.iteration, request, results)
            save.start(copy=asynchronous)
        self._save = save
        save.stall = time.perf_counter() - started
        if not asynchronous:
            self.wait()

    def poll(self) -> bool:
        """Publish the save under way if all ranks have written it; True where none is under way any more.

        Raises StageFailed, on all ranks, where one could not write.
        """
        save = self._save
        if save is None:
            return True
        states = torch.tensor([save.writing, save.error is not None], dtype=torch.int).to(device())
        torch.distributed.all_reduce(states)
        writing, failed = states.tolist()
        if writing:
            return False
        self._save = None
        if failed:
            self._fail(save)
        with self._telling_failure(save.path):
            self._publish(save)
        return True

    def wait(self) -> None:
        """Wait until the save under way, if any, is published; on all ranks. Raises as ``poll``."""
        if self._save is None:
            return
        while not self.poll():
            time.sleep(_SECONDS_BETWEEN_POLLS)
        torch.distributed.barrier()  # the tracker moves on rank 0

    def _make_folder(self, path: Path) -> None:
        if torch.distributed.get_rank() == 0:
            if path != latest_checkpoint(self.folder):
                shutil.rmtree(path, ignore_errors=True)  # what a save that never ended has left
            path.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()

    def _publish(self, save: _Save) -> None:
        for finalize in save.request.finalize_fns:
            finalize()
        if torch.distributed.get_rank() != 0:
            return
        sync_tree(save.path)
        sync(self.folder)
        write_tracker(self.folder, str(save.iteration))
        prune(self.folder, save.iteration, self.retention.last, self.retention.every)
        seconds = time.perf_counter() - save.started
        waited = save.stall if save.copied else seconds
        print(
            f"saved step {save.iteration} in {seconds:.1f} s; training stood still {waited:.2f} s", flush=True
        )

    def _fail(self, save: _Save) -> None:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(save.path, ignore_errors=True)  # makes room, and nobody takes it for whole
        errors: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, _first_line(save.error) if save.error else None)
        rank, message = next((rank, error) for rank, error in enumerate(errors) if error)
        raise StageFailed(self._failure(save.path, f"rank {rank}: {message}"))

    @contextmanager
    def _telling_failure(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StageFailed(self._failure(path, _first_line(error))) from error

    def _failure(self, path: Path, message: str) -> str:
        good = latest_checkpoint(self.folder)
        kept = f"{good.name} stays the latest" if good else "there is no earlier one"
        return f"{path}: the checkpoint could not be saved ({message}); {kept}; mend this and run again"


def save(folder: Path, state: TrainingState, extra: dict[str, Any], keep: int) -> Path:
    """Save once, and wait for it; returns the checkpoint. A collective."""
    CheckpointSaver(folder, Retention(keep), asynchronous=False).save(state, extra)
    return folder / checkpoint_name(state.iteration)


def _copies(buckets: list[Any], always: bool) -> list[Any]:
    """What to write, with its tensors in host memory; ``always``: copies of those that are there already."""
    return [
        (file, key, (texts, [(item, tensor.to("cpu", copy=always)) for item, tensor in tensors]))
        for file, key, (texts, tensors) in buckets
    ]


def _first_line(error: BaseException) -> str:
    """An error in few words; torch's writer buries the system's own below what it says itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    text = str(cause or error).strip().partition("\n")[0]
    return text if cause else f"{type(error).__name__}: {text}"
