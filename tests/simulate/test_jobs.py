"""A recipe's stages as jobs: nodes, hours, inputs; and the synchronous run of the same work."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.errors import UserError
from btx_megatron.estimate_flops import stage_flops
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import parse_recipe
from btx_megatron.simulate.assumptions import Assumptions, parse_assumptions
from btx_megatron.simulate.jobs import btx_jobs, mix_hours, share_nodes, synchronous_job

PLAIN = Assumptions()
LLAMA_2_7B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 11008,
    "num_attention_heads": 32,
    "seq_length": 4096,
}
STEPS = {"math": 48_000, "code": 50_000, "wiki": 10_000}


@pytest.fixture
def tree() -> dict[str, Any]:
    """The paper's set-up: 4M tokens a step; experts of 201B, 210B and 42B tokens, a MoE stage of 80B."""
    return {
        "data": {"domains": [{"name": name, "sources": [{"path": "x"}]} for name in STEPS]},
        "tokenizer": {"vocab_size": 32_000},
        "model": LLAMA_2_7B,
        "training": {"global_batch_size": 1024},
        "stages": {
            "experts": {name: {"training": {"train_iters": steps}} for name, steps in STEPS.items()},
            "finetune": {"training": {"train_iters": 19_000}},
        },
    }


@pytest.fixture
def recipe(tree: dict[str, Any]) -> Recipe:
    return parse_recipe(tree)


def test_jobs_of_the_paper(recipe: Recipe) -> None:
    jobs = {job.name: job for job in btx_jobs(recipe, PLAIN, 1024)}
    assert list(jobs) == ["expert:math", "expert:code", "expert:wiki", "mix", "finetune"]
    assert [jobs[name].inputs for name in ("expert:math", "finetune")] == [(), ("mix",)]
    assert jobs["mix"].inputs == ("expert:math", "expert:code", "expert:wiki")
    assert [job.nodes for job in jobs.values()] == [57, 59, 12, 0, 128]  # 128 nodes as 48 : 50 : 10
    flops = 989e12 * 0.4 * 3600 * 1024
    assert jobs["finetune"].hours == pytest.approx(stage_flops(recipe, "finetune") / flops)
    math = jobs["expert:math"]
    assert math.hours == pytest.approx(stage_flops(recipe, "expert:math") / (flops * 57 / 128))
    optimum = (2 * 30 / 3600 * 50_700 / (57 * 8)) ** 0.5  # Young's, 1.36 hours; Daly's is a little less
    assert math.hours / math.segments == pytest.approx(optimum, rel=0.03)


def test_the_synchronous_run_is_the_same_work(recipe: Recipe) -> None:
    jobs = btx_jobs(recipe, PLAIN, 1024)
    one = synchronous_job(jobs, PLAIN, 1024)
    assert one.nodes == 128
    total = sum(stage_flops(recipe, name) for name in (*recipe.expert_stages, "finetune"))
    assert one.hours * 1024 * 989e12 * 0.4 * 3600 == pytest.approx(total)
    assert one.segments > sum(job.segments for job in jobs if job.name == "finetune")


def test_experts_share_evenly(recipe: Recipe) -> None:
    jobs = btx_jobs(recipe, replace(PLAIN, share_gpus_by="even"), 1024)
    assert sorted(job.nodes for job in jobs[:3]) == [42, 43, 43]


def test_what_is_imported_does_not_train(tree: dict[str, Any]) -> None:
    for name in ("math", "code"):
        tree["stages"]["experts"][name]["pretrained_checkpoint"] = f"/there/{name}"
    jobs = {job.name: job for job in btx_jobs(parse_recipe(tree), PLAIN, 1024)}
    assert list(jobs) == ["expert:wiki", "mix", "finetune"]
    assert (jobs["expert:wiki"].nodes, jobs["mix"].inputs) == (128, ("expert:wiki",))


def test_ensembles_end_with_their_experts(tree: dict[str, Any]) -> None:
    jobs = btx_jobs(parse_recipe(tree | {"method": "btm"}), PLAIN, 1024)
    assert [job.name for job in jobs] == ["expert:math", "expert:code", "expert:wiki"]


def test_the_mix_reads_every_expert_and_writes_the_moe(recipe: Recipe) -> None:
    """Four models of 6.74B and a MoE of 19.7B weights, in bf16, at 2 GB/s."""
    hours = mix_hours(recipe, replace(PLAIN, mix_gigabytes_per_second=2.0))
    assert hours * 3600 == pytest.approx(4 * 6.74 + 19.7, rel=0.01)


@given(st.integers(1, 9), st.lists(st.floats(0.1, 100.0), min_size=1, max_size=4))
def test_nodes_are_shared_so_that_the_longest_job_is_as_short_as_can_be(
    nodes: int, weights: list[float]
) -> None:
    counts = share_nodes(nodes, weights)
    assert min(counts) == 1 or sum(counts) == nodes
    if nodes < len(weights):
        assert counts == [1] * len(weights)
        return
    assert sum(counts) == nodes
    every = (c for c in itertools.product(range(1, nodes + 1), repeat=len(weights)) if sum(c) == nodes)
    best = min(max(w / n for w, n in zip(weights, c, strict=True)) for c in every)
    assert max(w / n for w, n in zip(weights, counts, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize(
    ("change", "gpus", "assume", "message"),
    [
        ({}, 100, [], "--gpus 100: must be a multiple of 8"),
        ({}, 0, [], "--gpus 0: must be"),
        ({"method": "dense"}, 128, [], "method dense: it is one job"),
        ({}, 1024, ["gpu_mtbf_hours=10"], "fails every .* minutes on the mean"),
    ],
)
def test_what_cannot_be_simulated(
    tree: dict[str, Any], change: dict[str, Any], gpus: int, assume: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        btx_jobs(parse_recipe(tree | change), parse_assumptions(assume), gpus)


def test_assumptions_are_read() -> None:
    found = parse_assumptions(["gpu_mtbf_hours=.inf", "spare_nodes=4", "share_gpus_by=even", "mfu=1"])
    assert (found.spare_nodes, found.share_gpus_by, found.mtbf_hours(3)) == (4, "even", float("inf"))
    assert parse_assumptions(["gpu_mtbf_hours=1600"]).mtbf_hours(2) == 100


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mfu", "--assume mfu: write it as KEY=VALUE"),
        ("mtbf=3", "key 'mtbf': .*known here: gpu_mtbf_hours"),
        ("spare_nodes=1.5", "key 'spare_nodes'"),
        ("share_gpus_by=luck", "share_gpus_by"),
        ("mfu=1.5", "mfu=1.5: is a share"),
        ("mfu=0", "mfu=0: must be a number greater than 0"),
        ("restart_minutes=-1", "restart_minutes=-1: must be a number 0 or more"),
        ("node_repair_hours=.inf", "node_repair_hours=inf: must be a number"),
        ("gpu_mtbf_hours=.nan", "gpu_mtbf_hours=nan: must be a number"),
    ],
)
def test_assumptions_that_cannot_be(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_assumptions([setting])
    assert "\n" not in str(caught.value)
