"""What does not fit is refused, and every layout that is proposed instead is a recipe's and fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btx_megatron.errors import UserError
from btx_megatron.estimate_comm import Setup, setup_of
from btx_megatron.estimate_fit import check_fit, fitting_layouts, layout_text
from btx_megatron.estimate_memory import fullest_rank
from btx_megatron.recipe import Layout, Recipe
from btx_megatron.recipe_checks import check_recipe
from btx_megatron.recipe_file import parse_recipe

STAGES = ("expert:a", "finetune")


def recipe_of(**changes: Any) -> Recipe:
    domains = [{"name": name, "sources": [{"path": "x"}]} for name in ("a", "b", "c")]
    model = {
        "num_layers": 12,
        "hidden_size": 1024,
        "ffn_hidden_size": 2816,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "seq_length": 1024,
    }
    training = {"train_iters": 10, "global_batch_size": 96, "micro_batch_size": 2, "lr_warmup_iters": 1}
    tree = {"data": {"domains": domains}, "model": model, "training": training | {"bf16": True}} | changes
    return parse_recipe(tree)


def setup_in(recipe: Recipe, stage: str) -> Setup:
    return setup_of(recipe, recipe.stage(stage), 32_000, recipe.num_experts(stage))


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 3, 4, 8, 16]), st.sampled_from([2, 4, 8]), st.floats(0.05, 1), st.data())
def test_every_proposal_is_a_layout_of_the_recipe_and_fits(
    ranks: int, node: int, share: float, data: st.DataObject
) -> None:
    stage = data.draw(st.sampled_from(STAGES))
    recipe = recipe_of(layout={"data_parallel_size": ranks})
    setup = setup_in(recipe, stage)
    memory = fullest_rank(setup).total * share
    for layout in fitting_layouts(recipe, setup, memory, node):
        recipe.stage(stage).layout = layout
        check_recipe(recipe, "recipe")  # raises
        assert fullest_rank(setup_in(recipe, stage)).total <= memory
        assert layout.world_size % ranks == 0
        assert layout.tensor_model_parallel_size <= node


def test_what_fits_is_not_refused() -> None:
    recipe = recipe_of()
    setup = setup_in(recipe, "finetune")
    needed = fullest_rank(setup).total
    check_fit(recipe, "stages.finetune", setup, needed, 8)
    with pytest.raises(UserError):
        check_fit(recipe, "stages.finetune", setup, needed - 1, 8)


def test_the_refusal_names_the_parts_and_three_layouts() -> None:
    recipe = recipe_of(layout={"data_parallel_size": 8})
    setup = setup_in(recipe, "finetune")
    with pytest.raises(UserError) as refused:
        check_fit(recipe, "stages.finetune", setup, 8e9, 8)
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(
        f"stages.finetune.layout DP8 needs {fullest_rank(setup).total / 1e9:.1f} GB a GPU ("
    )
    for part in ("weights", "gradients", "optimizer", "activations", "working"):
        assert f"{part} " in line
    assert "there are 8.0; these fit: " in line
    assert line.count(" GB)") == 3
    for layout in fitting_layouts(recipe, setup, 8e9, 8):
        assert layout_text(layout) in line


def test_more_gpus_are_proposed_where_these_cannot_do() -> None:
    recipe = recipe_of()
    setup = setup_in(recipe, "finetune")
    assert all(layout.world_size > 1 for layout in fitting_layouts(recipe, setup, 4e9, 8))
    assert fitting_layouts(recipe, setup, 4e9, 8)


def test_what_no_layout_can_do_says_so() -> None:
    recipe = recipe_of()
    setup = setup_in(recipe, "expert:a")
    with pytest.raises(UserError, match=r"no layout fits; lower training\.micro_batch_size"):
        check_fit(recipe, "stages.experts.a", setup, 1e6, 8)
    with pytest.raises(UserError, match="no layout fits on up to 64 times the GPUs; take larger ones"):
        check_fit(recipe, "stages.experts.a", replace(setup, micro_batch_size=1), 1e6, 8)


def test_least_recomputation_first() -> None:
    """With memory to spare none is proposed, and with less the layers' inputs alone are kept."""
    recipe = recipe_of()
    setup = setup_in(recipe, "expert:a")
    assert fitting_layouts(recipe, setup, 1e12, 8)[0] == Layout()
    full = Layout(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    tight = fullest_rank(replace(setup, layout=full)).total
    one = [layout for layout in fitting_layouts(recipe, setup, tight, 8) if layout.world_size == 1]
    assert [layout_text(layout) for layout in one] == ["1 rank, recompute full"]


def test_nodes_of_a_stage_are_its_own() -> None:
    from btx_megatron.launch.sizes import setups_of

    slurm = {"gpus_per_node": 4, "stages": {"expert": {"gpus_per_node": 2}}}
    nodes = {stage: node for stage, (_, node) in setups_of(recipe_of(slurm=slurm)).items()}
    assert (nodes["expert:a"], nodes["finetune"]) == (2, 4)
