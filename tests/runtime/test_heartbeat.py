"""Who is blamed for a hang, and that what moves is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from btx_megatron.runtime.heartbeat import (
    Beat,
    HangWatch,
    Heartbeat,
    blame,
    clear_beats,
    read_beats,
    seconds_between_beats,
)

COLLECTIVE = "torch/distributed/distributed_c10d.py:7 all_reduce"
WAITS = Beat(rank=0, step=7, doing="step 7", where=COLLECTIVE, time=100.0)
ROOT = Path(__file__).parents[2]


def write(folder: Path, beat: Beat) -> None:
    (folder / f"heartbeat-{beat.rank}.json").write_text(json.dumps(asdict(beat)))


def test_a_rank_without_a_sign_of_life_is_named_first() -> None:
    beats = [WAITS, replace(WAITS, rank=1, step=6, time=90.0), replace(WAITS, rank=2, step=5)]
    assert blame(beats, alive_since=95.0) == (
        f"rank 1 gives no sign of life; last seen: rank 1 in step 7 ({COLLECTIVE})"
    )


def test_a_rank_that_is_behind_is_named() -> None:
    late = Beat(rank=3, step=6, doing="step 6", where="data/blend.py:9 batches", time=100.0)
    assert blame([WAITS, late], 95.0) == (
        "rank 3 is behind: rank 3 in step 6 (data/blend.py:9 batches); the others are in step 7"
    )


def test_a_rank_that_is_waited_for_is_named() -> None:
    busy = [replace(WAITS, rank=rank, where="data/blend.py:9 batches") for rank in (1, 2)]
    assert blame([WAITS, *busy], 95.0) == (
        "ranks 1, 2 are waited for: ranks 1, 2 in step 7 (data/blend.py:9 batches)"
    )


def test_where_nobody_is_ahead_all_places_are_told() -> None:
    beats = [replace(WAITS, rank=rank) for rank in range(20)]
    assert blame(beats, 95.0) == (
        f"no rank is ahead of another: ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more in step 7 ({COLLECTIVE})"
    )


def look(watch: HangWatch, seconds: float) -> str | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        line = watch.look()
        if line:
            return line
        time.sleep(0.01)
    return None


def test_a_hang_is_told_after_the_time_out_and_not_before(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path, 0.4)
    assert look(watch, 0.6) is None  # nobody has begun
    started = time.monotonic()
    for rank in (0, 1):
        write(tmp_path, replace(WAITS, rank=rank, time=time.time() + 60 * rank))
    line = look(watch, 5)
    assert line is not None
    assert line.startswith("nothing has moved for 0 s: rank 0 gives no sign of life")
    assert 0.4 <= time.monotonic() - started < 2


def test_what_moves_is_left_alone(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path, 0.3)
    for step in range(8):
        write(tmp_path, replace(WAITS, step=step))
        assert look(watch, 0.1) is None
    for step in range(8):  # saving counts, too
        write(tmp_path, replace(WAITS, doing=f"saving step {step}"))
        assert look(watch, 0.1) is None


def test_time_in_which_nobody_looked_does_not_count(tmp_path: Path) -> None:
    watch = HangWatch(tmp_path, 1.0)
    write(tmp_path, WAITS)
    assert look(watch, 0.2) is None
    time.sleep(1.5)  # the supervisor itself was stopped
    assert watch.look() is None


def test_the_file_says_where_the_main_thread_stands_and_goes_with_it(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, rank=3, timeout_seconds=0.4) as heartbeat:
        heartbeat.tell(5, "step 5")
        threading.Event().wait(0.2)
        (beat,) = read_beats(tmp_path)
        assert (beat.rank, beat.step, beat.doing) == (3, 5, "step 5")
        assert "threading.py" in beat.where
        assert beat.where.endswith(" wait")
        assert time.time() - beat.time < 5
    assert read_beats(tmp_path) == []


def test_a_stopped_process_gives_no_sign_of_life(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from btx_megatron.runtime.heartbeat import Heartbeat\n"
        "with Heartbeat(Path(sys.argv[1]), int(sys.argv[2]), 1.0) as beat:\n"
        "    beat.tell(4, 'step 4'); time.sleep(60)\n"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank)], cwd=ROOT) for rank in (0, 1)
    ]
    try:
        deadline = time.monotonic() + 20
        while [beat.step for beat in read_beats(tmp_path)] != [4, 4]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks[1].send_signal(signal.SIGSTOP)
        line = look(HangWatch(tmp_path, 1.0), 10)
        assert line is not None
        assert "rank 1 gives no sign of life; last seen: rank 1 in step 4 (" in line
    finally:
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
            rank.wait()
    clear_beats(tmp_path)
    assert read_beats(tmp_path) == []


@pytest.mark.parametrize(("timeout", "pause"), [(600, 10), (60, 3), (2, 0.1)])
def test_beats_are_rare(timeout: float, pause: float) -> None:
    assert seconds_between_beats(timeout) == pause
