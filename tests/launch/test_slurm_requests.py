"""What the recipe asks of Slurm, and what Slurm's answers mean; without a cluster (tests/slurm has one)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest

from btx_megatron.errors import UserError
from btx_megatron.job import Task
from btx_megatron.launch import queue as queue_module
from btx_megatron.launch import submit as submit_module
from btx_megatron.launch.allocation import this_allocation
from btx_megatron.launch.queue import JobState, _from_squeue, job_states
from btx_megatron.launch.sbatch import JobRequest, job_request
from btx_megatron.launch.submit import environment_text, submit
from btx_megatron.launch.tables import status_text
from btx_megatron.pipeline import PipelineStage, stages_of
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_checks import check_recipe
from btx_megatron.recipe_file import parse_recipe
from btx_megatron.recipe_slurm_checks import time_limit_seconds

ROOT = Path(__file__).parents[2]


def recipe_of(slurm: dict[str, Any], **values: Any) -> Recipe:
    domains = [{"name": name, "sources": [{"path": "x"}]} for name in ("a", "b")]
    training = {"train_iters": 10, "lr_warmup_iters": 0, "global_batch_size": 16}
    stages = {"experts": {"a": {"layout": {"data_parallel_size": 16}}}}
    tree = {"name": "n", "data": {"domains": domains}, "training": training, "stages": stages, "slurm": slurm}
    recipe = parse_recipe({"baselines": [], **tree, **values})
    check_recipe(recipe, "here")
    return recipe


def requests(recipe: Recipe) -> dict[str, JobRequest]:
    return {stage.name: job_request(recipe, stage, Path("/logs")) for stage in stages_of(recipe)}


def test_each_stage_asks_for_what_it_needs() -> None:
    slurm = {
        "partition": "h100",
        "account": "us",
        "time": "24:00:00",
        "gpu_type": "h100",
        "options": ["--nice=1"],
        "cpu": {"partition": "cpu", "cpus_per_node": 16, "mem": "64G"},
        "stages": {"expert": {"qos": "big"}, "expert:b": {"time": "1:00:00", "options": ["--comment=b"]}},
    }
    found = requests(recipe_of(slurm))
    a, b, mix = found["expert:a"], found["expert:b"], found["mix"]
    assert (a.nodes, a.ranks_per_node, a.script) == (2, 8, "expert.sbatch")
    assert {"--gres=gpu:h100:8", "--partition=h100", "--qos=big", "--time=24:00:00"} <= set(a.options)
    assert (b.nodes, b.ranks_per_node) == (1, 1)
    assert {"--gres=gpu:h100:1", "--qos=big", "--time=1:00:00", "--nice=1", "--comment=b"} <= set(b.options)
    assert mix.script == "mix.sbatch"
    assert {"--partition=cpu", "--account=us", "--cpus-per-task=16", "--mem=64G"} <= set(mix.options)
    assert not any(option.startswith(("--gres", "--qos")) for option in mix.options)
    assert found["finetune"].script == found["seed"].script == "finetune.sbatch"
    assert "--output=/logs/expert-a.log" in a.options
    assert a.after == ("prepare", "seed")
    for request in found.values():
        assert {"--requeue", "--open-mode=append", "--propagate=NONE"} <= set(request.options)
        resumed = request.script in ("expert.sbatch", "finetune.sbatch", "prepare.sbatch")
        assert ("--signal=B:USR1@300" in request.options) == resumed
        assert (ROOT / "slurm" / request.script).exists()


@pytest.mark.parametrize("task", get_args(Task))
def test_only_what_can_go_on_is_signalled_before_its_time_limit(task: Task) -> None:
    """By the script as by the request: saved at the limit, what cannot save would begin anew for ever."""
    request = job_request(recipe_of({}), PipelineStage("seed", task, ()), Path("/logs"))
    text = (ROOT / "slurm" / request.script).read_text()
    can_go_on = task in ("train", "prepare")
    assert ("#SBATCH --signal" in text) == can_go_on
    assert any(option.startswith("--signal") for option in request.options) == can_go_on


def test_a_job_of_all_gpus_takes_all_of_the_node() -> None:
    """Without a word on cores Slurm would give it one, and eight ranks would share that."""
    found = requests(recipe_of({}))
    assert {"--gres=gpu:8", "--exclusive", "--mem=0"} <= set(found["expert:a"].options)
    assert {"--gres=gpu:1"} <= set(found["expert:b"].options)
    assert "--exclusive" not in found["expert:b"].options + found["mix"].options
    for slurm in ({"cpus_per_node": 96}, {"exclusive": False}):
        assert "--exclusive" not in requests(recipe_of(slurm))["expert:a"].options
    assert "--mem=1T" in requests(recipe_of({"exclusive": True, "mem": "1T"}))["mix"].options


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86_400),
        ("2-12", 216_000),
        ("2-12:30", 217_800),
        ("1-00:00:05", 86_405),
        ("UNLIMITED", None),
        ("soon", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert time_limit_seconds(text) == seconds


def test_without_gpus_none_are_asked_for() -> None:
    found = requests(recipe_of({"gpus_per_node": 4}, launch={"device": "cpu"}))
    assert (found["expert:a"].nodes, found["expert:a"].ranks_per_node) == (4, 4)
    assert not any("gres" in option for request in found.values() for option in request.options)


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"time": "a day"}, "slurm.time 'a day': no time of Slurm's; write it as 24:00:00"),
        ({"time": "5"}, "slurm.time 5 is no longer than slurm.signal_seconds 300"),
        ({"stages": {"expert:a": {"time": "4:59"}}}, "slurm.stages.expert:a.time 4:59 is no longer than"),
        ({"cpu": {"time": "4:59"}}, "slurm.cpu.time 4:59 is no longer than slurm.signal_seconds 300"),
        ({"signal_seconds": 65536}, "slurm.signal_seconds 65536: Slurm takes 65535 at most"),
        ({"cpu": {"cpus_per_node": 0}}, "slurm.cpu.cpus_per_node 0: must be at least 1"),
        ({"stages": {"expert:c": {}}}, "slurm.stages.expert:c: no such stage; the recipe has prepare, seed"),
        ({"options": ["nice"]}, "an option of sbatch begins with '-'"),
        ({"options": ["--output=x"]}, "btx submit sets --output itself"),
        ({"environment": {"A B": "1"}}, "slurm.environment.A B: no name of a variable"),
        ({"container_mounts": ["/x:/x"]}, "slurm.container_mounts: there is no container"),
    ],
)
def test_refusals(slurm: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_of(slurm)
    assert message in str(error.value)


def test_stages_that_are_not_signalled_may_be_short() -> None:
    recipe_of({"stages": {"mix": {"time": "5"}, "evaluate": {"time": "4:00"}}})
    recipe_of({"cpu": {"time": "5"}, "stages": {"prepare": {"time": "10"}}})
    short, seed = {"time": "5"}, {"pretrained_checkpoint": "x"}
    tokenizer, mix, stages = {"tokenizer_model": "x"}, {"include_seed": False}, {"seed": seed}
    recipe_of(
        {"stages": {"seed": short, "cluster": short}},
        method="cbtm",
        mix=mix,
        stages=stages,
        tokenizer=tokenizer,
    )
    stages = {"experts": {"a": seed}}
    slurm = {"stages": {"expert:a": short, "upcycle": short}}
    recipe_of(slurm, baselines=["sparse_upcycling_dm"], stages=stages, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"slurm.stages.expert.time 5 is no longer than"):  # b is trained
        recipe_of({"stages": {"expert": short}}, stages=stages, tokenizer=tokenizer)


def test_ranks_that_fill_no_nodes() -> None:
    with pytest.raises(
        UserError, match=r"stage expert:a: 16 ranks do not fill nodes of slurm.gpus_per_node 6"
    ):
        requests(recipe_of({"gpus_per_node": 6}))


def test_environment_is_what_the_shell_reads(tmp_path: Path) -> None:
    slurm = {"setup": ["export FIRST=1"], "environment": {"B": "it's $HOME"}, "max_restarts": 3}
    (tmp_path / "environment.sh").write_text(environment_text(recipe_of(slurm), tmp_path / "code"))
    line = f'source {tmp_path}/environment.sh; echo "$FIRST|$B|$BTX_MAX_RESTARTS|$PYTHONPATH"'
    told = subprocess.run(
        ["bash", "-uc", line], env={"PYTHONPATH": "there"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == f"1|it's $HOME|3|{tmp_path}/code:there"


def test_a_dry_run_leaves_scripts_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of({}, run_folder=str(tmp_path / "run"))
    lines = submit(recipe, dry_run=True)
    scripts = tmp_path / "run" / "slurm" / "scripts"
    assert lines[2] == "expert:a: expert.sbatch on 2 nodes x 8, after prepare, seed"
    told = (scripts / "submit.sh").read_text()
    dependency = "--dependency=afterok:$prepare:$seed --kill-on-invalid-dep=yes"
    assert f"expert_a=$(sbatch --parsable {dependency}" in told
    for script in (*scripts.glob("*.sh"), *scripts.glob("*.sbatch")):
        subprocess.run(["/bin/bash", "-n", str(script)], check=True)
    frozen = tmp_path / "run" / "slurm" / "code" / "btx_megatron"
    ask = f"source {scripts}/environment.sh; $BTX_PYTHON -c 'import btx_megatron as b; print(b.__file__)'"
    found = subprocess.run(["/bin/bash", "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(frozen / "__init__.py")  # and not the checkout's
    assert not (tmp_path / "run" / "slurm" / "jobs.json").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch: not found; run this where Slurm is"):
        submit(recipe)
    with pytest.raises(UserError, match="--only expert:c: no such stage"):
        submit(recipe, only=["expert:c"], dry_run=True)
    with pytest.raises(UserError, match="stage expert:a needs prepare, which is neither finished nor queued"):
        submit(recipe, only=["expert:a"])


class FakeSlurm:
    """Gives jobs numbers, and remembers what is sent and cancelled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: dict[int, str] = {}
        self.sent: dict[str, int] = {}
        self.cancelled: list[int] = []
        monkeypatch.setattr(submit_module, "run_slurm", self.run)
        monkeypatch.setattr(submit_module, "job_states", self.look)
        monkeypatch.setattr(queue_module, "job_states", self.look)

    def run(self, arguments: list[str]) -> str:
        if arguments[0] == "scancel":
            self.cancelled.append(int(arguments[-1]))
            self.states[int(arguments[-1])] = "CANCELLED"
            return ""
        number = len(self.states) + 1
        self.states[number], self.sent[arguments[-1]] = "PENDING", number
        return f"{number}\n"

    def look(self, ids: Any) -> dict[int, JobState]:
        return {number: JobState(state) for number, state in self.states.items() if number in ids}


