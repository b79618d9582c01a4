"""Runs a command and tells what it cost: time, memory, bytes. Linux only, standard library only.

Memory is RssAnon + RssShmem, summed over the whole process tree, looked at every 20 ms: what a program holds
for itself. A file that it maps belongs to the page cache (RssFile) and is not counted; but the kernel counts
a mapped file of a *memory file system* as RssShmem, so both numbers are kept: there a program that maps its
inputs looks larger than it is, and ``anonymous`` is the number to compare. Pages that several processes share
are counted in each of them.

Bytes come from the kernel's own account of the tree (/proc/PID/io of the ended command before it is reaped,
with all children that it waited for). "calls" are bytes through read and write calls, and miss what goes
through a mapped file; "device" are bytes that the block device moved, and miss what the page cache answered.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SAMPLE_MS = 20
BLOCK = 8 << 20


@dataclass
class Cost:
    """What one command, or several one after the other, took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """User and system time of the tree."""
    peak: int = 0
    """Bytes: the largest sum of RssAnon and RssShmem."""
    anonymous: int = 0
    """Bytes: the largest sum of RssAnon alone."""
    read_calls: int = 0
    read_device: int = 0
    write_calls: int = 0
    write_device: int = 0

    def then(self, later: Cost) -> Cost:
        """Both, one after the other."""
        mine, its = vars(self), vars(later)
        largest = ("peak", "anonymous")
        return Cost(**{k: max(mine[k], its[k]) if k in largest else mine[k] + its[k] for k in mine})


class CommandFailed(Exception):
    """A measured command did not end with 0; the message ends with the last line that it printed."""


def measure(
    command: list[str], log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Cost:
    """Run `command` in `folder` to its end; what it prints goes to the end of `log`.

    Raises CommandFailed; RuntimeError where the kernel does not tell the children of a process.
    """
    if not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists():
        raise RuntimeError("needs Linux with /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)")
    with log.open("ab") as printed:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, env=environment, cwd=folder
        )
    try:
        peak, anonymous = _watch(process.pid)
    except BaseException:
        process.kill()
        process.wait()
        raise
    seconds = time.perf_counter() - start
    counted = _fields(
        Path(f"/proc/{process.pid}/io")
    )  # it is a zombie now: its account is closed, not yet gone
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].strip() if lines else "it printed nothing"
        raise CommandFailed(f"{command[0]} ended with {process.returncode} (see {log}): {last}")
    return Cost(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak=peak,
        anonymous=anonymous,
        read_calls=counted["rchar"],
        read_device=counted["read_bytes"],
        write_calls=counted["wchar"],
        write_device=counted["write_bytes"],
    )


def _watch(pid: int) -> tuple[int, int]:
    """Look at the tree until its root ends: the peaks of RssAnon + RssShmem and of RssAnon, in bytes."""
    peak = anonymous = 0
    handle = os.pidfd_open(pid)
    try:
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        while not ended.poll(SAMPLE_MS):
            anon, shared = tree_memory(pid)
            peak, anonymous = max(peak, anon + shared), max(anonymous, anon)
    finally:
        os.close(handle)
    return peak, anonymous


def tree_memory(pid: int) -> tuple[int, int]:
    """RssAnon and RssShmem of a process and all its descendants, in bytes."""
    anon = shared = 0
    for member in _tree(pid):
        try:
            fields = _fields(Path(f"/proc/{member}/status"))
        except OSError:  # it ended meanwhile
            continue
        anon += fields.get("RssAnon", 0) * 1024  # a zombie has no such line
        shared += fields.get("RssShmem", 0) * 1024
    return anon, shared


def _tree(pid: int) -> list[int]:
    found = [pid]
    for member in found:  # grows while it is walked
        try:
            for task in os.listdir(f"/proc/{member}/task"):
                found += map(int, Path(f"/proc/{member}/task/{task}/children").read_text().split())
        except OSError:  # it ended meanwhile
            continue
    return found


def _fields(path: Path) -> dict[str, int]:
    """The lines `Name: number ...` of a file of /proc."""
    pairs = (line.partition(":")[::2] for line in path.read_text().splitlines())
    return {name: int(rest.split()[0]) for name, rest in pairs if rest.split() and rest.split()[0].isdigit()}


def sync_tree(folder: Path) -> float:
    """fsync every file and folder below `folder`, and itself; the seconds that it took."""
    start = time.perf_counter()
    for path in [folder, *folder.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return time.perf_counter() - start


def warm(files: Iterable[Path]) -> None:
    """Read files once, so that the page cache holds what fits."""
    block = bytearray(BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def evict(files: Iterable[Path]) -> None:
    """Drop files from the page cache (no root needed). Raises RuntimeError where they stay in it."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # pages that are not written yet would stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
        share = cached_share(path)
        if share > 0.01:
            raise RuntimeError(
                f"{path}: {share:.0%} stays in memory, so a cold start cannot be measured"
                " (a memory file system, or another process has the file mapped)"
            )


def cached_share(path: Path) -> float:
    """The share of a file's pages that the page cache holds, 0 to 1 (mincore)."""
    size = path.stat().st_size
    if not size:
        return 0.0
    pages = -(-size // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * pages)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)  # needs a private, writable map; nothing is written
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), states)
        del first  # or the map could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return sum(state & 1 for state in states) / pages


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`: ext4, tmpfs ..."""
    target = path.resolve()
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        mount = Path(fields.split()[4].replace("\\040", " "))
        if target.is_relative_to(mount) and len(mount.parts) >= best:  # a later mount hides an earlier one
            best, kind = len(mount.parts), rest.split()[0]
    return kind


def machine(inputs: Path, output: Path) -> dict[str, str]:
    """What a reader must know about the machine to judge a figure."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    memory = _fields(Path("/proc/meminfo"))["MemTotal"] * 1024
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "inputs on": file_system(inputs),
        "output on": f"{file_system(output)}, {shutil.disk_usage(output).free / 1e9:.0f} GB free",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def versions(python: str, packages: list[str]) -> str:
    """Versions of Python and of the packages that the interpreter `python` sees."""
    code = (
        "import sys, platform, importlib.metadata as m\n"
        "names = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "found = [f'{name} {names[name]}' for name in sys.argv[1:] if name in names]\n"
        "print(f'python {platform.python_version()}', *found, sep=', ')"
    )
    result = subprocess.run([python, "-P", "-c", code, *packages], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def commit(folder: Path) -> str:
    """The commit that lies in `folder`, or "unknown" outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
