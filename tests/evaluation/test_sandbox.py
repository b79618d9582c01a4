"""Programs under limits: what passes, and what cannot pretend to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from btx_megatron.evaluation.sandbox import passes


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import math\nprint(math.pi)",
        "def f():\n    return g()\n\ndef g():\n    return 1\n\nassert f() == 1",
        "if __name__ == '__main__':\n    x = 1\nassert x",
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


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(told)!r}, 'w').write(str(child.pid))\n"
    )
    assert passes(program)
    pid = int(told.read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("a child of the program lives on")
