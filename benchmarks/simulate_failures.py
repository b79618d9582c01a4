"""What failing nodes cost: Branch-Train-MiX against one synchronous run, from 128 to 65,536 GPUs.

    python benchmarks/simulate_failures.py [--seeds 20] [--picture docs/images/simulation.png]

Prints the tables of docs/simulation.md (Markdown), and draws its picture. Nothing is measured: all of it
follows from btx_megatron/simulate/assumptions.py and the seeds, so that every machine prints the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

from btx_megatron.estimate import recipe_parameter_counts
from btx_megatron.recipe import Data, Domain, Model, Recipe, Stage, Stages, Tokenizer, Training
from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.checkpointing import expected_time
from btx_megatron.simulate.jobs import btx_jobs, make_job, synchronous_job
from btx_megatron.simulate.table import spread_text
from btx_megatron.simulate.trials import Outcome, run_trials, spread

GPUS = (128, 1024, 8192, 65536)
EXPERTS = (1, 4, 16, 64, 256)
BYTES = 16  # a parameter: weight and gradient in bf16, master weight and two moments in fp32
BATCH = 1024  # sequences a step: 4M tokens
MOE_SHARE = 80 / 533
"""Of all tokens: the paper's 80B in the MoE stage after 453B in its experts."""


@dataclass(frozen=True, eq=False)
class SetUp:
    """A model and its tokens, experts and MoE stage together."""

    name: str
    model: Model
    vocab_size: int
    tokens: float

    def recipe(self, experts: int) -> Recipe:
        """So many experts that share the tokens evenly."""
        names = [f"domain{number}" for number in range(experts)]
        stage = self._stage((1 - MOE_SHARE) * self.tokens / experts)
        return Recipe(
            data=Data(domains=[Domain(name=name) for name in names]),
            tokenizer=Tokenizer(vocab_size=self.vocab_size),
            model=self.model,
            stages=Stages(experts=dict.fromkeys(names, stage), finetune=self._stage(MOE_SHARE * self.tokens)),
        )

    def fits(self, experts: int, gpus: int) -> bool:
        """Whether weights, gradients and optimizer of every job, cut over all its GPUs, fit in 80 GB each.

        The one run is taken for a dense model. Activations take more.
        """
        counts = recipe_parameter_counts(self.recipe(experts or 1))
        dense = counts.dense * BYTES / max(8, gpus / max(1, experts))
        moe = counts.moe_total * BYTES / gpus if experts else 0.0
        return max(dense, moe) < 80e9

    def _stage(self, tokens: float) -> Stage:
        steps = round(tokens / (BATCH * self.model.seq_length))
        return Stage(training=Training(train_iters=steps, global_batch_size=BATCH))


LLAMA_7B = Model(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, seq_length=4096
)
LLAMA_70B = Model(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    seq_length=4096,
)
SET_UPS = (
    SetUp("7B, 533B tokens", LLAMA_7B, 32_000, 533e9),
    SetUp("70B, 15T tokens", LLAMA_70B, 128_256, 15e12),
)
VARIANTS: dict[str, dict[str, float | int]] = {
    "as assumed": {},
    "no slow nodes": {"slow_node_share": 0.0},
    "nothing fails": {"gpu_mtbf_hours": float("inf")},
    "neither": {"gpu_mtbf_hours": float("inf"), "slow_node_share": 0.0},
    "failures 4 x as often": {"gpu_mtbf_hours": 50_700 / 4},
    "failures 4 x as rare": {"gpu_mtbf_hours": 50_700 * 4},
    "checkpoint 3 s": {"checkpoint_seconds": 3.0},
    "checkpoint 5 min": {"checkpoint_seconds": 300.0},
    "restart 20 min": {"restart_minutes": 20.0},
    "queue 2 h": {"queue_minutes": 120.0},
    "no spare nodes, repair 24 h": {"spare_nodes": 0},
    "32 spare nodes, repair 24 h": {"spare_nodes": 32},
    "mix at 20 GB/s": {"mix_gigabytes_per_second": 20.0},
    "best case for one run": {"slow_node_share": 0.0, "restart_minutes": 1.0, "checkpoint_seconds": 3.0},
}


