"""A run that is killed, a full disk, two runs at once: under its name a checkpoint is whole, or not there."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from llamas import assert_refused, hashes, mix_arguments, run_btx, tree, write_llama

from btx_megatron.checkpoints import stream

KILLS = 20
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "btx_megatron.mixing.command"])  # a start costs no import


def in_a_process(
    arguments: Sequence[object], errors: Path, fsize: int | None = None, kill_at: int | None = None
) -> BaseProcess:
    """A command line in a process of its own, started; what it says goes to ``errors``.

    ``kill_at``: it ends by SIGKILL at this one of its calls that touch the disk (-1: it counts them).
    """
    process = FORKSERVER.Process(target=_run, args=(list(map(str, arguments)), errors, fsize, kill_at))
    process.start()
    return process


def _run(arguments: list[str], errors: Path, fsize: int | None, kill_at: int | None) -> None:
    calls = _count_calls(kill_at)
    if fsize is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    code, _, err = run_btx(*arguments)
    errors.write_text(err if kill_at is None else str(next(calls)))
    os._exit(code)


def _count_calls(kill_at: int | None) -> Iterator[int]:
    """Count the calls that change the disk, and die at one: other threads are in the midst of theirs."""
    count = itertools.count()
    if kill_at is None:
        return count

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*given: Any, **more: Any) -> Any:
            if next(count) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **more)

        return wrapper

    for name in ("mkdir", "posix_fallocate", "pwrite", "fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    return count


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two Llamas of 36 MB each."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"layers": 8, "hidden": 256, "width": 2048, "vocabulary": 4096}
    return [write_llama(folder / name, seed, **sizes) for seed, name in enumerate("ab")]


@pytest.mark.parametrize("to", ["hf", pytest.param("megatron", marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_leaves_nothing_half_done(large: list[Path], tmp_path: Path, to: str) -> None:
    """At calls of its own, from the first folder to the last rename; a few at a time of the clock."""
    chance, midway, renamed = random.Random(f"kill {to}"), 0, 0
    output, partial, errors = tmp_path / "out", tmp_path / ".out.partial", tmp_path / "errors"
    arguments = mix_arguments(large, output, "--to", to)
    before = [tree(source) for source in large]
    started = time.monotonic()
    run = in_a_process(arguments, errors, kill_at=-1)
    run.join(60)
    seconds, calls, whole = time.monotonic() - started, int(errors.read_text()), hashes(output)
    shutil.rmtree(output)

    last = [calls - 1 - number for number in range(6)]  # about the rename
    for kill_at in [*chance.sample(range(calls - 6), KILLS - 6), *last, None, None, None, None]:
        if kill_at in last:  # to clear away what the one before left takes calls, too
            shutil.rmtree(partial, ignore_errors=True)
        run = in_a_process(arguments, errors, kill_at=kill_at)
        if kill_at is None:
            time.sleep(chance.uniform(0, seconds))
            run.kill()
        run.join(60)
        assert run.exitcode == -signal.SIGKILL or kill_at is None
        midway += partial.exists()
        assert partial.exists() != output.exists() or kill_at in (None, 0, 1)
        renamed += output.exists()
        if output.exists():  # before the kill
            assert hashes(output) == whole
            assert run_btx("verify", output)[0] == 0
            shutil.rmtree(output)
    assert midway >= KILLS // 2
    assert renamed >= 2

    code, _, err = run_btx(*arguments)
    assert (code, err) == (0, "")
    assert hashes(output) == whole
    assert run_btx("verify", output)[0] == 0
    assert not partial.exists()
    assert not [path for path in output.rglob(".*") if path.name != ".metadata"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors", "out"]
    assert [tree(source) for source in large] == before


@pytest.mark.parametrize("before_the_end", [1, 2])
def test_a_run_killed_behind_the_rename_leaves_nothing_in_the_output(
    tmp_path: Path, before_the_end: int
) -> None:
    """The output is whole, and nothing in it is the run's own; what lies beside it is in nobody's way."""
    sources, output, errors = _two(tmp_path), tmp_path / "out", tmp_path / "errors"
    arguments = mix_arguments(sources, output)
    in_a_process(arguments, errors, kill_at=-1).join(60)
    whole, names, calls = hashes(output), sorted(tree(output)), int(errors.read_text())
    shutil.rmtree(output)
    run = in_a_process(arguments, errors, kill_at=calls - before_the_end)
    run.join(60)
    assert run.exitcode == -signal.SIGKILL
    assert (hashes(output), sorted(tree(output))) == (whole, names)
    assert run_btx("verify", output)[0] == 0
    assert not (tmp_path / ".out.partial").exists()
    assert (tmp_path / ".out.lock").read_bytes() == b""
    assert_refused(tmp_path, "out: exists; delete it", *arguments)
    shutil.rmtree(output)
    assert run_btx(*arguments)[0] == 0
    assert hashes(output) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors", "good", "other", "out"]


@pytest.mark.parametrize("to", ["hf", "megatron", "megatron-legacy"])
@pytest.mark.parametrize("fsize", [4_000, 20_000_000])
def test_a_file_that_may_not_grow(large: list[Path], tmp_path: Path, to: str, fsize: int) -> None:
    """What ulimit -f and quotas do: in the layout, or already in the small files."""
    errors = tmp_path / "errors"
    run = in_a_process(mix_arguments(large, tmp_path / "out", "--to", to), errors, fsize)
    run.join(60)
    err = errors.read_text()
    assert (run.exitcode, err.count("\n")) == (1, 1), err
    assert f"out: {os.strerror(errno.EFBIG)}; nothing is left of it" in err
    assert [path.name for path in tmp_path.iterdir()] == ["errors"]


_ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$1 none "$2" || exit 77
shift 2
"$@"
code=$?
ls -A "$MOUNTED"
exit $code
"""


