"""What ranks send each other, for equal tokens: Branch-Train-MiX, synchronous dense, synchronous MoE.

    python benchmarks/communication.py              measure on gloo ranks here, then compute the paper
    python benchmarks/communication.py --computed   the second part alone: no ranks, a second

Measured: a small model, real Megatron-Core steps, counted by runtime/comm_meter. An expert has two ranks to
itself (a node of two, here); the MoE stage, and what it is compared with, have all four. A few steps of each
are run, and a whole run's bytes are bytes a step x steps: what is handed in is the same in every step, which
is checked here, but for scalars of the first; what an all-to-all sends depends on the routes (last column).

Computed: estimate_comm's formulas, which the measured part and tests/functional/test_communication.py check.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measure import commit, machine, versions

from btx_megatron.estimate_comm import Setup, step_traffic
from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage, Training
from btx_megatron.traffic import Amount, readable

ROOT = Path(__file__).resolve().parents[1]
EXPERTS, STEPS = 4, 4
HERE_NODE, PAPER_NODE = 2, 8
DISTRIBUTED = Layout(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)

SMALL = Setup(
    model=Model(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=704,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=256,
    ),
    layout=DISTRIBUTED,
    padded_vocab_size=4096,
    micro_batch_size=1,
    global_batch_size=8,
)
LLAMA_2_7B = Setup(
    model=Model(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        seq_length=4096,
    ),
    layout=DISTRIBUTED,
    padded_vocab_size=32000,
    micro_batch_size=1,
    global_batch_size=1024,
)


@dataclass(frozen=True)
class Method:
    """A way to spend the tokens: setups and the steps that each takes."""

    name: str
    parts: tuple[tuple[Setup, int], ...]


def laid(setup: Setup, dp: int, ep: int = 1, tp: int = 1) -> Setup:
    """The setup as a dense model on dp x tp ranks, or with ``ep`` > 1 as a MoE."""
    layout = replace(
        setup.layout,
        data_parallel_size=dp,
        expert_model_parallel_size=ep,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
    )
    return replace(setup, layout=layout, num_experts=EXPERTS if ep > 1 else None)


def methods(setup: Setup, expert_ranks: int, ranks: int, ep: int, apart: int, together: int) -> list[Method]:
    """The three ways, for ``apart`` steps of experts and ``together`` steps of the MoE stage."""
    moe, expert = laid(setup, ranks, ep), laid(setup, expert_ranks)
    return [
        Method("BTX: experts apart", ((expert, apart),)),
        Method("BTX: MoE stage", ((moe, together),)),
        Method("BTX, both", ((expert, apart), (moe, together))),
        Method("dense, synchronous", ((laid(setup, ranks), apart + together),)),
        Method("MoE, synchronous from the start", ((moe, apart + together),)),
    ]


# 15 % of the tokens in the MoE stage, as in the paper (80B of 533B)
HERE = methods(SMALL, 2, 4, 2, apart=340, together=60)
# 453B and 80B tokens in steps of 4.19M
PAPER = methods(LLAMA_2_7B, 64, 128, 4, apart=108_004, together=19_073)


def bytes_of(method: Method, step: Any) -> Amount:
    """A whole run: ``step`` gives one step's amount for a setup."""
    total = Amount()
    for setup, steps in method.parts:
        total.add(step(setup), steps)
    return total


def tokens_of(method: Method) -> int:
    return sum(setup.tokens * steps for setup, steps in method.parts)


def table(ways: list[Method], step: Any) -> list[str]:
    """One row a method; shares are of the synchronous dense run."""
    dense = bytes_of(ways[3], step)
    rows = [
        "| | tokens | on the wire | a token | inside nodes | between nodes | wire / dense | between / dense |"
    ]
    rows.append("|---|---|---|---|---|---|---|---|")
    for way in ways:
        amount, tokens = bytes_of(way, step), tokens_of(way)
        cells = [
            f"{tokens / 1e9:.3g} G" if tokens > 1e9 else f"{tokens:,}",
            readable(amount.wire),
            readable(amount.wire / tokens),
            readable(amount.inside),
            readable(amount.between),
            f"{amount.wire / dense.wire:.3f}",
            f"{amount.between / dense.between:.3f}",
        ]
        rows.append("| " + " | ".join([way.name, *cells]) + " |")
    return rows


def computed_step(ranks_per_node: int) -> Any:
    return lambda setup: step_traffic(setup, ranks_per_node).total()


