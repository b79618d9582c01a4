"""A whole comparison on the real engine: equal stages shared, no key that leaves out what is read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes import write_recipe

from btx_megatron.comparison.run import run_comparison
from btx_megatron.comparison.variants import expand
from btx_megatron.launch.local import run_pipeline
from btx_megatron.launch.machine import Machine, this_machine
from btx_megatron.pipeline import PipelineStage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

VARIANTS = {
    "btx": ["baselines=[dense,sparse_upcycling_dm]"],
    "unbalanced": ["moe.moe_router_load_balancing_type=none"],
    "ties": ["mix.average=ties"],
    "dense": ["method=dense"],
}
QUIZ = [{"question": f"def f{n}", "choices": ["(self)", " import"], "answer": n % 2} for n in range(5)]
PREDICTIONS = [
    {"claim": "training on helps", "rows": ["dense", "seed"]},
    {"claim": "the share of the least used", "rows": ["unbalanced", "btx"], "measure": "least_load"},
]


@dataclasses.dataclass(frozen=True)
class GuardedMachine(Machine):
    def command(self, stage: PipelineStage, job_file: Path) -> list[str]:
        *command, module, worker, job = super().command(stage, job_file)
        assert (module, worker) == ("-m", "btx_megatron.launch.worker")
        return [*command, str(Path(__file__).with_name("guarded_worker.py")), job]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("compare")
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, QUIZ)))
    path = write_recipe(folder, variants=VARIANTS, predictions=PREDICTIONS, random_seeds=[1, 2])
    content = yaml.safe_load(path.read_text())
    content["evaluate"] = {"tasks": [{"name": "quiz", "format": "multiple_choice", "path": "quiz.jsonl"}]}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    here = this_machine("cpu")
    machine = GuardedMachine(**{field.name: getattr(here, field.name) for field in dataclasses.fields(here)})
    out = run_comparison(path, [], machine)
    return path, json.loads((out / "compare.json").read_text())


def test_equal_stages_ran_once(compared: tuple[Path, dict[str, Any]]) -> None:
    path, _ = compared
    links = {
        str(link.relative_to(path.parent / "runs"))
        for link in (path.parent / "runs").rglob("*")
        if link.is_symlink() and "compare" not in link.parts
    }
    experts = {"experts/json", "experts/mail"}
    first = {
        f"seed-1/{name}/{stage}"
        for name, stages in {
            "unbalanced": {"data", "seed", *experts, "mix", "average"},
            "ties": {"data", "seed", *experts},
            "dense": {"data", "seed", "dense"},
        }.items()
        for stage in stages
    }
    second = {link.replace("seed-1", "seed-2") for link in first} | {"seed-2/btx/data"}
    assert links == first | second


def test_what_is_told(compared: tuple[Path, dict[str, Any]]) -> None:
    path, results = compared
    rows = results["rows"]
    assert results["random_seeds"] == [1, 2]
    assert list(rows)[:4] == list(VARIANTS)
    assert {"seed", "sparse_upcycling_dm", "merged", "ties/average"} <= set(rows)
    assert len(set(rows["btx"]["held_out_loss"]["mean"]["values"])) == 2  # seeds differ
    dense = rows["dense"]["held_out_loss"]["mean"]["values"]
    for number, seed in enumerate((1, 2)):
        report = path.parent / "runs" / f"seed-{seed}" / "btx" / "report" / "summary.json"
        assert json.loads(report.read_text())["held_out_loss"]["dense"]["mean"] == dense[number]
    assert results["predictions"][0]["verdict"] == "seen"
    assert all(0 <= load <= 1 for load in rows["btx"]["least_load"]["values"])
    assert rows["dense"]["least_load"] is None
    assert all(0 <= row["tasks"]["quiz"]["mean"] <= 1 for row in rows.values())
    assert [len(of_seed) for of_seed in results["variants"]["btx"]["load_by_step"]] == [3, 3]
    out = path.parent / "runs" / "compare" / "tiny"
    page = (out / "report.md").read_text()
    for name in ("losses", "compute", "routing", "load"):
        assert f"({name}.png)" in page
        assert (out / f"{name}.png").stat().st_size > 5000
    assert "data:image/png;base64," in (out / "report.html").read_text()


def test_sharing_changes_no_number(compared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, results = compared
    (ties,) = [v for v in expand(path, []) if (v.name, v.random_seed) == ("ties", 2)]
    ties.recipe.run_folder = str(tmp_path / "alone")
    ties.recipe.evaluate.tasks = []  # nor does it change a route that somebody is asked something
    run_pipeline(ties.recipe, this_machine("cpu"))
    summary = json.loads((tmp_path / "alone" / "report" / "summary.json").read_text())
    assert (
        summary["held_out_loss"]["btx"]["mean"]
        == results["rows"]["ties"]["held_out_loss"]["mean"]["values"][1]
    )
    assert summary["tokens"]["btx"] == results["rows"]["ties"]["tokens"]
    shared = path.parent / "runs" / "seed-2" / "ties"
    routing = [
        json.loads((run / "evaluate" / "evaluation.json").read_text())["routing"]
        for run in (tmp_path / "alone", shared)
    ]
    assert routing[0] == routing[1]


def test_what_was_measured_is_not_measured_again(compared: tuple[Path, dict[str, Any]]) -> None:
    """A loss that nobody can measure comes back from the run that has it; the variant's own is its own."""
    path, results = compared
    runs = path.parent / "runs" / "seed-2"
    first = runs / "btx" / "evaluate" / "evaluation.json"
    text = first.read_text()
    told = json.loads(text)
    for row in ("seed", "expert:json", "merged"):
        told["held_out_loss"][row]["mail"] = 99.0
        told["tasks"][row]["quiz"]["value"] = 99.0
    first.write_text(json.dumps(told))
    for stage in ("evaluate", "report"):
        shutil.rmtree(runs / "unbalanced" / stage)
    run_comparison(path, [], this_machine("cpu"))
    first.write_text(text)
    again = json.loads((runs / "unbalanced" / "evaluate" / "evaluation.json").read_text())
    losses = again["held_out_loss"]
    assert losses["seed"]["mail"] == losses["expert:json"]["mail"] == losses["merged"]["mail"] == 99.0
    assert again["tasks"]["seed"]["quiz"]["value"] == 99.0
    assert again["tasks"]["btx"]["quiz"]["documents"] == 5
    assert losses["expert:mail"] == told["held_out_loss"]["expert:mail"]
    assert losses["btx"]["mail"] == results["rows"]["unbalanced"]["held_out_loss"]["mail"]["values"][1]
    for stage in ("evaluate", "report"):
        shutil.rmtree(runs / "unbalanced" / stage)
    run_comparison(path, [], this_machine("cpu"))


