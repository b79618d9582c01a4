"""A small seed stage of two ranks as `btx` runs it, and its processes, for the tests of faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "data": {
        "domains": [
            {"name": "json", "sources": [{"path": "stdlib:", "include": ["json/*.py", "email/*.py"]}]}
        ],
    },
    "tokenizer": {"vocab_size": 512},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "seq_length": 32,
        "hidden_dropout": 0.1,  # so that the generators count
    },
    "moe": {"moe_router_topk": 2},
    "training": {
        "train_iters": 600,  # more than the kills of a test let it come
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "lr": 3e-3,
        "lr_warmup_iters": 5,
        "save_interval": 3,
        "save_total_limit": 2,
    },
    "layout": {"data_parallel_size": 2, "use_distributed_optimizer": True},
    "baselines": [],
    "launch": {"device": "cpu"},
}


class SeedRun:
    """A run folder with its data ready, and the seed's work in it."""

    def __init__(self, recipe: Path, path: Path, *overrides: str) -> None:
        self.recipe, self.path, self.overrides = recipe, path, overrides

    @property
    def work(self) -> Path:
        """Where the seed stage works until it is finished."""
        return self.path / ".work" / "seed"

    @property
    def checkpoints(self) -> Path:
        """Of the unfinished stage."""
        return self.work / "checkpoints"

    def start(self, stage: str = "seed") -> subprocess.Popen[str]:
        """`btx seed`, in the background."""
        command = [sys.executable, "-m", "btx_megatron", stage, str(self.recipe), f"run_folder={self.path}"]
        return subprocess.Popen(
            [*command, *self.overrides], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and output; afterwards none of its processes is left."""
        output, _ = process.communicate(timeout=900)
        wait_for(lambda: not self.processes("RANK"), 30)
        return process.returncode, output

    def copy(self, path: Path, *overrides: str) -> SeedRun:
        """The same data in another run folder."""
        shutil.copytree(self.path, path)
        return SeedRun(self.recipe, path, *overrides)

    def step(self) -> int:
        """The step that the running attempt has told last; 0 before the first."""
        try:
            record = json.loads((self.work / "progress.json").read_text())
        except FileNotFoundError:
            return 0
        return int(record["done"]) if record["phase"] == "training" else 0

    def tracked(self) -> int:
        """The step of the latest checkpoint; 0 without one."""
        tracker = self.checkpoints / "latest_checkpointed_iteration.txt"
        return int(tracker.read_text()) if tracker.exists() else 0

    def wait_for(self, step: int, process: subprocess.Popen[str]) -> None:
        """Until the running attempt has told a step beyond ``step``, or has ended."""
        wait_for(lambda: self.step() > step or process.poll() is not None, 600)

    def wait_for_save(self, step: int, process: subprocess.Popen[str]) -> None:
        """Until there is a checkpoint of a step beyond ``step``, or the attempt has ended."""
        wait_for(lambda: self.tracked() > step or process.poll() is not None, 600)

    def processes(self, variable: str | None = None) -> dict[int, str]:
        """Processes that work on this run, by id; those that have a variable, with its value."""
        found: dict[int, str] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.work) not in (folder / "cmdline").read_bytes().decode(errors="replace"):
                    continue
                lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended
                continue
            values = dict(line.partition("=")[::2] for line in lines)
            if variable is None or variable in values:
                found[int(folder.name)] = values.get(variable or "", "")
        return found

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        return next(pid for pid, rank in self.processes("RANK").items() if rank == str(number))

    def losses(self) -> list[tuple[int, float, float, float]]:
        """Step, loss, norm and rate of the finished stage."""
        lines = (self.path / "seed" / "losses.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [(one["step"], one["lm_loss"], one["grad_norm"], one["learning_rate"]) for one in records]


def prepared(folder: Path, *overrides: str) -> SeedRun:
    """A run whose data is ready."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    run = SeedRun(recipe, folder / "prepared", *overrides)
    code, output = run.finish(run.start("prepare"))
    assert code == 0, output
    return run


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """What ``condition`` gives once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("waited in vain")


def end_all(run: SeedRun) -> None:
    """Leave nothing behind."""
    for pid in run.processes():
        os.kill(pid, 9)
