"""The formulas of a step's traffic: weights add up, groups are Megatron's, the page tells what they say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btx_megatron.estimate import parameter_counts
from btx_megatron.estimate_comm import Setup, _Rank, dense_weights, expert_weights, step_traffic
from btx_megatron.recipe import Layout, Model, Moe

ROOT = Path(__file__).parents[1]
MODEL = Model(num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4)
DENSE = Setup(MODEL, Layout(), padded_vocab_size=512, micro_batch_size=2, global_batch_size=32, bf16=True)
MOE = replace(DENSE, num_experts=8)

sizes = st.sampled_from([1, 2, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tp, pp, dp, cp = draw(sizes), draw(sizes), draw(sizes), draw(st.sampled_from([1, 2]))
    etp = draw(st.sampled_from([1, tp]))
    ep = draw(st.sampled_from([size for size in (1, 2, 4, 8) if tp * cp * dp % (etp * size) == 0]))
    return Layout(
        tp, pp, dp, ep, etp, cp, sequence_parallel=tp > 1, use_distributed_optimizer=draw(st.booleans())
    )


@given(layouts())
def test_the_weights_of_all_stages_are_the_model(layout: Layout) -> None:
    counts = parameter_counts(MODEL, DENSE.padded_vocab_size, 8, 2)
    stages = range(layout.pipeline_model_parallel_size)
    one = replace(layout, tensor_model_parallel_size=1, expert_tensor_parallel_size=1)
    one = replace(one, expert_model_parallel_size=1)
    dense, moe = replace(DENSE, layout=one), replace(MOE, layout=one)
    assert sum(sum(dense_weights(dense, stage)) for stage in stages) == counts.dense
    shared = sum(sum(dense_weights(moe, stage)) for stage in stages)
    assert shared + sum(sum(expert_weights(moe, stage)) for stage in stages) == counts.moe_total


def test_sample_top1_takes_all_experts_in_the_first_layer() -> None:
    """Of 4 layers and 8 experts: 11 routes a token, where Switch has 4; on two stages 9 and 2."""

    def sent(router: str, pp: int) -> list[int]:
        layout = Layout(pipeline_model_parallel_size=pp, data_parallel_size=4, expert_model_parallel_size=4)
        setup = replace(MOE, layout=layout, moe=Moe(moe_router_type=router))  # type: ignore[arg-type]
        ranks = [_Rank(setup, rank, 8) for rank in range(layout.world_size)]
        told = [[row for row in rank.step().rows() if row["collective"] == "all_to_all"] for rank in ranks]
        return [int(sum(row["payload"] for row in rows)) for rows in told]

    (one,) = {
        4 * sample / switch for sample, switch in zip(sent("sample_top1", 1), sent("switch", 1), strict=True)
    }
    assert one == 11
    two = [
        2 * sample / switch for sample, switch in zip(sent("sample_top1", 2), sent("switch", 2), strict=True)
    ]
    assert two == [9] * 4 + [2] * 4


@given(layouts())
def test_groups_hold_their_rank_and_agree(layout: Layout) -> None:
    setup = replace(MOE, layout=layout)
    ranks = [_Rank(setup, rank, 8) for rank in range(layout.world_size)]
    for rank in ranks:
        for name, group in rank.groups.items():
            if name == "embedding" and not (rank.first_stage or rank.last_stage):
                continue
            assert rank.rank in group
            assert len(set(group)) == len(group)
            assert all(ranks[other].groups[name] == group for other in group), name
        whole = len(rank.groups["tp"]) * len(rank.groups["dp"])
        assert len(rank.groups["etp x ep"]) * len(rank.groups["edp"]) == whole


@given(layouts(), st.sampled_from([1, 2, 4, 8]))
def test_nodes_only_share_the_bytes_out(layout: Layout, ranks_per_node: int) -> None:
    setup = replace(MOE, layout=layout)
    here, apart = step_traffic(setup, ranks_per_node).total(), step_traffic(setup, 10**6).total()
    assert here.wire == pytest.approx(apart.wire, abs=layout.world_size)
    assert apart.between == 0
    if layout.world_size == 1:
        assert here.wire == 0


def test_data_parallelism_by_hand() -> None:
    parameters = parameter_counts(MODEL, 512, 8, 2).dense
    setup = replace(DENSE, layout=Layout(data_parallel_size=4))
    assert step_traffic(setup, 2).total().wire == 4 * (2 * 3 / 4) * 4 * parameters  # fp32 gradients
    zero = replace(setup, layout=Layout(data_parallel_size=4, use_distributed_optimizer=True))
    padded = parameters + 64  # every weight is a multiple of 64; the end must be one of 128
    assert step_traffic(zero, 2).total().wire == 4 * (3 / 4) * (4 + 2) * padded
    assert step_traffic(zero, 2).total().between == 2 * (3 / 4) * (4 + 2) * padded  # 2 of 4 links


def test_tensor_parallelism_with_and_without_sequence_shards_moves_the_same() -> None:
    plain = replace(DENSE, layout=Layout(tensor_model_parallel_size=2))
    sliced = replace(plain, layout=replace(plain.layout, sequence_parallel=True))
    act = 2 * MODEL.seq_length * MODEL.hidden_size * 2  # micro-batch of 2, bf16
    cross_entropy = 3 * 2 * MODEL.seq_length * 4
    forward_and_backward = 16 * (4 * MODEL.num_layers + 2) * act + 16 * cross_entropy
    assert step_traffic(plain, 8).total().wire == 2 * forward_and_backward
    # the same, and what the backward pass gathers again: the inputs of 2 L matrices and of the head
    norms = (2 * MODEL.num_layers + 1) * MODEL.hidden_size * 4
    again = 16 * (2 * MODEL.num_layers + 1) * act / 2
    assert step_traffic(sliced, 8).total().wire == 2 * (forward_and_backward + again + norms)


def test_all_to_all_by_hand() -> None:
    setup = replace(MOE, layout=Layout(data_parallel_size=4, expert_model_parallel_size=4))
    lines = step_traffic(setup, 8).lines
    routes = 32 * MODEL.seq_length * 2  # of all ranks in a step: top-2
    amount = next(amount for line, amount in lines.items() if line.group == "ep")
    assert amount.payload == routes * MODEL.num_layers * (4 * MODEL.hidden_size * 2 + 2 * 4)
    assert amount.wire == amount.payload * 3 / 4
    assert not any(line.group == "edp" for line in lines)  # no rank holds the experts of another


def test_a_moe_without_overlap_gathers_its_weights_twice() -> None:
    layout = Layout(data_parallel_size=4, expert_model_parallel_size=2, use_distributed_optimizer=True)
    gathered = {}
    for overlap in (False, True):
        setup = replace(MOE, layout=replace(layout, overlap_param_gather=overlap))
        lines = step_traffic(setup, 8).lines
        gathered[overlap] = sum(a.wire for line, a in lines.items() if line.collective == "all_gather")
    assert gathered[False] == 2 * gathered[True]


def test_the_page_tells_what_the_benchmark_computes() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "communication.py"), "--computed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = (ROOT / "docs" / "communication.md").read_text()
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 15
    assert [row for row in rows if row not in page] == []