def test_another_question_of_the_same_models(compared: tuple[Path, dict[str, Any]]) -> None:
    """A second recipe in the same folder trains what the first one lacks, and has results of its own."""
    path, results = compared
    variants = {"btx": VARIANTS["btx"], "longer": ["stages.finetune.training.train_iters=16"]}
    content = yaml.safe_load(path.read_text()) | {"name": "second"}
    content["compare"] = {"variants": variants, "random_seeds": [1]}
    second = path.with_name("second.yaml")
    second.write_text(yaml.safe_dump(content, sort_keys=False))
    out = run_comparison(second, [], this_machine("cpu"))
    assert out == path.parent / "runs" / "compare" / "second"
    told = json.loads((out / "compare.json").read_text())
    losses = [both["rows"]["btx"]["held_out_loss"]["mean"]["values"][0] for both in (told, results)]
    assert losses[0] == losses[1]
    run = path.parent / "runs" / "seed-1" / "longer"
    made_here = {stage.name for stage in run.iterdir() if stage.is_dir() and not stage.is_symlink()}
    assert made_here - {".locks", ".work", "experts"} == {"finetune", "evaluate", "report"}
    first = json.loads((path.parent / "runs" / "compare" / "tiny" / "compare.json").read_text())
    assert first["rows"] == results["rows"]


def test_a_random_seed_of_which_the_results_are_kept(compared: tuple[Path, dict[str, Any]]) -> None:
    """Its runs are elsewhere; the others go on."""
    path, results = compared
    runs = path.parent / "runs"
    (runs / "seed-1").rename(runs / "elsewhere")
    out = run_comparison(path, [], this_machine("cpu"))
    assert json.loads((out / "compare.json").read_text())["rows"] == results["rows"]
    assert not (runs / "seed-1").exists()
    (runs / "elsewhere").rename(runs / "seed-1")


def test_it_goes_on_where_it_was(compared: tuple[Path, dict[str, Any]]) -> None:
    path, results = compared
    shutil.rmtree(path.parent / "runs" / "compare" / "tiny")
    shutil.rmtree(path.parent / "runs" / "seed-2" / "dense")
    out = run_comparison(path, [], this_machine("cpu"))
    again = json.loads((out / "compare.json").read_text())
    assert again["rows"] == results["rows"]
