"""The whole method as a user runs it: `btx run`, stopped, killed and gone on with, on the real engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from btx_megatron.checkpoints.tracker import find_checkpoint
from btx_megatron.runtime import cpu_backend

pytestmark = pytest.mark.slow

TWO_RANKS = {"data_parallel_size": 2}
RECIPE: dict[str, Any] = {
    "data": {
        "held_out_max_tokens": 2000,
        "domains": [
            {"name": "json", "sources": [{"path": "stdlib:", "include": ["json/*.py", "email/*.py"]}]},
            {"name": "io", "sources": [{"path": "stdlib:", "include": ["asyncio/*.py"]}]},
            {"name": "xml", "sources": [{"path": "stdlib:", "include": ["xml/**/*.py"]}]},
        ],
    },
    "tokenizer": {"vocab_size": 512},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "seq_length": 64,
    },
    "training": {
        "train_iters": 60,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "lr": 3e-3,
        "lr_warmup_iters": 5,
        "save_interval": 25,
        "log_interval": 20,
    },
    "stages": {
        "seed": {"training": {"train_iters": 150}},
        "experts": {
            "json": {"layout": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
            "io": {
                "layout": TWO_RANKS | {"use_distributed_optimizer": True},
                "training": {"train_iters": 150},
            },
        },
        "finetune": {"layout": TWO_RANKS | {"expert_model_parallel_size": 2}},
    },
    "baselines": [],
    "launch": {"device": "cpu"},
    "export": {"to": "hf"},
    "evaluate": {"layout": TWO_RANKS | {"expert_model_parallel_size": 2}},
}
TRAINED = ("seed", "experts/json", "experts/io", "experts/xml", "finetune")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("whole") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "btx_megatron", "run", str(recipe), f"run_folder={run}"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    run = recipe.parent / "whole"
    code, output = finish(start(recipe, run))
    assert code == 0, output
    return run


def losses(run: Path, stage: str) -> list[tuple[int, float]]:
    lines = (run / stage / "losses.jsonl").read_text().splitlines()
    return [(record["step"], record["lm_loss"]) for record in map(json.loads, lines)]


def wait_for_step(run: Path, stage: str, step: int) -> None:
    progress = run / ".work" / stage / "progress.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if progress.exists():
            record = json.loads(progress.read_text())
            if record["phase"] == "training" and record["done"] >= step:
                return
        time.sleep(0.02)
    raise AssertionError(f"{stage} never reached step {step}")


def processes_of(run: Path) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(run) in command:
                found.append(command)
    return found


def test_every_stage_is_published(whole: Path) -> None:
    for stage in ("data", *TRAINED, "mix", "average", "evaluate", "report", "export"):
        manifest = json.loads((whole / stage / "manifest.json").read_text())
        assert len(manifest["fingerprint"]) == 64
        assert manifest["duration_seconds"] > 0
    summary = json.loads((whole / "report" / "summary.json").read_text())
    rows = ["seed", "expert:json", "expert:io", "expert:xml", "average", "merged", "btx"]
    assert list(summary["held_out_loss"]) == rows
    assert summary["tokens"]["btx"] == (60 + 150 + 60 + 60) * 4 * 64
    for row in rows:
        values = summary["held_out_loss"][row]
        assert values["mean"] == pytest.approx((values["json"] + values["io"] + values["xml"]) / 3)
        assert 1 < values["mean"] < 6.3  # better than a uniform guess over 512 pieces


def test_the_export_opens_in_transformers(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "export" / "model")
    assert (model.config.model_type, model.config.num_local_experts) == ("mixtral", 4)
    tokenizer = AutoTokenizer.from_pretrained(whole / "export" / "model")
    assert tokenizer.decode(tokenizer("def load(", add_special_tokens=False)["input_ids"]) == "def load("


def test_stopped_killed_and_gone_on_with_gives_the_same_run(recipe: Path, whole: Path) -> None:
    run = recipe.parent / "interrupted"
    process = start(recipe, run)
    wait_for_step(run, "seed", 30)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert not (run / "seed").exists()

    process = start(recipe, run)
    wait_for_step(run, "experts/io", 40)
    process.kill()
    finish(process)
    time.sleep(2)
    assert processes_of(run) == []

    seed_before = (run / "seed" / "manifest.json").stat().st_mtime_ns
    process = start(recipe, run)
    code, output = finish(process)
    assert code == 0, output
    assert (run / "seed" / "manifest.json").stat().st_mtime_ns == seed_before
    for stage in TRAINED:
        assert losses(run, stage) == losses(whole, stage), stage
    reports = [json.loads((r / "report" / "summary.json").read_text()) for r in (whole, run)]
    assert reports[0]["held_out_loss"] == reports[1]["held_out_loss"]

    again = start(recipe, run)
    started = time.monotonic()
    code, output = finish(again)
    assert code == 0
    assert "nothing to do" in output
    assert time.monotonic() - started < 5


def test_the_recipe_lies_in_every_checkpoint(whole: Path) -> None:
    cpu_backend.install()
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    resolved = yaml.safe_load((whole / "recipe.yaml").read_text())
    for stage in (*TRAINED, "mix", "average"):
        common = load_common_state_dict(str(find_checkpoint(whole / stage)))
        assert common["recipe"] == resolved, stage


def test_damaged_weights_are_refused_before_they_are_trained_on(whole: Path, recipe: Path) -> None:
    run = recipe.parent / "damaged"
    shutil.copytree(whole, run)
    for stage in ("finetune", "evaluate", "export", "report"):
        shutil.rmtree(run / stage)
    file = find_checkpoint(run / "mix") / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    command = [sys.executable, "-m", "btx_megatron", "finetune", str(recipe), f"run_folder={run}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert str(run / "mix") in done.stderr
    assert done.stderr.count("\n") == 1


def test_verify_reads_what_the_run_wrote(whole: Path) -> None:
    for stage in (*TRAINED, "mix"):
        command = [sys.executable, "-m", "btx_megatron", "verify", str(whole / stage / "checkpoints")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "equal to the manifest" in done.stdout
