"""Programs under limits: what passes, and what cannot pretend to."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from btx_megatron.evaluation.sandbox import passes


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import math\nprint(math.pi)",
        "def f():\n    return g()\n\ndef g():\n    return 1\n\nassert f() == 1",
        "if __name__ == '__main__':\n    x = int(input())",
        "import os\nassert os.listdir('.') == []",
        "import os\nassert 'SECRET_OF_MINE' not in os.environ",
        "text = 'ü \\n ß'",
    ],
)
def test_what_runs_to_its_end_passes(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "x")
    assert passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "exit()",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "print('\\0')\nraise KeyError",
        "x = bytearray(1 << 33)",
        "open('f', 'wb').write(bytes(1 << 21))",
        "import sys\nsys.stdout.write('1' * 32)\nsys.stdout.flush()\nexit()",
        "import sys\nassert sys.stdin.read() != ''",
        "\ud800",
    ],
)
def test_what_does_not_fails(program: str) -> None:
    assert not passes(program)


@pytest.mark.parametrize("program", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_time_is_limited(program: str) -> None:
    started = time.monotonic()
    assert not passes(program, seconds=1)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("away", ["", "os.setsid()"])
def test_what_it_started_ends_with_it(away: str) -> None:
    """A child that goes on sleeping, in a session of its own too; nor is it waited for."""
    if away and not namespaces_are_allowed():
        pytest.skip("no user namespaces here")
    name = f"sleeper-{os.getpid()}-{time.monotonic_ns()}"
    child = f"import os, time; {away or 'pass'}; time.sleep(60)"
    program = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, {name!r}])\n"
        "time.sleep(0.5)\n"
    )
    started = time.monotonic()
    assert passes(program)
    assert time.monotonic() - started < 8
    for _ in range(100):
        if not any(name in line for line in command_lines()):
            return
        time.sleep(0.05)
    pytest.fail("a child of the program lives on")


@pytest.mark.parametrize(
    "harm",
    [
        "import shutil\nshutil.rmtree({kept!r})",
        "open({kept!r} + '/file', 'w').write('x')",
        "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    ],
)
def test_nothing_outside_its_folder_is_reached(harm: str, tmp_path: Path) -> None:
    if not namespaces_are_allowed():
        pytest.skip("no user namespaces here")
    (tmp_path / "file").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not passes(harm.format(kept=str(tmp_path), port=server.getsockname()[1]))
    assert (tmp_path / "file").read_text() == "kept"
    assert passes("open('file', 'w').write('x')\nassert open('file').read() == 'x'")


def test_a_child_that_leaves_does_not_keep_us() -> None:
    """With no program of its own it has all that is open here."""
    program = "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(30)\n    os._exit(0)\n"
    started = time.monotonic()
    assert passes(program)
    assert time.monotonic() - started < 8


def test_a_deep_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert passes("import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\n")
    assert not list(tmp_path.iterdir())


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes().decode(errors="replace")


def namespaces_are_allowed() -> bool:
    code = "import os; os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWPID)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
