"""Runs one program under limits; started by sandbox.py as ``python -I sandboxed_program.py``, by path.

Stdin: a line of JSON with the limits and a secret, then the program. The secret comes back on stdout only if
the program ran to its end: one that calls ``exit()`` before its tests has not passed them. Imports nothing
of this package, so that a start takes milliseconds.
"""

import contextlib
import json
import os
import resource
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
    for name in ("CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE"):
        limit = limits[name]
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    with contextlib.suppress(OSError, AttributeError):  # where the kernel lets users make namespaces
        os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(told, secret)


if __name__ == "__main__":
    main()
