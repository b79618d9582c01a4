import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from btx_megatron.data.workers import WINDOW_PER_WORKER, Workers
from btx_megatron.runtime.cores import available_cores

ORPHANS = """
import os, sys, time
from btx_megatron.data.workers import Workers
if __name__ == "__main__":
    with Workers(2) as workers:
        for result in workers.map(time.sleep, [0, 0, 100, 100]):
            print("started", flush=True)
"""


def test_results_come_in_order_and_items_are_drawn_as_needed() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for i in range(100):
            drawn += 1
            yield -i

    with Workers(2) as workers:
        results = workers.map(abs, items())
        assert next(results) == 0
        assert drawn <= 2 * WINDOW_PER_WORKER
        assert list(results) == list(range(1, 100))


def test_zero_means_the_cores_of_this_process() -> None:
    assert Workers(0).count == available_cores() >= 1


def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        workers = [p for p in psutil.Process(parent.pid).children(recursive=True) if p.is_running()]
        assert len(workers) >= 2
        parent.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert alive == []
