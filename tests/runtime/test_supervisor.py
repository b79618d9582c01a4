"""Signals, stop requests and ends of processes, with children that are a few lines of Python."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from btx_megatron.runtime.outcome import Outcome, read_outcome, write_error
from btx_megatron.runtime.stop import request_stop
from btx_megatron.runtime.supervisor import STOP_SIGNALS, Command, Supervisor

ROOT = Path(__file__).parents[2]

OBEDIENT = """
import sys, time
from pathlib import Path
from btx_megatron.runtime.outcome import write_stopped
from btx_megatron.runtime.stop import stop_requested
work = Path(sys.argv[1])
(work / "up").touch()
while not stop_requested(work):
    time.sleep(0.01)
write_stopped(work)
"""
DEAF = "import sys, time; open(sys.argv[1] + '/up', 'w'); time.sleep(60)"


def command(work: Path, code: str, can_stop: bool = True) -> Command:
    work.mkdir(exist_ok=True)
    (work / "up").unlink(missing_ok=True)
    return Command(
        [sys.executable, "-c", code, str(work)], {"PYTHONPATH": str(ROOT)}, work, work / "log.txt", can_stop
    )


def wait(supervisor: Supervisor, seconds: float = 30) -> dict[str, tuple[Outcome, float]]:
    """All ends, once nothing runs any more."""
    ends: dict[str, tuple[Outcome, float]] = {}
    deadline = time.monotonic() + seconds
    while supervisor.running:
        assert time.monotonic() < deadline, "waited in vain"
        ends |= supervisor.poll()
        time.sleep(0.01)
    return ends


def wait_until_up(*folders: Path) -> None:
    deadline = time.monotonic() + 30
    while not all((folder / "up").exists() for folder in folders):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    with Supervisor() as supervisor:
        supervisor.start("a", command(tmp_path / "a", OBEDIENT))
        supervisor.start("b", command(tmp_path / "b", DEAF, can_stop=False))
        wait_until_up(tmp_path / "a", tmp_path / "b")
        os.kill(os.getpid(), number)
        ends = wait(supervisor)
        assert supervisor.stop_signal == number.name
        assert not supervisor.killed
    assert {name: outcome.kind for name, (outcome, _) in ends.items()} == {"a": "stopped", "b": "stopped"}


def test_under_nohup_the_terminal_may_go() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Supervisor() as supervisor:
            os.kill(os.getpid(), signal.SIGHUP)
            assert supervisor.stop_signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_kills_but_a_second_sigterm_waits(tmp_path: Path) -> None:
    with Supervisor() as supervisor:
        supervisor.start("a", command(tmp_path / "a", DEAF))
        wait_until_up(tmp_path / "a")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert supervisor.poll() == {}
        assert (tmp_path / "a" / "stop").exists()
        os.kill(os.getpid(), signal.SIGINT)
        ends = wait(supervisor)
        assert supervisor.killed
    assert ends["a"][0].kind == "stopped"


def test_handlers_are_put_back_and_nothing_is_left_running(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with suppress(ZeroDivisionError), Supervisor() as supervisor:
        supervisor.start("a", command(tmp_path / "a", DEAF))
        child = supervisor._children["a"].process
        raise ZeroDivisionError
    assert child.returncode == -signal.SIGKILL
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_an_old_stop_request_and_old_errors_are_forgotten(tmp_path: Path) -> None:
    work = tmp_path / "a"
    work.mkdir()
    request_stop(work)
    write_error(work, rank=0, exit_code=1, message="of long ago")
    done = "import sys; from pathlib import Path; from btx_megatron.runtime.outcome import write_result\n"
    done += "work = Path(sys.argv[1]); assert not (work / 'stop').exists(); write_result(work, {'x': 1})"
    with Supervisor() as supervisor:
        supervisor.start("a", command(work, done))
        outcome, seconds = wait(supervisor)["a"]
    assert outcome == Outcome("done", result={"x": 1})
    assert 0 < seconds < 30


@pytest.mark.parametrize("name", ["result.json", "error-0.json"])
@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_words_that_a_crash_of_the_machine_cut_are_none(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_outcome(tmp_path) is None


def test_a_crash_after_a_stop_request_is_a_crash(tmp_path: Path) -> None:
    crash = OBEDIENT.replace("write_stopped(work)", "raise OSError('disk full')")
    with Supervisor() as supervisor:
        supervisor.start("a", command(tmp_path / "a", crash))
        wait_until_up(tmp_path / "a")
        os.kill(os.getpid(), signal.SIGTERM)
        ends = wait(supervisor)
    assert ends["a"][0] == Outcome("failed", "OSError: disk full (exit code 1)")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "ended without a word (exit code 3)"),
        ("import os; os.kill(os.getpid(), 9)", "ended without a word (killed by signal 9)"),
        ("raise ValueError('two\\nlines')", "ValueError: two (exit code 1)"),
        (
            "print('traceback : Signal 9 (SIGKILL) received by PID 7'); "
            "print('torch.distributed.elastic.multiprocessing.errors.ChildFailedError: x'); exit(1)",
            "traceback : Signal 9 (SIGKILL) received by PID 7 (exit code 1)",
        ),
        (
            "print('srun: error: Unable to create step for job 1: Requested nodes are busy'); exit(1)",
            "srun: error: Unable to create step for job 1: Requested nodes are busy (exit code 1)",
        ),
    ],
)
def test_an_end_without_a_word_is_explained_from_the_log(tmp_path: Path, code: str, message: str) -> None:
    with Supervisor() as supervisor:
        start = command(tmp_path / "a", code)
        start.log.write_text("RuntimeError: of an earlier attempt\n")
        supervisor.start("a", start)
        ends = wait(supervisor)
    assert ends["a"][0] == Outcome("failed", message)
    assert start.log.read_text().startswith("RuntimeError: of an earlier attempt\n--- ")


def test_time_is_summed_over_attempts(tmp_path: Path) -> None:
    spent = []
    for _ in range(2):
        with Supervisor() as supervisor:
            supervisor.start("a", command(tmp_path / "a", "import time; time.sleep(0.2)"))
            spent.append(wait(supervisor)["a"][1])
    assert spent[0] > 0.2
    assert spent[1] > spent[0] + 0.2
