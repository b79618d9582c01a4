"""The run folder: who may work in it, what is published and when, and what a manifest says."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.errors import UserError
from btx_megatron.manifest import Manifest, fingerprint, make_manifest, read_manifest
from btx_megatron.pipeline import command_of, input_fingerprints, stages_of, stages_to_run
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import parse_recipe, recipe_to_dict
from btx_megatron.recipe_tasks import TaskFile
from btx_megatron.run_folder import RunFolder, first_difference, stage_folder

ROOT = Path(__file__).parents[1]
RECIPE = parse_recipe(
    {
        "data": {"domains": [{"name": n, "sources": [{"name": "s", "path": "x"}]} for n in ("a", "b")]},
        "training": {"train_iters": 1},
    }
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def other_recipe(**changes: object) -> Recipe:
    """The recipe with ``a__b=value`` changed."""
    recipe = copy.deepcopy(RECIPE)
    for key, value in changes.items():
        *path, last = key.split("__")
        target = recipe
        for name in path:
            target = getattr(target, name)
        setattr(target, last, value)
    return recipe


def publish(run: RunFolder, stage: str, inputs: dict[str, str] | None = None, made: str = "x") -> Manifest:
    run.work(stage).mkdir(parents=True)
    (run.work(stage) / "weights").write_text(made)
    manifest = make_manifest(stage, recipe_to_dict(RECIPE), inputs or {}, {"made": made}, None, 1.5)
    run.publish(manifest)
    return manifest


# who may work in it


def test_the_recipe_is_written_first_and_reads_back(run: RunFolder) -> None:
    run.claim(RECIPE)
    assert sorted(os.listdir(run.path)) == [".locks", "recipe.yaml"]
    read = run.recipe()
    assert read.run_folder == str(run.path)
    assert first_difference(recipe_to_dict(read), recipe_to_dict(RECIPE)) is None


def test_a_corrected_recipe_may_take_a_folder_that_holds_no_result(run: RunFolder) -> None:
    run.claim(RECIPE)
    run.claim(other_recipe(model__num_layers=8))
    assert run.recipe().model.num_layers == 8


def test_another_recipe_is_refused_while_somebody_works_by_the_first(run: RunFolder) -> None:
    """From its start on: also before the first stage is begun, and while another works by the same recipe."""
    with run.claim(RECIPE), run.claim(RECIPE):
        with pytest.raises(UserError, match=r"another recipe: model\.num_layers"):
            run.claim(other_recipe(model__num_layers=8))
        assert run.recipe().model.num_layers == RECIPE.model.num_layers
    run.claim(other_recipe(model__num_layers=8)).close()


def test_whoever_is_killed_leaves_the_folder_free(run: RunFolder) -> None:
    program = (
        "import pickle, sys, time; from btx_megatron.run_folder import RunFolder\n"
        "used = RunFolder(sys.argv[1]).claim(pickle.load(sys.stdin.buffer)); print('in use', flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(pickle.dumps(RECIPE))
        other.stdin.close()
        assert other.stdout.readline() == b"in use\n"
        with pytest.raises(UserError, match="was made by another recipe"):
            run.claim(other_recipe(model__num_layers=8))
        other.kill()
    run.claim(other_recipe(model__num_layers=8)).close()


@pytest.mark.parametrize("result", ["data/manifest.json", ".work/seed/checkpoints/iter_0000010"])
def test_another_recipe_is_refused_by_its_first_differing_key(run: RunFolder, result: str) -> None:
    run.claim(RECIPE)
    (run.path / result).parent.mkdir(parents=True)
    (run.path / result).touch()
    other = other_recipe(model__num_layers=8, stages__seed__training__lr=1.0)
    with pytest.raises(UserError) as caught:
        run.claim(other)
    assert str(caught.value) == (
        f"{run.path} was made by another recipe: model.num_layers is 4 there and 8 here; "
        "set it back, or give another run_folder"
    )


def test_what_does_not_change_results_may_differ(run: RunFolder) -> None:
    run.claim(RECIPE)
    publish(run, "prepare")
    other = other_recipe(
        run_folder="elsewhere",
        launch__max_parallel_experts=1,
        launch__threads_per_rank=3,
        data__num_workers=4,
        training__log_interval=1,
        stages__seed__training__save_interval=5,
        stages__finetune__training__save_total_limit=5,
        training__save_retain_interval=10,
        training__async_save=False,
        training__max_consecutive_skipped_steps=3,
        training__loss_spike_factor=4.0,
        training__distributed_timeout_minutes=1.0,
        layout__sequence_parallel=True,
        stages__seed__layout__data_parallel_size=2,
        evaluate__layout__pipeline_model_parallel_size=2,
    )
    run.claim(other)
    assert run.recipe().stages.seed.layout.data_parallel_size == 2  # the run says how it goes on


def test_tasks_may_differ_until_they_were_asked(run: RunFolder) -> None:
    run.claim(RECIPE)
    publish(run, "prepare")
    asks = other_recipe(evaluate__tasks=[TaskFile("a", "nq", "a.jsonl")], evaluate__execute_code=True)
    with run.lock("evaluate"), pytest.raises(UserError, match=r"another recipe: evaluate\.tasks"):
        run.claim(asks)
    run.claim(asks)
    assert run.recipe().evaluate.tasks[0].name == "a"
    publish(run, "evaluate")
    with pytest.raises(UserError, match=r"another recipe: evaluate\.tasks"):
        run.claim(RECIPE)


def test_the_export_may_differ_until_it_was_made(run: RunFolder) -> None:
    run.claim(RECIPE)
    publish(run, "finetune")
    run.claim(other_recipe(export__to="hf"))
    publish(run, "export")
    other = other_recipe(export__to="megatron-legacy")
    message = "export was made with {'to': 'hf', .*}, the recipe says {'to': 'megatron-legacy', .*}; set it"
    with pytest.raises(UserError, match=message):
        run.claim(other)
    shutil.rmtree(run.published("export"))
    run.claim(other)
    assert run.recipe().export.to == "megatron-legacy"


@pytest.mark.parametrize("name", ["layout", "training", "export", "log_interval"])
def test_what_a_domain_is_called_frees_no_key(name: str) -> None:
    def recipe(lr: float, weight: float, ranks: int) -> dict[str, Any]:
        training = {"training": {"lr": lr, "log_interval": ranks}, "layout": {"data_parallel_size": ranks}}
        return {"stages": {"experts": {name: training}, "finetune": {"blend": {name: weight}}}}

    assert first_difference(recipe(1.0, 1.0, 1), recipe(1.0, 1.0, 2)) is None
    assert first_difference(recipe(1.0, 1.0, 1), recipe(2.0, 1.0, 1)) is not None
    assert first_difference(recipe(1.0, 1.0, 1), recipe(1.0, 2.0, 1)) is not None


def test_added_and_removed_list_items_are_differences() -> None:
    shorter = copy.deepcopy(RECIPE)
    shorter.data.domains.pop()
    old, new = recipe_to_dict(RECIPE), recipe_to_dict(shorter)
    assert first_difference(old, new) == ("data.domains[1].name", "b", "absent")
    assert first_difference(new, old) == ("data.domains[1].name", "absent", "b")


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("xyz"), values), st.dictionaries(st.sampled_from("xyz"), values))
def test_a_difference_is_found_if_and_only_if_there_is_one(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert (first_difference(old, new) is None) == (old == new)


def test_a_folder_of_other_things_is_left_alone(run: RunFolder) -> None:
    run.path.mkdir()
    (run.path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"is not empty \(thesis.tex\) and no run of btx"):
        run.claim(RECIPE)
    assert os.listdir(run.path) == ["thesis.tex"]


def test_a_btx_that_begins_there_is_no_stranger(run: RunFolder) -> None:
    """Nor what one left that was killed at that moment."""
    run.path.mkdir()
    (run.path / ".recipe.yaml.tmp").touch()
    run.claim(RECIPE)
    assert run.recipe().name == RECIPE.name


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory; give a run_folder"):
        RunFolder(tmp_path / "file" / "run").claim(RECIPE)


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder, it has no recipe.yaml"):
        RunFolder(tmp_path).recipe()
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match="broken"):
        RunFolder(tmp_path).recipe()


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "text"])
def test_a_recipe_in_the_run_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml: broken; give another run_folder"):
        RunFolder(tmp_path).recipe()


def test_a_stages_lock_is_one_processes_and_ends_with_it(run: RunFolder) -> None:
    run.claim(RECIPE)
    with run.lock("seed"), run.lock("expert:a"):
        assert run.is_locked("seed")
        with pytest.raises(UserError, match="run, seed: another btx works on it"):
            RunFolder(run.path).lock("seed")
        assert not run.is_locked("expert:b")
    assert not run.is_locked("seed")
    code = "import fcntl, os, sys; file = open(sys.argv[1], 'a'); "
    code += "fcntl.flock(file, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(run.path / ".locks" / "seed")], check=False)
    run.lock("seed").close()


def test_a_file_system_without_locks_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, kind: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"has no file locks \(Operation not supported\); mount it with them"):
        run.claim(RECIPE)


# what is published


def test_publish_moves_the_whole_folder_at_once(run: RunFolder) -> None:
    manifest = publish(run, "expert:a")
    assert run.published("expert:a") == run.path / "experts" / "a"
    assert sorted(os.listdir(run.published("expert:a"))) == ["manifest.json", "weights"]
    assert not run.work("expert:a").exists()
    assert run.manifest("expert:a") == manifest
    assert run.manifest("expert:b") is None


def test_publish_replaces_an_older_result(run: RunFolder) -> None:
    publish(run, "report", made="old")
    publish(run, "report", made="new")
    assert (run.published("report") / "weights").read_text() == "new"
    assert not list(run.path.rglob("*replaced*"))


def test_a_folder_without_manifest_is_not_finished(run: RunFolder) -> None:
    run.published("seed").mkdir(parents=True)
    assert run.manifest("seed") is None


def test_manifest_fields(run: RunFolder) -> None:
    manifest = publish(run, "seed", {"prepare": "f" * 64})
    content = json.loads((run.published("seed") / "manifest.json").read_text())
    assert content == asdict(manifest)
    assert content["recipe"] == recipe_to_dict(RECIPE)
    assert content["duration_seconds"] == 1.5
    assert content["created"].endswith("+00:00")
    assert {"python", "btx_megatron"} <= set(content["versions"])
    assert content["fingerprint"] == fingerprint("seed", {"prepare": "f" * 64}, {"made": "x"})


def test_code_commit_is_this_checkouts() -> None:
    commit = make_manifest("seed", {}, {}, {}, None, 0).code_commit
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert (commit or "").removesuffix("-dirty") == head


def test_the_fingerprint_names_stage_inputs_and_outputs_whatever_their_order() -> None:
    first = fingerprint("s", {"a": "1", "b": "2"}, {"x": 1, "y": 2})
    assert first == fingerprint("s", {"b": "2", "a": "1"}, {"y": 2, "x": 1})
    others = [
        fingerprint("t", {"a": "1", "b": "2"}, {"x": 1, "y": 2}),
        fingerprint("s", {}, {"x": 1, "y": 2}),
    ]
    assert len({first, *others, fingerprint("s", {"a": "1", "b": "2"}, {"x": 1})}) == 4


@pytest.mark.parametrize("text", ["", "{}", "[1]", "nonsense"])
def test_a_broken_manifest_is_named(run: RunFolder, text: str) -> None:
    publish(run, "seed")
    (run.published("seed") / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest.json: not a manifest; restore it, or delete"):
        run.manifest("seed")


def test_a_manifest_changed_by_hand_is_refused(run: RunFolder) -> None:
    publish(run, "seed")
    path = run.published("seed") / "manifest.json"
    path.write_text(path.read_text().replace('"made": "x"', '"made": "y"'))
    with pytest.raises(UserError, match="its fingerprint does not match its content"):
        read_manifest(run.published("seed"))


# what is left to do


def test_the_graph_is_the_papers_figure() -> None:
    stages = {stage.name: stage for stage in stages_of(RECIPE)}
    assert list(stages) == [
        "prepare", "seed", "expert:a", "expert:b", "mix", "average", "finetune", "dense", "evaluate", "report"
    ]  # fmt: skip
    assert stages["expert:b"].inputs == ("prepare", "seed")
    assert stages["mix"].inputs == stages["average"].inputs == ("expert:a", "expert:b", "seed")
    assert stages["finetune"].inputs == ("prepare", "mix")
    seen: set[str] = set()
    for stage in stages.values():
        assert set(stage.inputs) <= seen
        seen.add(stage.name)
    without_seed = {s.name: s for s in stages_of(other_recipe(mix__include_seed=False, baselines=[]))}
    assert without_seed["mix"].inputs == ("expert:a", "expert:b")
    assert "dense" not in without_seed


def test_what_to_run_is_what_the_target_still_needs(run: RunFolder) -> None:
    stages = stages_of(RECIPE)
    assert stages_to_run(stages, run, {"report"}) == stages
    assert [s.name for s in stages_to_run(stages, run, {"expert:b"})] == ["prepare", "seed", "expert:b"]
    for stage in stages[:3]:
        publish(run, stage.name, input_fingerprints(stage, run))
    assert [s.name for s in stages_to_run(stages, run, {"mix"})] == ["expert:b", "mix"]
    for stage in stages[3:]:
        publish(run, stage.name, input_fingerprints(stage, run))
    assert stages_to_run(stages, run, {"report"}) == []


def test_stage_names_folders_and_commands() -> None:
    assert stage_folder("prepare") == Path("data")
    assert stage_folder("expert:math") == Path("experts/math")
    commands = {stage.name: command_of(stage.name) for stage in stages_of(RECIPE)}
    assert commands["expert:a"] == "train RECIPE --domain a"
    assert commands["average"] == "mix RECIPE"
    assert commands["finetune"] == "finetune RECIPE"
