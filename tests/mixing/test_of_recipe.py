"""The stages mix, average and upcycle of a run, through the worker's own tasks, on tiny models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tiny import LAYERS, WIDTH, random_weights, write_dense
from torch import Tensor

from btx_megatron.checkpoints.formats import open_checkpoint
from btx_megatron.checkpoints.names import ROUTER
from btx_megatron.checkpoints.pieces import indices_of, read_part
from btx_megatron.job import Job
from btx_megatron.launch import worker
from btx_megatron.mixing import experts, plan
from btx_megatron.mixing.average import mean, ties
from btx_megatron.mixing.of_recipe import average_options, mix_options, upcycling_options
from btx_megatron.mixing.verify import verify
from btx_megatron.pipeline import stages_of
from btx_megatron.recipe import Mix, Recipe
from btx_megatron.recipe_file import parse_recipe
from btx_megatron.run_folder import stage_folder

SEEDS = {"expert:a": 1, "expert:b": 2, "seed": 3}
SHARED = "decoder.layers.self_attention.linear_proj.weight"
FC1, FC2 = (f"decoder.layers.mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))


def recipe_of(**values: Any) -> Recipe:
    domains = [{"name": name, "sources": [{"path": "x"}]} for name in ("a", "b")]
    model = {"num_layers": LAYERS, "hidden_size": 8, "ffn_hidden_size": WIDTH}
    model |= {"num_attention_heads": 2, "num_query_groups": 1}
    return parse_recipe({"data": {"domains": domains}, "model": model, **values})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experts and the seed, as their stages leave them."""
    folder: Path = tmp_path_factory.mktemp("run")
    for stage, seed in SEEDS.items():
        write_dense(folder / stage_folder(stage) / "checkpoints", random_weights(seed))
    return folder


def do(recipe: Recipe, stage: str, run_folder: Path, work: Path) -> dict[str, Tensor]:
    """Run a stage's task as a worker does, and read what it wrote."""
    task = next(found.task for found in stages_of(recipe) if found.name == stage)
    work.mkdir()
    result = worker._TASKS[task](Job(task, stage, recipe, run_folder, work))
    assert result["outputs"]["tensors"]
    source = open_checkpoint(work / "checkpoints")
    read = {}
    for name, info in source.tensors.items():
        parts = [read_part(source, name, index) for index in indices_of(name, info)]
        read[name] = torch.stack(parts).reshape(info.shape)
    return read


def weights() -> dict[str, dict[str, Tensor]]:
    return {stage.removeprefix("expert:"): random_weights(seed) for stage, seed in SEEDS.items()}


