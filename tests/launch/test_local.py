"""The pipeline on one machine: order, resume, failures, signals, and no process left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from drive import main

from btx_megatron.errors import UserError
from btx_megatron.launch.local import run_stages
from btx_megatron.launch.machine import Machine
from btx_megatron.launch.tables import status_text
from btx_megatron.pipeline import PipelineStage, stages_of
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import load_recipe
from btx_megatron.run_folder import RunFolder, stage_folder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


EXPERTS = ("expert:a", "expert:b")


def write_recipe(folder: Path) -> Path:
    source = {"name": "s", "path": str(ROOT)}
    recipe = {
        "run_folder": str(folder / "run"),
        "data": {"domains": [{"name": name, "sources": [source]} for name in ("a", "b")]},
        "training": {"train_iters": 2, "lr_warmup_iters": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe of two domains, nothing run yet."""
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeded")
    recipe = write_recipe(folder)
    for stage in ("prepare", "seed"):
        assert drive(recipe, {}, stage)[0] == 0
    return folder


@pytest.fixture
def branching(seeded: Path, tmp_path: Path) -> Path:
    """The same recipe; the seed is trained, the experts come next."""
    shutil.copytree(seeded / "run", tmp_path / "run")
    return write_recipe(tmp_path)


def start(recipe_file: Path, fake: dict[str, Any] | None = None, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"FAKE": json.dumps(fake or {}), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HERE / "drive.py"), str(recipe_file), *options]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def drive(recipe_file: Path, fake: dict[str, Any] | None = None, *options: str) -> tuple[int, str, str]:
    """Exit code, output and errors; in this process, which is quicker than start."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("FAKE", json.dumps(fake or {}))
        code = main([str(recipe_file), *options])
    return code, out.getvalue(), err.getvalue()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def run_of(recipe_file: Path) -> tuple[Recipe, RunFolder]:
    recipe = load_recipe(recipe_file)
    return recipe, RunFolder(recipe.run_folder)


def steps(work: Path) -> int:
    try:
        return int((work / "checkpoints" / "step").read_text() or 0)
    except FileNotFoundError:
        return 0


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_whole_pipeline_then_nothing_to_do(recipe_file: Path) -> None:
    code, out, err = drive(recipe_file)
    assert (code, err) == (0, "")
    recipe, run = run_of(recipe_file)
    manifests = {stage.name: run.manifest(stage.name) for stage in stages_of(recipe)}
    for stage in stages_of(recipe):
        manifest = manifests[stage.name]
        assert manifest is not None, stage.name
        assert manifest.inputs == {name: manifests[name].fingerprint for name in stage.inputs}  # type: ignore[union-attr]
        assert f"{stage.name}: done" in out
    assert manifests["seed"].tokens == 2  # type: ignore[union-attr]
    assert not list((run.path / ".work").rglob("*.json"))
    assert sorted(os.listdir(run.published("seed"))) == [
        "attempts.txt", "checkpoints", "ended", "log.txt", "manifest.json", "pids-0.json", "result.json"
    ]  # fmt: skip
    code, out, err = drive(recipe_file)
    assert code == 0
    assert "nothing to do" in out
    assert "started" not in out
    assert "no longer there" not in out
    shutil.rmtree(run.published("finetune"))
    code, out, err = drive(recipe_file)
    assert code == 0
    assert "no longer there: finetune; to make them again, delete what was made from them, too" in out


def expert_spans(run: RunFolder) -> list[tuple[float, float]]:
    """When each expert began and ended."""
    spans = []
    for name in EXPERTS:
        folder = run.published(name)
        begun = (folder / "attempts.txt").read_text().split()[1]
        spans.append((float(begun), float((folder / "ended").read_text())))
    return spans


def test_experts_run_side_by_side(branching: Path) -> None:
    code, _, err = drive(branching, {name: {"steps": 60} for name in EXPERTS}, *EXPERTS)
    assert code == 0, err
    (begun_a, ended_a), (begun_b, ended_b) = expert_spans(run_of(branching)[1])
    assert max(begun_a, begun_b) < min(ended_a, ended_b)


def test_max_parallel_experts_is_kept(branching: Path) -> None:
    branching.write_text(branching.read_text() + "launch: {max_parallel_experts: 1}\n")
    assert drive(branching, {"expert:a": {"steps": 10}}, *EXPERTS)[0] == 0
    (_, ended_a), (begun_b, _) = expert_spans(run_of(branching)[1])
    assert begun_b > ended_a


def test_a_failing_expert_leaves_the_others_alone(branching: Path) -> None:
    code, _, err = drive(branching, {"expert:a": {"crash": "no such luck"}, "expert:b": {"steps": 30}})
    recipe, run = run_of(branching)
    log = run.work("expert:a") / "log.txt"
    assert code == 1
    assert err == f"btx: stage expert:a failed: RuntimeError: no such luck; log: {log}\n"
    assert "Traceback" in log.read_text()
    assert run.manifest("expert:b")
    assert run.manifest("dense")
    assert run.manifest("mix") is None
    status = {line.split()[0]: line for line in status_text(recipe).splitlines()[3:]}
    assert "failed" in status["expert:a"]
    assert "no such luck" in status["expert:a"]
    assert "done" in status["expert:b"]
    assert "missing" in status["mix"]
    code, out, _ = drive(branching, {}, *EXPERTS)  # mended: the failed one alone runs again
    assert code == 0
    assert out.count("started") == 1
    assert run.manifest("expert:a")


def test_a_killed_worker_is_named(branching: Path) -> None:
    code, _, err = drive(branching, {"expert:a": {"kill": True}}, "expert:a")
    assert code == 1
    assert "stage expert:a failed: ended without a word (killed by signal 9)" in err


def test_a_users_mistake_in_a_stage_is_one_line_and_exit_2(recipe_file: Path) -> None:
    code, _, err = drive(recipe_file, {"prepare": {"mistake": "data.x: no file; give one"}})
    assert (code, err) == (2, "btx: data.x: no file; give one\n")
    _, run = run_of(recipe_file)
    assert run.manifest("prepare") is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_stops_after_saving_and_the_same_command_goes_on(
    branching: Path, number: signal.Signals
) -> None:
    process = start(branching, {name: {"steps": 10_000} for name in EXPERTS})
    recipe, run = run_of(branching)
    work = [run.work(name) for name in EXPERTS]
    wait_for(lambda: all(steps(folder) > 3 for folder in work))
    assert "running" in status_text(recipe)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err == f"btx: stopped by {number.name}; the same command goes on where it was\n"
    assert out.count("stopped after") == 2
    assert "unfinished" in status_text(recipe)
    reached = [steps(folder) for folder in work]
    spent = [json.loads((folder / "duration.json").read_text()) for folder in work]
    goal = {name: {"steps": max(reached) + 5} for name in EXPERTS}
    assert drive(branching, goal, *EXPERTS)[0] == 0  # the old stop request is gone
    for name, before, seconds in zip(EXPERTS, reached, spent, strict=True):
        attempts = (run.published(name) / "attempts.txt").read_text().splitlines()
        assert [int(line.split()[0]) for line in attempts] == [0, before]
        manifest = run.manifest(name)
        assert manifest is not None
        assert manifest.duration_seconds > seconds > 0


def test_a_second_ctrl_c_kills_at_once(branching: Path) -> None:
    process = start(branching, {"expert:a": {"steps": 10_000, "deaf": True}}, "expert:a")
    _, run = run_of(branching)
    work = run.work("expert:a")
    pids = wait_for(lambda: pids_of(work))
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (work / "stop").exists())
    assert process.poll() is None
    assert all(map(alive, pids))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "from the last checkpoint" in err
    assert not any(map(alive, pids))


def test_a_stage_that_cannot_save_is_killed_and_starts_over(recipe_file: Path) -> None:
    """Mixing; training and preparing data go on where they were."""
    process = start(recipe_file, {"mix": {"seconds": 60}})
    _, run = run_of(recipe_file)
    pids = wait_for(lambda: pids_of(run.work("mix")))
    (run.work("mix") / "half.bin").write_text("half a file")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert not any(map(alive, pids))
    assert drive(recipe_file, {}, "mix")[0] == 0
    assert not (run.published("mix") / "half.bin").exists()


def pids_of(work: Path) -> list[int]:
    return [pid for path in work.glob("pids-*.json") for pid in json.loads(path.read_text())]


def test_sigkill_leaves_no_orphan_and_the_next_run_goes_on(branching: Path) -> None:
    """Through the real torchrun: two ranks, each with a spawned and a forked child."""
    for file in (branching, branching.parent / "run" / "recipe.yaml"):
        recipe = yaml.safe_load(file.read_text())
        expert = recipe.setdefault("stages", {}).setdefault("experts", {}).setdefault("a", {})
        expert.setdefault("layout", {})["data_parallel_size"] = 2
        file.write_text(yaml.safe_dump(recipe))
    process = start(branching, {"expert:a": {"steps": 100_000, "children": True}}, "torchrun", "expert:a")
    _, run = run_of(branching)
    work = run.work("expert:a")
    pids = wait_for(lambda: len(pids_of(work)) == 6 and steps(work) > 3 and pids_of(work))
    torchrun = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
    assert all(map(alive, [*pids, torchrun]))
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, [*pids, torchrun])))
    reached = steps(work)
    assert drive(branching, {"expert:a": {"steps": reached + 1}}, "expert:a")[0] == 0
    attempts = (run.published("expert:a") / "attempts.txt").read_text().splitlines()
    assert [int(line.split()[0]) for line in attempts] == [0, reached]


def test_two_btx_share_a_run_but_not_a_stage(branching: Path) -> None:
    process = start(branching, {"expert:a": {"steps": 10_000}}, "expert:a")
    _, run = run_of(branching)
    wait_for(lambda: pids_of(run.work("expert:a")))
    code, _, err = drive(branching, {}, "expert:a")
    assert code == 2
    assert err.startswith(f"btx: {run.path}, expert:a: another btx works on it")
    assert drive(branching, {}, "expert:b")[0] == 0  # the other expert, in the same run
    assert run.manifest("expert:b")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_a_stage_that_another_btx_finished_meanwhile_is_not_repeated(branching: Path) -> None:
    branching.write_text(branching.read_text() + "launch: {max_parallel_experts: 1}\n")
    process = start(branching, {"expert:a": {"steps": 10_000}})  # expert:b waits for its turn
    _, run = run_of(branching)
    work = run.work("expert:a")
    wait_for(lambda: steps(work) > 3)
    assert drive(branching, {}, "expert:b")[0] == 0
    made = run.manifest("expert:b")
    (work / "enough").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "expert:b: finished by another btx" in out
    assert run.manifest("expert:b") == made
    assert run.manifest("report")


def test_an_unfinished_stage_goes_on_under_another_layout(branching: Path) -> None:
    assert drive(branching, {"expert:a": {"steps": 3, "crash_after": True}}, "expert:a")[0] == 1
    branching.write_text(branching.read_text() + "layout: {pipeline_model_parallel_size: 2}\n")
    assert drive(branching, {"expert:a": {"steps": 5}}, "expert:a")[0] == 0
    _, run = run_of(branching)
    attempts = (run.published("expert:a") / "attempts.txt").read_text().splitlines()
    assert [int(line.split()[0]) for line in attempts] == [0, 3]
    manifest = run.manifest("expert:a")
    assert manifest is not None
    layouts = manifest.recipe["stages"]["experts"]
    assert layouts["a"]["layout"]["pipeline_model_parallel_size"] == 2


def test_a_stage_made_from_something_else_is_refused(branching: Path) -> None:
    assert drive(branching, {}, *EXPERTS)[0] == 0
    _, run = run_of(branching)
    path = run.published("seed") / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"outputs": {"made": "another seed"}, "fingerprint": ""}))
    code, _, err = drive(branching)
    assert code == 2
    assert f"{run.path / 'experts' / 'a'} was made from another seed" in err
    path.unlink()
    code, _, err = drive(branching)
    assert code == 2
    assert "is missing and would be made anew" in err


def test_an_unfinished_stage_of_another_input_is_refused(branching: Path) -> None:
    assert drive(branching, {"expert:a": {"crash": "x"}}, "expert:a")[0] == 1
    _, run = run_of(branching)
    job = run.work("expert:a") / "job.json"
    content = json.loads(job.read_text())
    content["inputs"]["seed"] = "0" * 64
    job.write_text(json.dumps(content))
    code, _, err = drive(branching, {}, "expert:a")
    assert code == 2
    assert f"{run.work('expert:a')} was begun from another prepare, seed" in err


def test_stage_folders() -> None:
    assert stage_folder("expert:math") == Path("experts/math")
    assert stage_folder("prepare") == Path("data")
    assert stage_folder("finetune") == Path("finetune")


def test_missing_input_names_the_command(recipe_file: Path) -> None:
    from btx_megatron.launch.local import run_stages

    with pytest.raises(UserError, match=r"stage expert:a needs the stage prepare, .* `btx prepare RECIPE`"):
        run_stages(load_recipe(recipe_file), ["expert:a"])


def test_torchrun_takes_its_port_itself(recipe_file: Path) -> None:
    """A port that was free a moment ago may be another expert's when torchrun binds it."""
    two_ranks = ["stages.seed.layout.data_parallel_size=2"]
    (stage,) = [stage for stage in stages_of(load_recipe(recipe_file, two_ranks)) if stage.name == "seed"]
    command = Machine(cores=2).command(stage, Path("job.json"))
    assert "--standalone" in command
    assert not [word for word in command if "port" in word]


