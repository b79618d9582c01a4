"""What a running stage survives: kills at any moment, signals, a rank that hangs, a disk that is full.

All through `btx` and torchrun, two ranks, asynchronous saves; held against a run that nothing disturbed and
that saved synchronously.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import SeedRun, end_all, prepared

from btx_megatron.checkpoints.tracker import latest_checkpoint
from btx_megatron.mixing.hashes import hash_tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 24
ENDLESS = "training.train_iters=100000"
SEED = int(os.environ.get("BTX_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SeedRun:
    return prepared(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(data: SeedRun) -> SeedRun:
    run = data.copy(data.path.parent / "whole", "training.async_save=false", "training.save_interval=1000")
    code, output = run.finish(run.start())
    assert code == 0, output
    return run


@pytest.fixture
def run(data: SeedRun, tmp_path: Path) -> Iterator[SeedRun]:
    run = data.copy(tmp_path / "run")
    yield run
    end_all(run)


def test_killed_at_random_moments_the_curve_is_the_uninterrupted_one(whole: SeedRun, run: SeedRun) -> None:
    print(f"BTX_FAULT_SEED={SEED}")  # shown where the test fails
    chance = random.Random(SEED)
    moments: list[str] = []
    tracked = 0
    for number in range(KILLS):
        before = run.step()
        process = run.start()
        try:
            if chance.random() < 0.25:  # while it starts, loads, or has just begun
                time.sleep(chance.uniform(0, 12))
            else:
                run.wait_for(before + chance.randrange(8), process)
                time.sleep(chance.uniform(0, 0.1))
            assert process.poll() is None, process.communicate()
            moments.append(_kill(run, process, one_rank=number % 2 == 0, which=chance.randrange(2)))
        finally:
            process.kill()
        run.finish(process)
        assert tracked <= run.tracked()
        tracked = run.tracked()
        path = latest_checkpoint(run.checkpoints)
        if path is not None:
            assert hash_tensors(path)
    print(f"{KILLS} kills: {'; '.join(moments)}")
    assert tracked > KILLS  # a step or more for each, on the slowest machine
    code, output = run.finish(run.start())
    assert code == 0, output
    assert run.losses() == whole.losses()
    assert hash_tensors(run.path / "seed" / "checkpoints") == hash_tensors(
        whole.path / "seed" / "checkpoints"
    )


def _kill(run: SeedRun, process: subprocess.Popen[str], one_rank: bool, which: int) -> str:
    """SIGKILL to one rank, or to btx, with which all end; returns what was under way."""
    step, saving = run.step(), len(list(run.checkpoints.glob("iter_*"))) > 2
    ranks = {rank: pid for pid, rank in run.processes("RANK").items()}
    what = f"step {step}{', saving' if saving else ''}"
    if one_rank and str(which) in ranks:
        os.kill(ranks[str(which)], signal.SIGKILL)
        code, output = run.finish(process)
        assert code == 1, output
        assert "stage seed failed: " in output
        return f"rank {which} at {what}"
    process.kill()
    return f"all at {what}"


def test_signals_stop_all_ranks_after_the_same_step_and_never_reach_torchrun(
    whole: SeedRun, run: SeedRun
) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        tracked, process = run.tracked(), run.start()
        run.wait_for(tracked + 5, process)
        if number != signal.SIGTERM:  # as a scheduler does that warns every process of a job
            for pid in run.processes():
                os.kill(pid, number)
        process.send_signal(number)
        code, output = run.finish(process)
        assert code == 75, output
        assert f"stopped by {number.name}" in output
        assert run.tracked() > tracked + 5
        lines = (run.work / "losses.jsonl").read_text().splitlines()
        assert len(lines) == run.tracked()  # the step of the stop is the one that was saved
    code, output = run.finish(run.start())
    assert code == 0, output
    assert run.losses() == whole.losses()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_and_the_stage_goes_on_later(tmp_path: Path, rank: int) -> None:
    run = prepared(tmp_path, "training.distributed_timeout_minutes=1", ENDLESS)
    try:
        process = run.start()
        run.wait_for_save(0, process)
        os.kill(run.rank(rank), signal.SIGSTOP)
        started = time.monotonic()
        code, output = run.finish(process)
        assert code == 1, output
        assert 55 < time.monotonic() - started < 180
        last = output.strip().splitlines()[-1]
        assert last.startswith("btx: stage seed failed: nothing has moved for ")
        assert f": rank {rank} gives no sign of life; last seen: rank {rank} in " in last
        tracked, process = run.tracked(), run.start()
        run.wait_for_save(tracked, process)
        process.send_signal(signal.SIGTERM)
        assert run.finish(process)[0] == 75
    finally:
        end_all(run)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_that_fails_keeps_the_last_good_one_and_says_so(
    whole: SeedRun, data: SeedRun, tmp_path: Path, asynchronous: str
) -> None:
    """One rank may write no file larger than 20 kB, which holds everything but its share of a checkpoint."""
    run = data.copy(tmp_path / "run", f"training.async_save={asynchronous}")
    try:
        process = run.start()
        run.wait_for_save(0, process)
        resource.prlimit(run.rank(1), resource.RLIMIT_FSIZE, (20_000, 20_000))
        code, output = run.finish(process)
        assert code == 1, output
        good = latest_checkpoint(run.checkpoints)
        assert good is not None
        assert hash_tensors(good)
        last = output.strip().splitlines()[-1]
        failed = f"iter_{run.tracked() + 3:07d}"
        assert last.startswith(
            f"btx: stage seed failed: {run.checkpoints / failed}: the checkpoint could not be saved (rank 1: "
            f"[Errno 27] File too large); {good.name} stays the latest; mend this and run again"
        )
        assert not (run.checkpoints / failed).exists()
        code, output = run.finish(run.start())
        assert code == 0, output
        assert run.losses() == whole.losses()
    finally:
        end_all(run)


def test_a_full_disk(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    run = prepared(place, ENDLESS)
    try:
        process = run.start()
        run.wait_for_save(0, process)
        with (place / "ballast").open("wb") as ballast:  # leaves room for logs, but for no checkpoint
            ballast.write(b"x" * (os.statvfs(place).f_bavail * os.statvfs(place).f_frsize - 150_000))
        code, output = run.finish(process)
        assert code == 1, output
        good = latest_checkpoint(run.checkpoints)
        assert good is not None
        assert hash_tensors(good)
        assert "No space left on device" in output
        assert f"{good.name} stays the latest" in output
        (place / "ballast").unlink()
        tracked, process = run.tracked(), run.start()
        run.wait_for_save(tracked, process)
        process.send_signal(signal.SIGTERM)
        code, output = run.finish(process)
        assert code == 75, output
    finally:
        end_all(run)
        subprocess.run(["umount", "--lazy", str(place)], check=True)
