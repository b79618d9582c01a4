"""What ``btx plan --simulate`` prints: both sides at several sizes of the cluster, with their spread."""

from __future__ import annotations

from collections.abc import Sequence

from btx_megatron.columns import columns
from btx_megatron.errors import UserError
from btx_megatron.recipe import Recipe
from btx_megatron.simulate.assumptions import Assumptions, parse_assumptions
from btx_megatron.simulate.jobs import btx_jobs, synchronous_job, whole_nodes
from btx_megatron.simulate.trials import Outcome, Spread, run_trials, spread

GPUS = (128, 1024, 8192, 65536)
SEEDS = 20
_HEAD = ["GPUs", "jobs", "wall, h", "goodput, %", "of reserved, %", "GPU-hours lost", "failures"]


def simulation_text(recipe: Recipe, gpus: Sequence[int], seeds: int | None, settings: list[str]) -> str:
    """The table.

    ``gpus``: sizes of the cluster, none for GPUS. ``seeds``: None for SEEDS. ``settings``: KEY=VALUE of
    Assumptions.

    Raises UserError for settings, sizes and recipes that cannot be simulated.
    """
    seeds = SEEDS if seeds is None else seeds
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be 1 or more")
    assumptions = parse_assumptions(settings)
    rows = [_HEAD]
    for count in gpus or GPUS:
        for name, outcomes in both_sides(recipe, assumptions, count, seeds).items():
            rows.append([f"{count:,}", name, *_cells(outcomes)])
    title = f"simulated with {seeds} seeds: median (5-95 %); {_assumptions_text(assumptions)}"
    return f"{title}\n{columns(rows, right=(0, 2, 3, 4, 5, 6))}\n{_NOTE}"


_NOTE = (
    "one run: the same tokens and FLOPs as one synchronous job on all GPUs. goodput: useful of the GPU-\n"
    "hours that jobs hold; of reserved: of all GPUs until the end. What this leaves out: docs/simulation.md"
)


def both_sides(recipe: Recipe, assumptions: Assumptions, gpus: int, seeds: int) -> dict[str, list[Outcome]]:
    """Outcomes of the recipe's jobs, and of one synchronous run of the same work."""
    nodes = whole_nodes(gpus, assumptions)
    jobs = btx_jobs(recipe, assumptions, gpus)
    one = [synchronous_job(jobs, assumptions, gpus)]
    return {
        recipe.method: run_trials(jobs, nodes, assumptions, seeds),
        "one run": run_trials(one, nodes, assumptions, seeds),
    }


def _cells(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        spread_text(spread([outcome.wall_hours for outcome in outcomes]), ",.3g"),
        spread_text(spread([100 * outcome.goodput for outcome in outcomes]), ".1f"),
        spread_text(spread([100 * outcome.goodput_of_reserved for outcome in outcomes]), ".1f"),
        spread_text(spread([outcome.lost for outcome in outcomes]), ",.0f"),
        spread_text(spread([outcome.failures for outcome in outcomes]), ".0f"),
    ]


def spread_text(spread: Spread, form: str) -> str:
    """``12.3 (11.9-14.0)``."""
    return f"{spread.median:{form}} ({spread.low:{form}}-{spread.high:{form}})"


def _assumptions_text(assumptions: Assumptions) -> str:
    interval = assumptions.checkpoint_interval_minutes
    checkpoints = "at Daly's optimum" if interval is None else f"every {interval:g} min"
    return (
        f"a GPU fails every {assumptions.gpu_mtbf_hours:,.0f} h, checkpoints {checkpoints}, "
        f"MFU {assumptions.mfu:.0%} of {assumptions.peak_tflops:g} TFLOP/s"
    )
