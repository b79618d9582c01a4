"""``btx submit`` on a real Slurm of four nodes: the graph, time limits, dead nodes, dead experts, cancel."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import NODES, Cluster, processes

from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.cluster import Cluster as SimulatedCluster
from btx_megatron.simulate.jobs import SimulatedJob

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

    def __init__(self, cluster: Cluster, folder: Path, name: str = "tiny") -> None:
        self.cluster, self.name, self.path = cluster, name, folder / "run"
        folder.mkdir(exist_ok=True)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(RECIPE | {"name": name, "run_folder": str(self.path)}))

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
        return self.jobs()[stage]

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The run's jobs by stage, the last one of each."""
        mine = f"{self.name}:"
        told = self.cluster.jobs().items()
        return {name.removeprefix(mine): job for name, job in told if name.startswith(mine)}

    def wait(self, stage: str, state: str, seconds: float = 240) -> dict[str, Any]:
        """The stage's job, once it is in that state."""
        return self.until(lambda: self.job(stage), lambda job: job["job_state"] == state, seconds)

    def wait_for_all(self) -> None:
        """The ends of the graph."""
        for stage in ("report", "export"):
            self.wait(stage, "COMPLETED", seconds=400)

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

    def go_on_soon(self, stage: str) -> None:
        """Slurm holds a job that came back for two minutes; five seconds are enough here.

        None are too few: in the second in which a node is back Slurm 22.05 starts the job, then finds no GPU
        for its steps, or lets them wait for ever.
        """
        number = str(self.job(stage)["job_id"])
        self.cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now+5")


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbed."""
    run = Run(cluster, tmp_path_factory.mktemp("whole"))
    told = run.submit()
    assert "expert:json: job 3 on 2 nodes x 1, after 1, 2" in told
    run.wait_for_all()
    return run


def test_the_whole_graph(whole: Run) -> None:
    summary = json.loads((whole.path / "report" / "summary.json").read_text())
    assert set(summary["held_out_loss"]) == {"seed", "expert:json", "expert:mail", "average", "merged", "btx"}
    config = json.loads((whole.path / "export" / "model" / "config.json").read_text())
    assert config["model_type"] == "mixtral"
    assert {job["job_state"] for job in whole.jobs().values()} == {"COMPLETED"}
    assert whole.job("expert:json")["node_count"] == 2
    assert not too_early(whole)
    status = whole.btx("status", str(whole.path))
    assert "3 COMPLETED" in status
    assert "nothing to submit" in whole.submit()
    log = (whole.path / "slurm" / "logs" / "expert-json.log").read_text()
    assert "on n[" in log


def too_early(run: Run) -> list[str]:
    """Jobs that began before all that they waited for had ended; the simulation takes for granted: none."""
    jobs = {job["job_id"]: job for job in run.jobs().values()}
    told = json.loads((run.path / "slurm" / "jobs.json").read_text())
    return [
        f"{stage} began {jobs[job['id']]['start_time']}, {other} ended {jobs[other]['end_time']}"
        for stage, job in told.items()
        for other in job["after"]
        if jobs[job["id"]]["start_time"] < jobs[other]["end_time"]
    ]


HOSTILE = """it's "one" $(touch hacked) `touch hacked`; touch hacked & %j
two"""


def test_a_time_limit_saves_and_goes_on(cluster: Cluster, whole: Run, tmp_path: Path) -> None:
    """And an expert that dies meanwhile touches no other; the same command repairs the graph.

    Another run, whose name and folder would do harm if a shell read them, is trained beside it.
    """
    run, beside = Run(cluster, tmp_path), Run(cluster, tmp_path / HOSTILE, HOSTILE)
    run.submit()
    beside.submit()
    run.wait_for_steps("expert:mail", 25)
    number = run.job("expert:mail")["job_id"]
    cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    run.until(lambda: run.job("expert:mail"), lambda job: job["restart_cnt"] == 1)
    reached = max(run.losses("expert:mail"))
    assert 25 <= reached < 250
    assert "PENDING" in run.btx("status", str(run.path))
    run.until(lambda: run.job("expert:mail")["job_state"], lambda state: state == "PENDING")
    run.go_on_soon("expert:mail")
    run.wait_for_steps("expert:mail", reached + 5)
    kill_all_of(number)
    run.wait("expert:mail", "FAILED")
    run.wait("mix", "CANCELLED")
    run.wait("expert:json", "COMPLETED")

    told = run.submit()
    assert "expert:json" not in told
    assert all(f"{stage}: job " in told for stage in ("expert:mail", "mix", "finetune", "report"))
    run.wait("expert:mail", "RUNNING")
    run.wait_for_steps("expert:mail", reached + 20)
    told = run.btx("cancel", str(run.path))
    assert "saves and ends" in told
    assert "mix: job" in told
    over = ("RUNNING", "COMPLETING", "PENDING")
    run.until(lambda: run.job("expert:mail")["job_state"], lambda state: state not in over)
    assert reached + 20 <= max(run.losses("expert:mail")) < 250
    assert "nothing to cancel" in run.btx("cancel", str(run.path))

    run.submit()
    run.wait_for_all()
    assert not too_early(run)
    assert run.job("expert:json")["end_time"] < run.job("expert:mail")["start_time"]  # it waited for nobody
    beside.wait_for_all()
    for one in (run, beside):
        for stage in ("expert:json", "expert:mail", "finetune"):
            assert one.losses(stage) == whole.losses(stage), (one.name, stage)
    assert not [*tmp_path.rglob("hacked"), *Path().glob("hacked")]


def kill_all_of(number: int) -> None:
    """The job's processes die at once: no time to say anything."""
    for pid, environment in processes():
        if f"SLURM_JOB_ID={number}\0" in environment:
            os.kill(pid, signal.SIGKILL)