def test_split_and_ties(run_folder: Path, tmp_path: Path) -> None:
    mix = {"experts": "split", "chunks": 3, "average": "ties", "density": 0.25, "weights": {"b": 2.0}}
    recipe = recipe_of(mix=mix | {"include_seed": False})
    read = do(recipe, "mix", run_folder, tmp_path / "mix")
    assert recipe.expert_names == ["a.0", "a.1", "a.2", "b.0", "b.1", "b.2"]
    assert recipe.expert_groups == [0, 0, 0, 1, 1, 1]
    assert recipe.expert_ffn_hidden_size == WIDTH // 3
    for number, name in enumerate(recipe.expert_names):
        source, _, chunk = name.partition(".")
        units = slice(int(chunk) * WIDTH // 3, (int(chunk) + 1) * WIDTH // 3)
        for layer in range(LAYERS):
            gate, up = weights()[source]["decoder.layers.mlp.linear_fc1.weight"][layer].chunk(2)
            assert torch.equal(read[FC1][layer, number], torch.cat([gate[units], up[units]]))
            down = weights()[source]["decoder.layers.mlp.linear_fc2.weight"][layer]
            assert torch.equal(read[FC2][layer, number], down[:, units])
    assert read[ROUTER].shape == (LAYERS, 6, 8)
    for layer in range(LAYERS):
        parts = [weights()[name][SHARED][layer] for name in ("a", "b")]
        merged = ties(parts, weights()["seed"][SHARED][layer], [1.0, 2.0], 0.25)
        assert torch.equal(read[SHARED][layer], merged)
    average = do(recipe, "average", run_folder, tmp_path / "average")
    assert torch.equal(average[SHARED], read[SHARED])
    parts = [weights()[name]["decoder.layers.mlp.linear_fc2.weight"][0] for name in ("a", "b")]
    base = weights()["seed"]["decoder.layers.mlp.linear_fc2.weight"][0]
    fc2 = average["decoder.layers.mlp.linear_fc2.weight"]
    assert torch.equal(fc2[0], ties(parts, base, [1.0, 2.0], 0.25))


def test_base_is_the_seeds_own_weights_and_the_row_average_is_not(run_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(mix={"average": "base"})
    read = do(recipe, "mix", run_folder, tmp_path / "mix")
    assert torch.equal(read[SHARED], weights()["seed"][SHARED])
    average = do(recipe, "average", run_folder, tmp_path / "average")
    assert torch.equal(average[SHARED], mean(one[SHARED] for one in weights().values()))


@pytest.mark.parametrize("method", ["btx", "sparse_upcycling"])
def test_upcycling_copies_the_seed_whatever_the_experts_are(
    run_folder: Path, tmp_path: Path, method: str
) -> None:
    values = {"baselines": ["sparse_upcycling_cm"]} if method == "btx" else {"method": method}
    recipe = recipe_of(**values, mix={"router_std": 0.5})
    read = do(recipe, "upcycle", run_folder, tmp_path / "upcycle")
    assert read[FC1].shape[:2] == (LAYERS, 3) == (LAYERS, len(recipe.expert_names))
    seed = weights()["seed"]
    for expert in range(3):
        assert torch.equal(read[FC1][:, expert], seed["decoder.layers.mlp.linear_fc1.weight"])
        assert torch.equal(read[FC2][:, expert], seed["decoder.layers.mlp.linear_fc2.weight"])
    for name in (SHARED, "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"):
        assert torch.equal(read[name], seed[name])
    assert 0.2 < read[ROUTER].std() < 0.8
    assert len({tuple(row.tolist()) for row in read[ROUTER].flatten(0, 1)}) == 3 * LAYERS


def test_a_cut_seed_is_upcycled_in_groups(run_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(baselines=["sparse_upcycling_dm"], mix={"experts": "split", "chunks": 2})
    read = do(recipe, "upcycle", run_folder, tmp_path / "upcycle")
    assert read[FC1].shape[1] == len(recipe.expert_names) == 6
    assert torch.equal(read[ROUTER][:, 0::2], read[ROUTER][:, 1::2])  # a group's chunks: one row
    wide = [read[FC2][0, chunk] for chunk in (0, 1)]
    seed = weights()["seed"]["decoder.layers.mlp.linear_fc2.weight"][0]
    assert torch.allclose(torch.cat(wide, dim=1), seed * 2**0.5)  # factor 2: half up, half down


def test_what_is_upcycled_passes_the_next_stages_check(run_folder: Path, tmp_path: Path) -> None:
    """Experts that are alike are a mistake everywhere else."""
    from btx_megatron.manifest import make_manifest, manifest_text

    recipe = recipe_of(method="sparse_upcycling")
    work = tmp_path / "upcycle"
    work.mkdir()
    outputs = worker._TASKS["mix"](Job("mix", "upcycle", recipe, run_folder, work))["outputs"]
    manifest = make_manifest("upcycle", {}, {}, outputs, None, 1.0)
    (work / "manifest.json").write_text(manifest_text(manifest))
    assert verify(work / "checkpoints")["hashes"] == "equal to the manifest's"


def test_every_option_of_the_recipe_reaches_the_engine() -> None:
    mix = {
        "average": "dare", "weights": {"a": 2.0}, "density": 0.3, "experts": "virtual", "chunks": 2,
        "copies": 3, "drop_ratio": 0.2, "virtual_scale": "cube-root", "router_std": 0.1, "random_seed": 7,
    }  # fmt: skip
    moe = {"moe_router_topk": 4, "moe_router_pre_softmax": True}
    options = mix_options(recipe_of(mix=mix, moe=moe))
    assert {key: getattr(options, key) for key in mix} == mix
    assert (options.router_topk, options.router_pre_softmax) == (4, True)
    others = {"include_seed", "grow_from", "grow_experts", "grow_share", "drop"}  # of what is mixed, and how
    assert set(vars(Mix())) - others <= set(vars(options))
    average = average_options(recipe_of(mix=mix, moe=moe))
    assert (average.average, average.density, average.weights) == ("dare", 0.3, {"a": 2.0})
    upcycled = upcycling_options(recipe_of(mix=mix, moe=moe))
    assert (upcycled.average, upcycled.experts, upcycled.copies, upcycled.chunks) == ("mean", "virtual", 9, 2)


def test_the_recipes_words_are_the_engines() -> None:
    hints = get_type_hints(Mix)
    for key, known in {
        "average": plan.Average,
        "experts": experts.Kind,
        "router_init": plan.RouterInit,
        "virtual_scale": get_type_hints(plan.MixOptions)["virtual_scale"],
    }.items():
        assert get_args(hints[key]) == get_args(known)


@pytest.mark.parametrize("kind", get_args(experts.Kind))
def test_names_and_widths_are_those_of_the_engine(kind: experts.Kind) -> None:
    chunks = 2 if kind in ("split", "virtual") else 1
    copies = 3 if kind in ("copies", "virtual") else 1
    recipe = recipe_of(mix={"experts": kind, "chunks": chunks, "copies": copies})
    names = recipe.expert_names
    assert len(set(names)) == len(names) == experts.expert_count(kind, 3, chunks, copies)
    assert recipe.expert_ffn_hidden_size == experts.expert_width(kind, 3, WIDTH, chunks)
    for expert, name in enumerate(names):
        spans = experts.expert_units(kind, expert, 3, WIDTH, chunks, copies)
        if kind == "blend":
            assert name == f"blend.{expert}"
            assert recipe.expert_groups == []
            continue
        assert recipe.expert_groups[expert] == spans[0].source
        assert recipe.source_names[spans[0].source] == name.split(".")[0]
        if chunks > 1:
            assert int(name.rpartition(".")[2]) * WIDTH // chunks == spans[0].start


def test_a_mixture_grows_by_two_and_loses_one(run_folder: Path, tmp_path: Path) -> None:
    """Experts keep their bytes, rows their experts; each new one has the share that the recipe says."""
    first = recipe_of(mix={"include_seed": False})
    before = do(first, "mix", run_folder, tmp_path / "mix")
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "mix", run / "grown_from")
    new = {"c": 7, "d": 8}
    for name, seed in new.items():
        write_dense(run / stage_folder(f"expert:{name}") / "checkpoints", random_weights(seed))
    write_dense(run / "seed" / "checkpoints", random_weights(SEEDS["seed"]))
    domains = [{"name": name, "sources": [{"path": "x"}]} for name in ("d", "b", "c")]
    mix = {"grow_from": "x", "grow_experts": ["a", "b"], "drop": ["a"], "random_seed": 3}
    for share, number in ((None, 0), (0.2, 1)):
        values = {"data": {"domains": domains}, "mix": mix | {"grow_share": share}}
        recipe = recipe_of(**values)
        assert recipe.expert_names == ["b", "d", "c", "seed"]
        after = do(recipe, "mix", run, tmp_path / f"grown{number}")
        sources = [random_weights(seed) for seed in (new["d"], new["c"], SEEDS["seed"])]
        for moe, dense in ((FC1, "linear_fc1"), (FC2, "linear_fc2")):
            assert torch.equal(after[moe][:, 0], before[moe][:, 1])
            for expert, source in enumerate(sources, 1):
                assert torch.equal(after[moe][:, expert], source[f"decoder.layers.mlp.{dense}.weight"])
        assert after[ROUTER].shape == (LAYERS, 4, 8)
        assert torch.equal(after[ROUTER][:, 0], before[ROUTER][:, 1])
        assert after[ROUTER][:, 1:].std() > 0.01
        share = 1 / 4 if share is None else share
        wanted = (1 - 3 * share) * before[SHARED].double() + share * sum(s[SHARED].double() for s in sources)
        torch.testing.assert_close(after[SHARED].double(), wanted, rtol=1e-6, atol=1e-7)