def test_a_rank_that_is_alone_needs_no_torchrun(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it take itself for a rank of what btx was started in."""
    (stage,) = [stage for stage in stages_of(load_recipe(recipe_file)) if stage.name == "seed"]
    command = Machine(cores=2).command(stage, Path("job.json"))
    assert command[1:] == ["-m", "btx_megatron.launch.worker", "job.json"]
    for name, value in {"RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert drive(recipe_file, {}, "prepare")[0] == 0
    assert drive(recipe_file, {}, "seed")[0] == 0  # the fake ranks but the first would wait
    assert (run_of(recipe_file)[1].path / "seed" / "pids-0.json").exists()


def test_a_stage_that_another_has_just_finished_is_not_done_again(recipe_file: Path) -> None:
    from fake_worker import FakeMachine

    manifests = []

    class Overtaken(FakeMachine):
        def check_packages(self, recipe: Recipe, stages: list[PipelineStage]) -> None:
            assert drive(recipe_file, {}, "prepare")[0] == 0
            manifests.append(RunFolder(recipe.run_folder).manifest("prepare"))

    recipe = load_recipe(recipe_file)
    run_stages(recipe, ["prepare"], machine=Overtaken(cores=2))
    assert RunFolder(recipe.run_folder).manifest("prepare") == manifests[0]