def test_a_dead_node_and_a_new_controller(cluster: Cluster, whole: Run, tmp_path: Path) -> None:
    """Nobody submits again, and the jobs come in the order and at the times that the simulation says."""
    run = Run(cluster, tmp_path)
    run.submit()
    run.wait("expert:json", "COMPLETED")
    run.wait_for_steps("expert:mail", 25)
    cluster.restart_controller()
    first = run.job("expert:mail")
    node = f"n{first['nodes'].rstrip(']')[-1]}"
    cluster.kill_node(node)
    killed = time.time()
    run.until(lambda: run.job("expert:mail"), lambda job: job["restart_cnt"] == 1)
    cluster.start_node(node)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    run.until(lambda: run.job("expert:mail")["job_state"], lambda state: state == "PENDING")
    run.go_on_soon("expert:mail")
    run.wait_for_all()
    assert {stage for stage, job in run.jobs().items() if job["restart_cnt"]} == {"expert:mail"}
    assert not too_early(run)
    for stage in ("expert:mail", "finetune"):
        assert run.losses(stage) == whole.losses(stage)

    begins, ends = simulated(run, first["start_time"], killed)
    started = run.job("prepare")["start_time"]
    for stage, job in run.jobs().items():
        if stage != "expert:mail":  # its begin is its first one in the simulation, its last one in Slurm
            assert begins[stage] == pytest.approx(job["start_time"] - started, abs=30), stage
        assert ends[stage] == pytest.approx(job["end_time"] - started, abs=30), stage


def simulated(run: Run, first_start: float, killed: float) -> tuple[dict[str, float], dict[str, float]]:
    """When each job began and ended, in seconds, if a node of ``expert:mail`` dies at that moment.

    From the run: how long each job's (last) attempt took, and how long the dead one lay in the queue.
    """
    jobs = run.jobs()
    told = json.loads((run.path / "slurm" / "jobs.json").read_text())
    names = {job["id"]: stage for stage, job in told.items()}
    mail = jobs["expert:mail"]
    # what was left when it came back is one part of its training; before it died it had saved so many
    saved = {"expert:mail": int((killed - first_start) // (mail["end_time"] - mail["start_time"]))}
    graph = [
        SimulatedJob(
            stage,
            tuple(names[other] for other in told[stage]["after"]),
            job["node_count"] if stage in ("seed", "expert:json", "expert:mail", "finetune") else 0,
            (saved.get(stage, 0) + 1) * (job["end_time"] - job["start_time"]),
            saved.get(stage, 0) + 1,
        )
        for stage, job in jobs.items()
    ]
    assumptions = Assumptions(
        gpu_mtbf_hours=1,
        gpus_per_node=1,
        spare_nodes=0,
        node_repair_hours=mail["start_time"] - killed,
        queue_minutes=0,
        restart_minutes=0,
        checkpoint_seconds=0,
        slow_node_share=0,
    )
    cluster = SimulatedCluster(graph, len(NODES), assumptions, seed=0)
    for stage, job in cluster.running.items():
        job.random = Fate(killed - first_start if stage == "expert:mail" else math.inf, job.job.nodes)
    records = cluster.run()
    return {n: r.begin for n, r in records.items()}, {n: r.end for n, r in records.items()}


class Fate(random.Random):
    """One failure after so many seconds on so many nodes, none after it."""

    def __init__(self, seconds: float, nodes: int) -> None:
        super().__init__(0)
        self.lives = [seconds * nodes]

    def expovariate(self, lambd: float = 1.0) -> float:
        return self.lives.pop() if self.lives else math.inf