@pytest.mark.parametrize("size", ["64k", "40m"])
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_full_disk(large: list[Path], tmp_path: Path, to: str, size: str) -> None:
    """In memory, mounted in a user's own namespace: no root is needed, where the kernel allows it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "btx_megatron", *mix_arguments(large, disk / "out", "--to", to)]
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _ON_A_SMALL_DISK, "sh"]
    try:
        done = subprocess.run(
            [*unshare, size, str(disk), *map(str, command)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "MOUNTED": str(disk)},
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("no user namespaces here")
    assert (done.returncode, done.stdout) == (1, "")  # and the disk is empty again
    full = f"{disk / 'out'}: {os.strerror(errno.ENOSPC)}"
    assert done.stderr == f"btx: {full}; nothing is left of it: mend that, and run it again\n"


# two at once


def _two(tmp_path: Path) -> list[Path]:
    return [write_llama(tmp_path / name, seed) for seed, name in enumerate(("good", "other"))]


def test_a_second_run_into_one_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first writes; and the first's result is whole."""
    sources, out = _two(tmp_path), tmp_path / "out"
    begun, refused = threading.Event(), threading.Event()
    make = stream._make_part

    def slowly(*given: Any) -> bytes:
        begun.set()
        assert refused.wait(60)
        return make(*given)

    monkeypatch.setattr(stream, "_make_part", slowly)
    thread = threading.Thread(target=_mix, args=(sources, out))
    thread.start()
    try:
        assert begun.wait(60)
        assert_refused(tmp_path, "out: another btx is writing it", *mix_arguments(sources, out))
    finally:
        refused.set()
        thread.join(60)
    assert run_btx("verify", out)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "other", "out"]
    assert not any("lock" in name for name in tree(out))


def _mix(sources: list[Path], output: Path) -> None:
    from btx_megatron.mixing.mix import Output, mix
    from btx_megatron.mixing.plan import MixOptions

    mix(dict(zip("ab", sources, strict=True)), Output(output, manifest=True), MixOptions())


def test_many_runs_into_one_output(large: list[Path], tmp_path: Path) -> None:
    """One of them writes it, and the others say why they do not."""
    arguments = mix_arguments(large, tmp_path / "out")
    runs = [in_a_process(arguments, tmp_path / f"errors{number}") for number in range(5)]
    for run in runs:
        run.join(60)
    assert sorted(str(run.exitcode) for run in runs) == ["0", "2", "2", "2", "2"]
    for number, run in enumerate(runs):
        err = (tmp_path / f"errors{number}").read_text()
        assert err.count("\n") == (run.exitcode != 0)
        assert run.exitcode == 0 or "out: another btx is writing it" in err or "out: exists" in err
    assert run_btx("verify", tmp_path / "out")[0] == 0
    assert not (tmp_path / ".out.partial").exists()


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    sources = _two(tmp_path)
    left = tmp_path / ".out.partial" / "release"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".out.lock").touch()
    (left.parent / "link").symlink_to(tmp_path / "good")
    assert run_btx(*mix_arguments(sources, tmp_path / "out"))[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "manifest.json", "model.safetensors"
    ]  # fmt: skip
    assert json.loads((tmp_path / "good" / "config.json").read_text())["model_type"] == "llama"
