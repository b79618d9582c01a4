"""Runs one program under limits; started by sandbox.py as ``python -I sandboxed_program.py``, by path.

Stdin: a line of JSON with the limits and a secret, then the program. The secret comes back on stdout only if
the program ran to its end: one that calls ``exit()`` before its tests has not passed them. Imports nothing
of this package, so that a start takes milliseconds.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys


def main() -> None:
    """Read, limit, run, tell."""
    limits = json.loads(sys.stdin.readline())
    program = sys.stdin.read()
    told = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    secret = limits["secret"].encode()
    for name in ("CPU", "AS", "FSIZE", "NOFILE", "CORE"):
        _limit(name, limits[name])
    with contextlib.suppress(OSError, AttributeError):  # where the kernel lets users make namespaces
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWPID)
        _allow_writing_here_alone()
        _limit("NPROC", limits["NPROC"])  # outside of one it would count all processes of the user
        if os.fork():
            os.wait()
            os._exit(0)
        # the first process in the namespace, with which all others in it end; it ends with its parent
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if program_process := os.fork():
            os.waitpid(program_process, 0)
            os._exit(0)
    exec(compile(program, "program", "exec"), {})  # as the harness does: no main module
    os.write(told, secret)


_PR_SET_PDEATHSIG = 1
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1


def _allow_writing_here_alone() -> None:
    """All files but the working folder's become read-only; where Linux is older than 5.12 they do not."""
    libc = ctypes.CDLL(None)
    here = os.getcwd().encode()
    libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    libc.mount(here, here, None, _MS_BIND, None)
    for path, flags, on, off in (
        (b"/", _AT_RECURSIVE, _MOUNT_ATTR_RDONLY, 0),
        (here, 0, 0, _MOUNT_ATTR_RDONLY),
    ):
        attributes = (ctypes.c_uint64 * 4)(on, off, 0, 0)
        libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, path, flags, attributes, ctypes.sizeof(attributes))
    os.chdir(here)  # by the path that may be written to


def _limit(name: str, limit: int) -> None:
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


if __name__ == "__main__":
    main()
