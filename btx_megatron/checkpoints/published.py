"""A folder that is published whole or not at all: filled under another name, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from btx_megatron.durable import sync
from btx_megatron.errors import UserError


def partial_of(output: Path) -> Path:
    """The folder in which ``output`` is made: beside it, for a rename from there is one step."""
    output = output.resolve()  # "." has no name, and a link may lead to another file system
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def published(output: Path) -> Iterator[Path]:
    """A folder to fill, ours alone; renamed to ``output`` at the end, or deleted if that is not reached."""
    check_free(output)
    partial = partial_of(output)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{output}: lies in a file, not in a folder; name another output") from None
    with _locked(partial.with_suffix(".lock"), output):
        check_free(output)  # another may have written it before we had the lock
        _remove(partial)  # what one left that was killed
        partial.mkdir()
        try:
            yield partial
            sync(partial)
            os.rename(partial, output.resolve())  # takes the place of an empty folder
            sync(partial.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # it is in place by now
                _remove(partial)
            raise


def check_free(output: Path) -> None:
    """Raise UserError where something lies there, or nothing may be put."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists; delete it, or name another output")
    if output.resolve() == Path.cwd():
        raise UserError(f"{output}: the folder that you are in cannot be replaced; name another output")


@contextlib.contextmanager
def _locked(lock: Path, output: Path) -> Iterator[None]:
    """Hold a lock until the block or the process ends, however that ends.

    Its file lies beside the output, not in it: nothing that is published has to be taken away afterwards. A
    run that is killed leaves the file, empty and not locked; the next one takes it, and deletes it.
    """
    descriptor = _lock(lock, output)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # while it is ours: whoever has it open finds that it is gone, and makes a new one
        os.close(descriptor)


def _lock(lock: Path, output: Path) -> int:
    deadline = time.monotonic() + 1  # whom a killed run was just starting may hold it a moment longer
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise UserError(f"{output}: another btx is writing it; wait for it, or name another") from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a folder with all that is in it, or what else is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