@cache
def outcomes(set_up: SetUp, experts: int, gpus: int, seeds: int, variant: str) -> list[Outcome]:
    """With each seed; 0 experts: the one synchronous run."""
    assumptions = replace(Assumptions(), **VARIANTS[variant])
    jobs = btx_jobs(set_up.recipe(experts or 4), assumptions, gpus)
    if not experts:
        jobs = [synchronous_job(jobs, assumptions, gpus)]
    return run_trials(jobs, gpus // assumptions.gpus_per_node, assumptions, seeds)


def of(found: Sequence[Outcome], name: str, form: str, factor: float = 1.0) -> str:
    """``median (5 %-95 %)`` of one figure."""
    return spread_text(spread([factor * getattr(outcome, name) for outcome in found]), form)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sizes_table(set_up: SetUp, seeds: int) -> str:
    """Every size of the cluster, the one run and every number of experts."""
    head = [
        "GPUs",
        "experts",
        "wall, h",
        "x one run",
        "goodput, %",
        "of reserved, %",
        "GPU-hours lost",
        "failures",
    ]
    rows = []
    for gpus in GPUS:
        one = outcomes(set_up, 0, gpus, seeds, "as assumed")
        for experts in (0, *EXPERTS):
            found = outcomes(set_up, experts, gpus, seeds, "as assumed")
            cells = [
                of(found, "wall_hours", ",.3g" if found[0].wall_hours < 1000 else ",.0f"),
                f"{ratio(found, one):.2f}",
                of(found, "goodput", ".1f", 100),
                of(found, "goodput_of_reserved", ".1f", 100),
                of(found, "lost", ",.0f"),
                of(found, "failures", ".0f"),
            ]
            mark = "" if set_up.fits(experts, gpus) else "*"
            rows.append([f"{gpus:,}", f"{experts or 'one run'}{mark}", *cells])
    return markdown(head, rows)


def ratio(found: Sequence[Outcome], one: Sequence[Outcome]) -> float:
    """Median wall time over that of the one run."""
    return (
        spread([outcome.wall_hours for outcome in found]).median / spread([o.wall_hours for o in one]).median
    )


def variants_table(set_up: SetUp, gpus: int, experts: int, seeds: int) -> str:
    """One assumption changed at a time."""
    head = [
        "assumption",
        "one run: goodput, %",
        "BTX: goodput, %",
        "BTX: of reserved, %",
        "BTX wall x one run",
    ]
    rows = []
    for variant in VARIANTS:
        one = outcomes(set_up, 0, gpus, seeds, variant)
        btx = outcomes(set_up, experts, gpus, seeds, variant)
        goodputs = [of(one, "goodput", ".1f", 100), of(btx, "goodput", ".1f", 100)]
        reserved = of(btx, "goodput_of_reserved", ".1f", 100)
        rows.append([variant, *goodputs, reserved, f"{ratio(btx, one):.2f}"])
    return markdown(head, rows)


def spent_table(set_up: SetUp, cases: Sequence[tuple[int, int]], seeds: int) -> str:
    """What the reserved GPU-hours went to, mean over the seeds, in percent."""
    head = ["GPUs", "experts", "useful", "checkpoints", "work lost", "down", "slow nodes", "nothing to do"]
    rows = []
    for gpus, experts in cases:
        for count in (0, experts):
            found = outcomes(set_up, count, gpus, seeds, "as assumed")
            shares = [
                [
                    o.useful,
                    o.spent.checkpoints,
                    o.spent.lost,
                    o.spent.down,
                    o.spent.slow,
                    o.reserved - o.allocated,
                ]
                for o in found
            ]
            reserved = fmean(o.reserved for o in found)
            cells = [f"{100 * fmean(column) / reserved:.1f}" for column in zip(*shares, strict=True)]
            rows.append([f"{gpus:,}", str(count or "one run"), *cells])
    return markdown(head, rows)


def check_table(set_up: SetUp, seeds: int) -> str:
    """Simulated mean wall time of the one run against the closed form, without slow nodes."""
    rows = []
    for gpus in GPUS:
        assumptions = Assumptions(slow_node_share=0.0)
        job = synchronous_job(btx_jobs(set_up.recipe(4), assumptions, gpus), assumptions, gpus)
        found = run_trials([job], job.nodes, assumptions, seeds)
        start = assumptions.queue_hours + assumptions.restart_hours
        times = (assumptions.checkpoint_hours, assumptions.restart_hours, assumptions.queue_hours)
        closed = start + expected_time(
            job.hours, job.segments, *times, mtbf=assumptions.mtbf_hours(job.nodes)
        )
        mean = fmean(outcome.wall_hours for outcome in found)
        interval = 60 * job.hours / job.segments
        cells = [f"{60 * assumptions.mtbf_hours(job.nodes):,.0f}", f"{interval:.1f}"]
        rows.append(
            [f"{gpus:,}", *cells, f"{closed:,.1f}", f"{mean:,.1f}", f"{100 * (mean / closed - 1):+.1f}"]
        )
    head = ["GPUs", "min between failures", "min between checkpoints", "closed form, h", "simulated, h", "%"]
    return markdown(head, rows)


def llama_3_line(seeds: int) -> str:
    """The set-up that the rate of failures comes from: 16,384 GPUs for 54 days."""
    assumptions = Assumptions(slow_node_share=0.0)
    job = make_job("llama", (), 16_384 // 8, 0.9 * 54 * 24, assumptions)
    found = run_trials([job], job.nodes, assumptions, seeds)
    failures = of(found, "failures", ".0f")
    return f"16,384 GPUs, 54 days: goodput {of(found, 'goodput', '.1f', 100)} %, failures {failures}"


def draw(set_up: SetUp, seeds: int, path: Path) -> None:
    """Goodput of what jobs hold, and wall time over that of one run, by GPUs; bands are 5-95 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels = ((left, "goodput"), (middle, "goodput_of_reserved"))
    for experts in (0, *EXPERTS):
        color = "black" if not experts else f"C{EXPERTS.index(experts)}"
        label = "one synchronous run" if not experts else f"BTX, {experts} expert{'s'[: experts > 1]}"
        found = [outcomes(set_up, experts, gpus, seeds, "as assumed") for gpus in GPUS]
        one = [
            spread([o.wall_hours for o in outcomes(set_up, 0, g, seeds, "as assumed")]).median for g in GPUS
        ]
        for axis, name in panels:
            bands = [spread([100 * getattr(outcome, name) for outcome in row]) for row in found]
            draw_band(axis, bands, color, label)
        walls = [spread([o.wall_hours / m for o in row]) for row, m in zip(found, one, strict=True)]
        draw_band(right, walls, color, label)
    titles = {left: "useful of allocated, %", middle: "useful of reserved, %", right: "wall time / one run's"}
    for axis, title in titles.items():
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
    right.set_ylim(0.8, 1.1)
    left.legend(fontsize=7)
    figure.suptitle(set_up.name)
    figure.savefig(path, dpi=80)


def draw_band(axis, bands, color: str, label: str) -> None:  # type: ignore[no-untyped-def]
    """Medians as a line, 5-95 % as a band."""
    axis.plot(GPUS, [band.median for band in bands], color=color, marker="o", markersize=3, label=label)
    axis.fill_between(GPUS, [b.low for b in bands], [b.high for b in bands], color=color, alpha=0.15)


def report(seeds: int) -> Iterator[str]:
    """The page's tables."""
    for set_up in SET_UPS:
        yield f"### {set_up.name}\n\n{sizes_table(set_up, seeds)}"
    big = SET_UPS[1]
    cases = ((1024, 4), (8192, 16), (65536, 64))
    yield f"### Where the GPU-hours go, {big.name}\n\n{spent_table(big, cases, seeds)}"
    for gpus, experts in cases:
        table = variants_table(big, gpus, experts, seeds)
        yield f"### {big.name}, {gpus:,} GPUs, {experts} experts\n\n{table}"
    yield f"### Check\n\n{check_table(big, 10 * seeds)}\n\n{llama_3_line(seeds)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--picture", type=Path, help="where the picture of the larger set-up goes (PNG)")
    options = parser.parse_args()
    for text in report(options.seeds):
        print(text, end="\n\n")
    if options.picture:
        draw(SET_UPS[1], options.seeds, options.picture)


if __name__ == "__main__":
    main()
