"""Programs that a model wrote, run to see whether they pass their tests: HumanEval, MBPP.

Each runs in a process of its own, in an empty folder, without this process's environment, and under limits:
CPU and wall time, memory of a process, size of files, number of open files. Where the kernel lets a user
make namespaces it has no network, may write to its folder alone, start few processes (root: any number), and
what it started ends with it. That keeps mistakes from doing harm, and is no prison: programs of a model that
is not trusted belong in a container, with the whole evaluation. Where there are no namespaces, as in many
containers, ``warn_where_open`` says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SECONDS = 10.0
_RUNNER = Path(__file__).with_name("sandboxed_program.py")
_LIMITS = {
    "AS": 2 << 30,  # bytes of address space
    "FSIZE": 1 << 20,  # bytes of a file
    "NOFILE": 64,
    "NPROC": 64,
    "CORE": 0,
}


@cache
def warn_where_open() -> None:
    """Say on stderr, once, if programs will have this user's network and files."""
    code = "import os; os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWPID)"
    tried = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False)
    if tried.returncode:
        print(
            "btx: the model's programs can reach the network and all files of this user, since no namespaces "
            "may be made here; run them in a container that holds nothing else",
            file=sys.stderr,
        )


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end, within ``seconds`` of wall time and of CPU time."""
    secret = secrets.token_hex(16)
    limits = json.dumps(_LIMITS | {"CPU": max(1, round(seconds)), "secret": secret})
    folder = tempfile.mkdtemp()
    # a file and no pipe, which would stay open as long as anything that the program has started
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_RUNNER)],
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(f"{limits}\n{program}".encode(errors="replace"), timeout=seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
        process.wait()
        told.seek(0)
        said = told.read(1 << 10)
    subprocess.run(["rm", "-rf", folder], check=False, stderr=subprocess.DEVNULL)  # however deep it is
    return said == secret.encode()