def layouts_table() -> list[str]:
    """What other layouts of the paper's model cost."""
    rows = [
        "| layout | GPUs | a token on the wire | of it between nodes | a GPU and step | most of it |",
        "|---|---|---|---|---|---|",
    ]
    cases = [("expert or dense", laid(LLAMA_2_7B, dp)) for dp in (8, 16, 32, 64, 128)]
    cases += [("dense", laid(LLAMA_2_7B, 128 // tp, tp=tp)) for tp in (2, 8)]
    cases += [("MoE, top-2 of 4", laid(LLAMA_2_7B, 128, ep)) for ep in (2, 4)]
    gathered = replace(LLAMA_2_7B, moe=Moe(moe_token_dispatcher_type="allgather"))
    cases += [("MoE, allgather dispatcher", laid(gathered, 128, 4))]
    twice = replace(LLAMA_2_7B, layout=replace(DISTRIBUTED, overlap_param_gather=False))
    cases += [("MoE, overlap_param_gather off", laid(twice, 128, 4))]
    for name, setup in cases:
        traffic = step_traffic(setup, PAPER_NODE)
        total, ranks = traffic.total(), setup.layout.world_size
        largest = traffic.rows()[0]
        share = largest["wire"] / total.wire
        rows.append(
            f"| {name}: {setup.layout} | {ranks} | {readable(total.wire / setup.tokens)} | "
            f"{readable(total.between / setup.tokens)} | {readable(total.wire / ranks)} | "
            f"{largest['collective']} over {largest['group']}, {share:.0%} |"
        )
    return rows


def measure_setup(setup: Setup, folder: Path) -> list[dict[str, Any]]:
    """Totals of each of STEPS real steps, on as many gloo ranks as the setup's layout asks for."""
    out = folder / "steps.json"
    ranks = setup.layout.world_size
    number = [part[0] for way in HERE for part in way.parts].index(setup)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--standalone", "--local-addr", "127.0.0.1"]
    command += [__file__, "--worker", str(number), str(out)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # on gloo
    subprocess.run(command, check=True, env=os.environ | environment, stderr=subprocess.DEVNULL)
    steps: list[dict[str, Any]] = json.loads(out.read_text())
    return steps


def worker(setup: Setup, out: Path) -> None:
    """One rank: real steps on random tokens, each counted by itself."""
    import torch

    from btx_megatron.runtime import ranks
    from btx_megatron.runtime.comm_meter import CommMeter
    from btx_megatron.traffic import amounts

    with ranks.joined_ranks():
        ranks.set_layout(setup.layout, seed=1)
        from btx_megatron.training.trainer import Trainer

        training = Training(
            train_iters=100,
            micro_batch_size=setup.micro_batch_size,
            global_batch_size=setup.global_batch_size,
            lr_warmup_iters=0,
            bf16=setup.bf16,
        )
        trainer = Trainer(
            Recipe(model=setup.model, training=training, moe=setup.moe),
            Stage(training=training, layout=setup.layout),
            padded_vocab_size=setup.padded_vocab_size,
            num_experts=setup.num_experts,
        )
        steps, batches = [], random_batches(setup, torch.distributed.get_rank())
        for _ in range(STEPS):
            with CommMeter(HERE_NODE) as meter, meter.step():
                trainer.step(batches)
            steps.append(amounts(meter.over_ranks().total()))
        if torch.distributed.get_rank() == 0:
            out.write_text(json.dumps(steps))


def random_batches(setup: Setup, rank: int) -> Any:
    import torch

    shape = (setup.micro_batch_size, setup.model.seq_length)
    generator = torch.Generator().manual_seed(rank)
    step = 0
    while True:
        tokens = torch.randint(0, setup.padded_vocab_size, (shape[0], shape[1] + 1), generator=generator)
        yield {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape),
            "sample_index": torch.arange(shape[0]),
            "step": step,
        }
        step += 1


def measured_part() -> list[str]:
    """Tables of what was counted here, and how the formulas stand to it."""
    counted: list[tuple[Setup, list[dict[str, Any]]]] = []
    rows = [
        "| | ranks | handed in a step | formula | on the wire | formula | handed in, largest / smallest step"
        " | on the wire, likewise |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for way in (HERE[0], HERE[1], HERE[3]):
            setup = way.parts[0][0]
            counted.append((setup, measure_setup(setup, Path(folder))))
            rows.append(check_row(way.name, *counted[-1]))

    def step(setup: Setup) -> Amount:
        return mean_step(next(steps for known, steps in counted if known == setup))

    return [*table(HERE, step), "", *rows]


def mean_step(steps: list[dict[str, Any]]) -> Amount:
    fields = ("calls", "payload", "wire", "between")
    return Amount(*(round(sum(step[name] for step in steps) / len(steps)) for name in fields))


def check_row(name: str, setup: Setup, steps: list[dict[str, Any]]) -> str:
    computed, mean = step_traffic(setup, HERE_NODE).total(), mean_step(steps)
    spread = {
        what: max(step[what] for step in steps) / min(step[what] for step in steps)
        for what in ("payload", "wire")
    }
    if not math.isclose(computed.payload, mean.payload, rel_tol=0.01) or spread["payload"] > 1.001:
        sys.exit(f"{name}: the count and the formula are apart: {mean}, {computed}; spread {spread}")
    return (
        f"| {name} ({setup.layout}) | {setup.layout.world_size} | {mean.payload:,} | {computed.payload:,} | "
        f"{mean.wire:,} | {computed.wire:,} | {spread['payload']:.6f} | {spread['wire']:.4f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--computed", action="store_true", help="leave the measured part out")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        number, out = options.worker
        worker([part[0] for way in HERE for part in way.parts][int(number)], Path(out))
        return 0
    told = machine(ROOT, ROOT) | {"commit": commit(ROOT)}
    told["versions"] = versions(sys.executable, ["torch", "megatron-core"])
    print("\n".join(f"- {key}: {told[key]}" for key in ("date", "cpu", "cores", "commit", "versions")))
    if not options.computed:
        print("\n## Measured: a small model, 4 gloo ranks, nodes of 2\n")
        print("\n".join(measured_part()), flush=True)
    print("\n## Computed: Llama-2 7B, 128 GPUs, nodes of 8\n")
    print("\n".join(table(PAPER, computed_step(PAPER_NODE))))
    print("\n## Computed: other layouts\n")
    print("\n".join(layouts_table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
