"""``btx submit`` on a real Slurm of four nodes: the graph, time limits, dead nodes, dead experts, cancel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, processes

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "domains": [
            {"name": "json", "sources": [{"path": "stdlib:", "include": ["json/*.py"]}]},
            {"name": "mail", "sources": [{"path": "stdlib:", "include": ["email/*.py"]}]},
        ]
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
    "training": {
        "train_iters": 20,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "lr": 3e-3,
        "lr_warmup_iters": 5,
        "save_interval": 10,
    },
    "stages": {
        "experts": {
            "json": {"layout": {"data_parallel_size": 2}},
            "mail": {"layout": {"data_parallel_size": 2}, "training": {"train_iters": 250}},
        },
        "finetune": {"layout": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    },
    "baselines": [],
    "export": {"to": "hf"},
    "launch": {"device": "cpu"},
    "slurm": {
        "gpus_per_node": 1,  # two ranks are two nodes
        "partition": "gpu",
        "time": "00:30:00",
        "cpu": {"partition": "cpu", "cpus_per_node": 2},
        "setup": ['echo "an unset variable: $NOBODY_HAS_SET_THIS"'],
        "environment": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    },
}


class Run:
    """A recipe on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.path = cluster, folder / "run"
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(RECIPE | {"run_folder": str(self.path)}))

    def btx(self, *arguments: str) -> str:
        """Output of a command, which must end well."""
        command = [sys.executable, "-m", "btx_megatron", *arguments]
        done = subprocess.run(
            command, env=self.cluster.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: str) -> str:
        return self.btx("submit", str(self.recipe), *arguments)

    def job(self, stage: str) -> dict[str, Any]:
        return self.cluster.jobs()[f"tiny:{stage}"]

    def wait(self, stage: str, state: str, seconds: float = 240) -> dict[str, Any]:
        """The stage's job, once it is in that state."""
        return self.until(lambda: self.job(stage), lambda job: job["job_state"] == state, seconds)

    def wait_for_steps(self, stage: str, steps: int) -> None:
        """Until so many steps are in the stage's log of losses."""
        self.until(lambda: len(self.losses(stage)), lambda count: count >= steps)

    def until(self, look: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while not good(seen := look()):
            assert time.monotonic() < deadline, f"{seen}\n{self.logs()}"
            time.sleep(0.3)
        return seen

    def losses(self, stage: str) -> dict[int, float]:
        """Step -> loss; of a step that was done twice, the last."""
        folder = stage.replace("expert:", "experts/")
        for path in (self.path / folder, self.path / ".work" / folder):
            if (path / "losses.jsonl").exists():
                lines = [
                    line for line in (path / "losses.jsonl").read_text().splitlines() if line.endswith("}")
                ]
                return {record["step"]: record["lm_loss"] for record in map(json.loads, lines)}
        return {}

    def logs(self) -> str:
        found = sorted((self.path / "slurm" / "logs").glob("*.log"))
        return "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in found)

    def go_on_now(self, stage: str) -> None:
        """Slurm holds a job that came back for two minutes."""
        number = str(self.job(stage)["job_id"])
        self.cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbed."""
    run = Run(cluster, tmp_path_factory.mktemp("whole"))
    told = run.submit()
    assert "expert:json: job 3 on 2 nodes x 1, after 1, 2" in told
    run.wait("report", "COMPLETED", seconds=400)
    run.wait("export", "COMPLETED")
    return run


def test_the_whole_graph(whole: Run) -> None:
    summary = json.loads((whole.path / "report" / "summary.json").read_text())
    assert set(summary["held_out_loss"]) == {"seed", "expert:json", "expert:mail", "average", "merged", "btx"}
    config = json.loads((whole.path / "export" / "model" / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    states = {name: job["job_state"] for name, job in whole.cluster.jobs().items()}
    assert set(states.values()) == {"COMPLETED"}
    assert whole.job("expert:json")["node_count"] == 2
    assert in_order(whole)
    status = whole.btx("status", str(whole.path))
    assert "3 COMPLETED" in status
    assert "nothing to submit" in whole.submit()
    log = (whole.path / "slurm" / "logs" / "expert-json.log").read_text()
    assert "on n[" in log


def in_order(run: Run) -> bool:
    """Whether each job began when all that it waited for had ended, as the simulation takes for granted."""
    jobs = {job["job_id"]: job for job in run.cluster.jobs().values()}
    told = json.loads((run.path / "slurm" / "jobs.json").read_text()).values()
    return all(
        jobs[job["id"]]["start_time"] >= jobs[other]["end_time"] for job in told for other in job["after"]
    )


def disturbed(cluster: Cluster, folder: Path) -> Run:
    """A run whose expert ``mail`` is training."""
    run = Run(cluster, folder)
    run.submit()
    run.wait_for_steps("expert:mail", 25)
    return run


def test_a_time_limit_saves_and_goes_on(cluster: Cluster, whole: Run, tmp_path: Path) -> None:
    """And an expert that dies meanwhile touches no other; the same command repairs the graph."""
    run = disturbed(cluster, tmp_path)
    number = run.job("expert:mail")["job_id"]
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    run.until(lambda: run.job("expert:mail"), lambda job: job["restart_cnt"] == 1)
    reached = max(run.losses("expert:mail"))
    assert 25 <= reached < 250
    assert "PENDING" in run.btx("status", str(run.path))
    run.until(lambda: run.job("expert:mail")["job_state"], lambda state: state == "PENDING")
    run.go_on_now("expert:mail")
    run.wait_for_steps("expert:mail", reached + 5)
    for pid, environment in processes():  # it dies: no time to say anything
        if f"SLURM_JOB_ID={number}\0" in environment:
            os.kill(pid, signal.SIGKILL)
    run.wait("expert:mail", "FAILED")
    run.wait("mix", "CANCELLED")
    run.wait("expert:json", "COMPLETED")
    told = run.submit()
    assert "expert:json" not in told
    assert all(f"{stage}: job " in told for stage in ("expert:mail", "mix", "finetune", "report"))
    run.wait("export", "COMPLETED", seconds=400)
    assert in_order(run)
    assert run.job("expert:json")["end_time"] < run.job("expert:mail")["start_time"]  # it waited for nobody
    assert run.losses("expert:mail") == whole.losses("expert:mail")
    assert run.losses("finetune") == whole.losses("finetune")


def test_a_dead_node_and_a_cancelled_run(cluster: Cluster, whole: Run, tmp_path: Path) -> None:
    run = disturbed(cluster, tmp_path)
    node = run.job("expert:mail")["nodes"]
    last = f"n{node.rstrip(']')[-1]}"
    cluster.kill_node(last)
    run.until(lambda: run.job("expert:mail"), lambda job: job["restart_cnt"] == 1)
    cluster.start_node(last)
    cluster.run("scontrol", "update", f"NodeName={last}", "State=RESUME")
    run.until(lambda: run.job("expert:mail")["job_state"], lambda state: state == "PENDING")
    run.go_on_now("expert:mail")
    run.wait("expert:mail", "RUNNING")
    run.wait_for_steps("expert:mail", 80)
    told = run.btx("cancel", str(run.path))
    assert "saves and ends" in told
    assert "mix: job" in told
    run.until(
        lambda: run.job("expert:mail")["job_state"], lambda state: state not in ("RUNNING", "COMPLETING")
    )
    saved = max(run.losses("expert:mail"))
    assert saved < 250
    assert "nothing to cancel" in run.btx("cancel", str(run.path))
    run.submit("--only", "expert:mail")
    run.wait("expert:mail", "COMPLETED")
    assert run.losses("expert:mail") == whole.losses("expert:mail")