def test_jobs_of_stages_that_are_gone_are_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that waited for them are sent again: they would wait for ever, or be cancelled by Slurm."""
    slurm, folder = FakeSlurm(monkeypatch), str(tmp_path / "run")
    submit(recipe_of({}, run_folder=folder, baselines=["dense"]))
    first = dict(slurm.sent)
    assert submit(recipe_of({}, run_folder=folder, baselines=["dense"]))[0] == "prepare: job 1 is pending"
    slurm.sent.clear()
    lines = submit(recipe_of({}, run_folder=folder))
    assert f"dense: job {first['dense']} is cancelled, the recipe has no such stage now" in lines
    assert set(slurm.sent) == {"evaluate", "report"}
    assert set(slurm.cancelled) == {first["dense"], first["evaluate"], first["report"]}
    assert submit(recipe_of({}, run_folder=folder))[0] == "prepare: job 1 is pending"


def test_what_jobs_read_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm, folder = FakeSlurm(monkeypatch), tmp_path / "run"
    submit(recipe_of({}, run_folder=str(folder)))
    before = (folder / "recipe.yaml").read_text()
    other = recipe_of({}, run_folder=str(folder), launch={"threads_per_rank": 3})
    with pytest.raises(UserError, match=r"--dry-run: .*run has jobs \(prepare, seed, "):
        submit(other, dry_run=True)
    slurm.states[1] = "RUNNING"
    with pytest.raises(UserError, match="--update-code: prepare is running by the old code; wait for it"):
        submit(other, update_code=True)
    assert (folder / "recipe.yaml").read_text() == before
    for number in slurm.states:
        slurm.states[number] = "CANCELLED"
    assert "nothing was sent" in submit(other, dry_run=True, update_code=True)[-1]


def test_status_without_slurm_tells_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, path = recipe_of({}, run_folder=str(tmp_path / "run")), os.environ["PATH"]
    with monkeypatch.context() as faked:
        FakeSlurm(faked)
        submit(recipe)
        assert "1 PENDING" in status_text(recipe)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = status_text(recipe)
    monkeypatch.setenv("PATH", path)
    (line,) = [line for line in told.splitlines() if line.startswith("prepare")]
    assert line.split()[:4] == ["prepare", "missing", "-", "1"]
    assert "how the jobs stand is not known: squeue: not found" in told


@pytest.mark.parametrize(
    "job",
    [
        {"job_state": "PENDING", "state_reason": "Dependency", "restart_cnt": 2, "nodes": "", "job_id": 7},
        {
            "job_state": ["PENDING", "REQUEUED"],
            "state_reason": "Dependency",
            "restart_cnt": {"set": True, "infinite": False, "number": 2},
            "nodes": "",
            "job_id": {"set": True, "infinite": False, "number": 7},
        },
    ],
)
def test_squeue_of_old_and_new_versions(job: dict[str, Any]) -> None:
    assert _from_squeue({"jobs": [job]}) == [(7, JobState("PENDING", "Dependency", 2, ""))]
    assert JobState("PENDING").alive
    assert not JobState("CANCELLED").alive


def test_jobs_that_squeue_has_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sacct is asked where there is one; where there is none, nothing is known of them."""
    programs = {"squeue": "echo '{\"jobs\": []}'", "sacct": "printf '7|COMPLETED|n1\\n8|CANCELLED by 0|\\n'"}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert job_states([7, 8]) == {7: JobState("COMPLETED", nodes="n1"), 8: JobState("CANCELLED")}
    (tmp_path / "sacct").write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2; exit 1\n")
    assert job_states([7, 8]) == {}


