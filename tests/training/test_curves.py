"""Curves that others draw: TensorBoard's files read back by TensorBoard, Weights & Biases offline."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btx_megatron.errors import UserError
from btx_megatron.job import Job
from btx_megatron.recipe import Recipe, Stage, Training
from btx_megatron.training.curves import TensorBoard, check_installed, open_curves, scalars_of

RECORD = {
    "step": 7,
    "tokens": 700,
    "lm_loss": 2.5,
    "grad_norm": None,
    "learning_rate": 1e-3,
    "seconds": 0.5,
    "tokens_per_second": 200.0,
    "tflops_per_rank": 0.25,
    "mfu": 0.4,
    "memory_bytes": 1000,
    "expert_load": {"min": [0.1, 0.0], "max": [0.4, 0.9], "dead": [0, 1]},
}


def curves_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder: tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_scalars_of_a_record() -> None:
    assert scalars_of(RECORD) == {
        "lm loss": 2.5,
        "learning-rate": 1e-3,
        "iteration-time": 0.5,
        "speed/tokens per second": 200.0,
        "speed/TFLOP per second and rank": 0.25,
        "speed/MFU": 0.4,
        "memory/bytes": 1000,
        "expert load min/layer 0": 0.1,
        "expert load min/layer 1": 0.0,
        "expert load max/layer 0": 0.4,
        "expert load max/layer 1": 0.9,
        "expert load dead/layer 0": 0,
        "expert load dead/layer 1": 1,
    }


def test_tensorboard_goes_on_without_a_step_twice_and_without_a_gap(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path, done=0)
    for step in range(1, 8):
        first.write(step, {"lm loss": step, "learning-rate": 0.5})
    # the rank is killed: nothing closes the file
    second = TensorBoard(tmp_path, done=5)
    for step in range(6, 10):
        second.write(step, {"lm loss": 10 * step, "learning-rate": 0.5})
    second.close()
    curves = curves_in(tmp_path)
    assert curves["lm loss"] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60), (7, 70), (8, 80), (9, 90)]
    assert [step for step, _ in curves["learning-rate"]] == list(range(1, 10))
    first.close()


def test_a_stage_that_begins_anew_shows_nothing_of_before(tmp_path: Path) -> None:
    for scale in (1, 10):  # killed before its first checkpoint
        curves = TensorBoard(tmp_path, done=0)
        curves.write(1, {"lm loss": scale})
        curves.write(2, {"lm loss": 2 * scale})
    assert curves_in(tmp_path)["lm loss"] == [(1, 10), (2, 20)]


def job_in(folder: Path, training: Training) -> tuple[Job, Stage]:
    recipe = Recipe(name="small", training=training)
    return Job("train", "seed", recipe, folder / "run", folder), Stage(training=training)


def test_the_recipe_chooses(tmp_path: Path) -> None:
    job, stage = job_in(tmp_path, Training())
    (board,) = open_curves(job, stage, 0)
    board.write(1, {"lm loss": 3.0})
    board.close()
    assert curves_in(tmp_path / "tensorboard") == {"lm loss": [(1, 3.0)]}
    assert open_curves(job, replace(stage, training=Training(tensorboard=False)), 0) == []


def test_what_is_missing_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btx_megatron.training.curves.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"training\.tensorboard.*not installed"):
        check_installed(Training())
    check_installed(Training(tensorboard=False))
    with pytest.raises(UserError, match=r"training\.wandb_project: .*btx-megatron\[wandb\]"):
        check_installed(Training(tensorboard=False, wandb_project="mine"))


# --- Weights & Biases: the real package, where it is installed


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def messages(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log, in blocks of 32 KiB, behind 7 bytes of its own."""
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last piece of one
            yield whole
            whole = b""


def history(run: Path) -> list[dict[str, Any]]:
    """The rows that an offline run has."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for message in messages(next(run.glob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def test_weights_and_biases_offline(offline: None, tmp_path: Path) -> None:
    """A stage in two attempts: one run, whose second part begins where the checkpoint was."""
    job, stage = job_in(tmp_path, Training(tensorboard=False, wandb_project="mine"))
    for done in (0, 3):
        (curves,) = open_curves(job, stage, done)
        for step in range(done + 1, done + 4):
            curves.write(step, {"lm loss": float(step)})
        curves.close()
        time.sleep(1.1)  # folders are named by the second
    parts = sorted(tmp_path.glob("wandb/offline-run-*"))
    run_id = (tmp_path / "wandb-id.txt").read_text()
    assert [part.name.rpartition("-")[2] for part in parts] == [run_id, run_id]
    told = [[(row["_step"], row["lm loss"]) for row in history(part)] for part in parts]
    assert told == [[(1, 1), (2, 2), (3, 3)], [(4, 4), (5, 5), (6, 6)]]


def test_weights_and_biases_without_a_login_is_a_users_mistake(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    program = f"""
from pathlib import Path
from btx_megatron.job import Job
from btx_megatron.recipe import Recipe
from btx_megatron.training.curves import WeightsAndBiases
folder = Path({str(tmp_path)!r})
WeightsAndBiases(Job("train", "seed", Recipe(), folder, folder), "mine")
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    environment["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # nobody is asked
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("btx_megatron.errors.UserError: training.wandb_project mine: "), done.stderr
    assert last.endswith("run `wandb login`, set WANDB_MODE=offline, or take the key out")
