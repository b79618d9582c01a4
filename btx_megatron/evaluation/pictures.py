"""The report's pictures: training and held-out loss side by side, and where the MoE sends each domain.

The training curves lie on one axis, the tokens spent so far by all models together: seed, then the experts
one after another, then the MoE stage. A baseline starts where the experts start, so it ends where the MoE
stage ends if it was given the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: it would look for a screen

Curve = list[tuple[int, float]]

_STAGE_COLORS = {
    "seed": "black",
    "finetune": "C3",
    "dense": "0.55",
    "sparse_upcycling_dm": "0.35",
    "sparse_upcycling_cm": "0.75",
}
_DOMAIN_COLORS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")  # red is the MoE's, grey the baselines'
_MAX_ANNOTATED_CELLS = 64  # numbers in a larger heat map could not be read


def draw_losses(curves: dict[str, Curve], held_out: dict[str, dict[str, float]], path: Path) -> None:
    """Training loss against tokens, one curve a stage; held-out loss by model and domain."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    domains = [name for name in next(iter(held_out.values())) if name != "mean"]
    experts = [stage.partition(":")[2] for stage in curves if stage.startswith("expert:")]
    colors = {name: _DOMAIN_COLORS[i % len(_DOMAIN_COLORS)] for i, name in enumerate(domains)}
    others = [name for name in experts if name not in colors]  # c-BTM's clusters are no domains
    of_experts = {name: _DOMAIN_COLORS[-1 - i % len(_DOMAIN_COLORS)] for i, name in enumerate(others)}
    _draw_curves(left, curves, colors | of_experts)
    _draw_held_out(right, held_out, colors)
    figure.savefig(path, dpi=120)


def draw_routing(routing: dict[str, Any], path: Path) -> None:
    """One heat map a domain: share of the routes of each layer (rows) that go to each expert (columns).

    ``routing["share"]`` is [domains][layers][experts]; all maps share one colour scale.
    """
    share = np.array(routing["share"])
    domains, layers, experts = share.shape
    width, height = 1.6 + domains * max(2.6, 0.75 * experts), 1.9 + max(2.0, 0.42 * layers)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, domains, squeeze=False)[0]
    for axis, name, values in zip(axes, routing["domains"], share, strict=True):
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=share.max(), aspect="auto")
        axis.set_title(f"text: {name}")
        axis.set_xticks(range(experts), routing["experts"], rotation=30, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(layers) if layers <= 16 else range(0, layers, 4))
        axis.set_xlabel("expert")
        if values.size <= _MAX_ANNOTATED_CELLS:
            _annotate(axis, values, share.max())
    axes[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, pad=0.015, format="{x:.0%}")
    bar.set_label("share of the layer's routes")
    bar.ax.axhline(1 / experts, color="white", linewidth=1.5)
    figure.suptitle(f"Routing of the MoE on held-out text (white line on the scale: even, {1 / experts:.0%})")
    figure.savefig(path, dpi=120)


def _draw_curves(axis: Axes, curves: dict[str, Curve], colors: dict[str, str]) -> None:
    starts = curve_starts(curves)
    for stage, curve in curves.items():
        tokens, losses = np.array(curve).T
        tokens = (tokens + starts[stage]) / 1e6
        domain = stage.partition(":")[2]
        color = colors[domain] if domain else _STAGE_COLORS[stage]
        label = {"finetune": "btx: the MoE stage", "seed": "seed"}.get(stage, stage)
        axis.plot(tokens, losses, color=color, linewidth=0.6, alpha=0.3)
        axis.plot(tokens, running_mean(losses), color=color, linewidth=1.8, label=label)
    axis.set_title("Training loss")
    axis.set_xlabel("training tokens spent so far, all models together (millions)")
    axis.set_ylabel("loss on the stage's own text (nats a token)")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_held_out(axis: Axes, held_out: dict[str, dict[str, float]], colors: dict[str, str]) -> None:
    """Bars from zero, so that their lengths can be compared; the differences are in the numbers."""
    rows, bars = list(held_out), {**colors, "mean": "0.25"}
    thickness = 0.84 / len(bars)
    largest = max(max(values.values()) for values in held_out.values())
    for index, (column, color) in enumerate(bars.items()):
        values = [held_out[row][column] for row in rows]
        places = np.arange(len(rows)) + (index - (len(bars) - 1) / 2) * thickness
        axis.barh(places, values, height=thickness, color=color, alpha=0.8, label=column)
        for place, value in zip(places, values, strict=True):
            weight = "bold" if value == min(values) else "normal"
            axis.text(value + 0.01 * largest, place, f"{value:.3f}", va="center", fontsize=8, weight=weight)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.set_xlim(0, largest * 1.12)
    axis.set_title("Held-out loss (bold: the best of a colour)")
    axis.set_xlabel("nats a token")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(bars), frameon=False)


def curve_starts(curves: dict[str, Curve]) -> dict[str, int]:
    """Tokens that all models before a stage have taken, as the module's docstring orders them.

    A seed or an expert that was imported has no curve.
    """
    starts, spent = {}, 0
    for stage in curves:
        if stage not in ("seed", "finetune") and not stage.startswith("expert:"):
            continue
        starts[stage] = spent
        spent += curves[stage][-1][0]
    after_seed = curves["seed"][-1][0] if "seed" in curves else 0
    return {stage: starts.get(stage, after_seed) for stage in curves}


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a thirtieth of the curve; at the start, over what there is."""
    window = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - window)
    return (sums[ends] - sums[begins]) / (ends - begins)


def _annotate(axis: Axes, values: np.ndarray, largest: float) -> None:
    for (layer, expert), value in np.ndenumerate(values):
        color = "white" if value < 0.6 * largest else "black"
        axis.text(expert, layer, f"{value:.0%}", ha="center", va="center", color=color, fontsize=9)
