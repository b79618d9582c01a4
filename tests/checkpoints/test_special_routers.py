"""Routers that only a recipe can describe: what a checkpoint says of them, and what an export does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from btx_megatron.checkpoints.config import from_recipe
from btx_megatron.checkpoints.formats import approximations
from btx_megatron.checkpoints.megatron_args import from_args, to_args
from btx_megatron.mixing.flags import capacity_flags
from btx_megatron.recipe import Moe, Recipe


def config(**moe: Any) -> Any:
    return from_recipe(asdict(Recipe(moe=Moe(**moe))), num_experts=4, vocab_size=100)


@pytest.mark.parametrize(
    ("moe", "topk", "pre_softmax", "lines"),
    [
        ({}, 2, False, []),
        ({"moe_router_type": "soft"}, 4, False, []),
        ({"moe_router_type": "switch"}, 1, True,
         ["moe_router_pre_softmax: ", "moe_expert_capacity_factor 1.5: ", "moe_router_type switch: "]),
        ({"moe_router_type": "sample_top1", "moe_router_inference": "argmax"}, 1, False,
         ["moe_router_topk 1 without pre-softmax", "moe_router_type sample_top1: "]),
        ({"moe_router_logit_norm_scale": 1.5}, 2, False, ["moe_router_logit_norm_scale 1.5: "]),
        ({"moe_router_one_per_group": True}, 2, False, ["moe_router_one_per_group: "]),
        ({"moe_router_time_mask": True}, 2, False, ["moe_router_time_mask: "]),
        ({"moe_expert_capacity_factor": 2.0}, 2, False, ["moe_expert_capacity_factor 2.0: "]),
    ],
)  # fmt: skip
def test_what_mixtral_cannot_say_is_named(
    moe: dict[str, Any], topk: int, pre_softmax: bool, lines: list[str]
) -> None:
    found = config(**moe)
    assert (found.moe_router_topk, found.moe_router_pre_softmax) == (topk, pre_softmax)
    told = approximations(found)
    assert len(told) == len(lines)
    for line, begin in zip(told, lines, strict=True):
        assert line.startswith(begin)
    assert from_args(to_args(found, 128), "here").moe_router == found.moe_router


def test_what_megatron_has_for_a_capacity() -> None:
    assert capacity_flags(config()) == []
    assert capacity_flags(config(moe_router_type="switch"))[0] == "--moe-expert-capacity-factor 1.5"