def test_ranks_of_a_job_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task a node, a torchrun in it; the first node's address and a port of the job's own."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho NodeName=$4 Arch=x NodeAddr=10.0.0.7 Version=22\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    recipe = recipe_of({"container_image": "/i.sqsh", "container_mounts": ["/a:/a", "/b:/b"]})
    monkeypatch.delenv("BTX_SLURM_JOB", raising=False)
    assert this_allocation(recipe) is None
    told = {"JOB_NUM_NODES": "2", "JOB_ID": "31234", "CPUS_ON_NODE": "96"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setenv("BTX_SLURM_JOB", "1")
    monkeypatch.setenv("BTX_PYTHON", "/env of/python")
    allocation = this_allocation(recipe)
    assert allocation is not None
    assert (allocation.cores, allocation.environment(())) == (192, {})
    stages = {stage.name: stage for stage in stages_of(recipe)}
    *srun, line = allocation.command(stages["expert:a"], Path("/run/job.json"))
    assert srun[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert {"--overlap", "--immediate=1800"} <= set(srun)
    assert {"--cpus-per-task=96", "--container-image=/i.sqsh", "--container-mounts=/a:/a,/b:/b"} <= set(srun)
    assert "exec '/env of/python' -m torch.distributed.run --nnodes=2 --node-rank=$SLURM_NODEID" in line
    assert "--nproc-per-node=8 --master-addr=10.0.0.7 --master-port=21234 " in line
    *srun, line = allocation.command(stages["mix"], Path("/run/job.json"))
    assert "--nodes=1" in srun
    assert line.endswith("exec '/env of/python' -m btx_megatron.launch.worker /run/job.json")
