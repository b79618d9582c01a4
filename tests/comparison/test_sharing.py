"""Which stages are equal, what a link to another run's stage survives, and what it never touches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from recipes import write_recipe

from btx_megatron.comparison.sharing import link_finished
from btx_megatron.comparison.variants import Variant, expand
from btx_megatron.errors import UserError
from btx_megatron.manifest import make_manifest
from btx_megatron.run_folder import RunFolder

EXPERTS = {"expert:json", "expert:mail"}


def equal(first: Variant, second: Variant) -> set[str]:
    """Stages that both have, with equal keys."""
    return {stage for stage, key in first.keys.items() if second.keys.get(stage) == key}


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        ([], {"prepare", "seed", *EXPERTS, "mix", "average", "finetune"}),
        # what changes no result
        (
            [
                "name=x",
                "launch.threads_per_rank=1",
                "layout.use_distributed_optimizer=true",
                "training.save_interval=7",
            ],
            "all",
        ),
        (["evaluate.micro_batch_size=4", "baselines=[dense]", "stages.dense.training.lr=1"], "all"),
        # the mixture's training alone
        (["moe.moe_router_load_balancing_type=none"], {"prepare", "seed", *EXPERTS, "mix", "average"}),
        (["stages.finetune.training.lr=1e-3"], {"prepare", "seed", *EXPERTS, "mix", "average"}),
        # the mix
        (["moe.moe_router_type=soft"], {"prepare", "seed", *EXPERTS, "average"}),
        (["mix.experts=split", "mix.chunks=2"], {"prepare", "seed", *EXPERTS, "average"}),
        (["mix.average=ties"], {"prepare", "seed", *EXPERTS}),
        (["mix.include_seed=false"], {"prepare", "seed", *EXPERTS}),
        # one expert, and all after it; the seed, and all after it
        (["stages.experts.json.training.lr=1"], {"prepare", "seed", "expert:mail"}),
        (["stages.seed.training.train_iters=13"], {"prepare"}),
        (["compare.random_seeds=[4]"], {"prepare"}),
        (["model.hidden_size=64"], {"prepare"}),
        (["stages.experts.json.blend={json: 0.5, mail: 0.5}"], {"prepare", "seed", "expert:mail"}),
        (["tokenizer.vocab_size=600"], set()),
        (["data.held_out_fraction=0.1"], set()),
        # other methods
        (["method=dense"], {"prepare", "seed"}),
        (["method=sparse_upcycling"], {"prepare", "seed"}),
        (["method=btm"], {"prepare", "seed", *EXPERTS, "average"}),
    ],
)
def test_equal_stages(tmp_path: Path, overrides: list[str], shared: set[str] | str) -> None:
    path = write_recipe(tmp_path, variants={"a": []})
    (first,) = expand(path, [])
    (second,) = expand(path, overrides)
    assert equal(first, second) == (set(first.keys) if shared == "all" else shared)


def test_baseline_and_method_are_one_stage(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, variants={"a": ["baselines=[dense,sparse_upcycling_dm]"]})
    (beside,) = expand(path, [])
    for method, stages in (("dense", {"dense"}), ("sparse_upcycling", {"upcycle", "sparse_upcycling_dm"})):
        (alone,) = expand(path, [f"method={method}", "compare.variants.a=[]"])
        assert equal(beside, alone) == {"prepare", "seed", *stages}


@pytest.mark.parametrize("stage", ["dense", "sparse_upcycling_dm", "sparse_upcycling_cm"])
def test_stages_in_the_place_of_finetune_read_its_blend(tmp_path: Path, stage: str) -> None:
    """Where they have none of their own."""
    other = "stages.finetune.blend={json: 1}"
    variants = {"a": [], "b": [other], "c": [other, f"stages.{stage}.blend={{json: 1, mail: 1}}"]}
    path = write_recipe(tmp_path, variants={"x": [f"baselines=[{stage}]"]})
    keys = [expand(path, overrides)[0].keys[stage] for overrides in variants.values()]
    assert len(set(keys)) == 3
    (own,) = expand(path, [f"stages.{stage}.blend={{json: 1, mail: 1}}"])
    assert own.keys[stage] == keys[2]


def finish(variant: Variant, stage: str) -> None:
    """Publish a stage with a file in it."""
    work = variant.run.work(stage)
    work.mkdir(parents=True)
    (work / "weights").write_text(f"of {variant.name}")
    variant.run.publish(make_manifest(stage, {}, {}, {"made_by": variant.name}, None, 1.0))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Variant, Variant]:
    path = write_recipe(tmp_path, variants={"a": [], "b": ["mix.experts=split", "mix.chunks=2"]})
    first, second = expand(path, [])
    for variant in (first, second):
        variant.run.claim(variant.recipe)
    return first, second


def link(second: Variant, first: Variant) -> list[str]:
    return link_finished(second.run, second.keys, [(first.run, first.keys)])


def test_finished_stages_are_linked_and_the_folder_may_move(
    two: tuple[Variant, Variant], tmp_path: Path
) -> None:
    first, second = two
    for stage in ("seed", "expert:json", "mix"):
        finish(first, stage)
    assert link(second, first) == ["seed", "expert:json"]  # the mix differs
    assert link(second, first) == []  # there already
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    moved = RunFolder(tmp_path / "elsewhere" / "seed-1234" / "b")
    for stage in ("seed", "expert:json"):
        manifest = moved.manifest(stage)
        assert manifest is not None
        assert manifest.outputs == {"made_by": "a"}
    assert moved.manifest("mix") is None


def test_a_stage_that_is_there_or_under_way_is_left_alone(two: tuple[Variant, Variant]) -> None:
    first, second = two
    finish(first, "seed")
    finish(first, "expert:json")
    finish(second, "seed")
    with second.run.lock("expert:json"):
        assert link(second, first) == []
    assert (second.run.published("seed") / "weights").read_text() == "of b"


def test_a_link_to_what_is_gone_is_made_anew(two: tuple[Variant, Variant]) -> None:
    first, second = two
    finish(first, "seed")
    link(second, first)
    shutil.rmtree(first.run.published("seed"))
    assert second.run.manifest("seed") is None
    assert link(second, first) == []
    finish(second, "seed")  # publishes where the dead link was
    assert (second.run.published("seed") / "weights").read_text() == "of b"


def test_publishing_over_a_link_leaves_the_other_run_alone(two: tuple[Variant, Variant]) -> None:
    first, second = two
    finish(first, "seed")
    link(second, first)
    finish(second, "seed")
    assert (first.run.published("seed") / "weights").read_text() == "of a"
    assert (second.run.published("seed") / "weights").read_text() == "of b"


def test_a_run_of_links_alone_keeps_its_recipe(two: tuple[Variant, Variant]) -> None:
    first, second = two
    finish(first, "seed")
    link(second, first)
    second.recipe.model.hidden_size = 64
    with pytest.raises(
        UserError, match=r"was made by another recipe: model.hidden_size is 32 there and 64 here"
    ):
        second.run.claim(second.recipe)
