"""A comparison's pictures, from compare.json: losses, quality against compute, and where the routers send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: it would look for a screen

from btx_megatron.evaluation.report import MEAN

_COLORS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")
_MARKERS = ("o", "s", "^", "D", "v")


def draw_all(results: dict[str, Any], out: Path) -> dict[str, str]:
    """Draw what there is to draw; returns the pictures' titles and their files in ``out``."""
    figures = {
        "Held-out loss by model and domain": ("losses.png", losses_figure(results)),
        "Mean loss against training compute": ("compute.png", compute_figure(results)),
    }
    routed = {name: told for name, told in results["variants"].items() if told["routing"][0]}
    if routed:
        figures["Share of the routes by domain, layer and expert"] = ("routing.png", routing_figure(routed))
    logged = {name: told for name, told in results["variants"].items() if any(told["load_by_step"])}
    if logged:
        figures["Expert load against the step"] = ("load.png", load_figure(logged))
    for file, figure in figures.values():
        figure.savefig(out / file, dpi=110)
    return {title: file for title, (file, _) in figures.items()}


def losses_figure(results: dict[str, Any]) -> Figure:
    """A panel for each domain and the mean; a dot with its spread for each row, the best dashed."""
    rows, columns = results["rows"], [*results["domains"], MEAN]
    figure = Figure(figsize=(2.2 + 2.8 * len(columns), 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column, color in zip(axes, columns, _cycle(len(columns)), strict=True):
        told = [row["held_out_loss"][column] for row in rows.values()]
        means = np.array([each["mean"] for each in told])
        spread = [_deviation(each) for each in told]
        axis.errorbar(means, range(len(rows)), xerr=spread, fmt="o", color=color, capsize=3)
        axis.axvline(means.min(), color="0.7", linewidth=1, linestyle="--")
        axis.set_title(column)
        axis.set_xlabel("nats a token")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    return figure


def compute_figure(results: dict[str, Any]) -> Figure:
    """Mean loss against training FLOPs beyond the seed, of every variant."""
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    axis = figure.subplots()
    variants = {name: row for name, row in results["rows"].items() if row["variant"] is not None}
    for number, (name, row) in enumerate(variants.items()):
        told, color = row["held_out_loss"][MEAN], _COLORS[number % len(_COLORS)]
        marker = _MARKERS[number // len(_COLORS) % len(_MARKERS)]
        axis.errorbar(
            row["flops"], told["mean"], _deviation(told), fmt=marker, color=color, capsize=3, label=name
        )
    axis.set_xlabel("training FLOPs beyond the seed")
    axis.set_ylabel("held-out loss, mean over domains (nats a token)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def routing_figure(variants: dict[str, Any]) -> Figure:
    """A row for each variant, a column for each domain: layers x experts, the mean over random seeds."""
    domains = next(iter(variants.values()))["routing"][0]["domains"]
    shape = (2.2 + 2.6 * len(domains), 0.6 + 2.2 * len(variants))
    figure = Figure(figsize=shape, layout="constrained")
    axes = figure.subplots(len(variants), len(domains), squeeze=False)
    for line, (name, told) in zip(axes, variants.items(), strict=True):
        share = np.mean(
            [routing["share"] for routing in told["routing"]], axis=0
        )  # [domains][layers][experts]
        experts = told["routing"][0]["experts"]
        for axis, domain, values in zip(line, domains, share, strict=True):
            image = axis.imshow(values * len(experts), cmap="viridis", vmin=0, vmax=3, aspect="auto")
            axis.set_xticks(range(len(experts)), experts, rotation=30, ha="right", fontsize=7)
            axis.set_yticks(range(0, len(values), max(1, len(values) // 4)))
            axis.set_title(f"{name}: {domain}", fontsize=9)
        line[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, pad=0.015, extend="max")
    bar.set_label("share of the routes, 1 is even")
    return figure


def load_figure(variants: dict[str, Any]) -> Figure:
    """Least and largest share of an expert, the mean over layers and random seeds, against the step."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for (name, told), color in zip(variants.items(), _cycle(len(variants)), strict=True):
        experts = len(told["routing"][0]["experts"])
        logs = told["load_by_step"]  # of a random seed each, which may have been logged at other steps
        steps = sorted(set.intersection(*({record["step"] for record in log} for log in logs)))
        for bound, style in (("min", "-"), ("max", ":")):
            values = [[np.mean(record[bound]) for record in log if record["step"] in steps] for log in logs]
            label = name if bound == "min" else None
            axis.plot(steps, np.mean(values, axis=0) * experts, color=color, linestyle=style, label=label)
    axis.axhline(1, color="0.7", linewidth=1)
    axis.set_xlabel("step of the last stage")
    axis.set_ylabel("share of the routes, 1 is even")
    axis.set_title("Least (solid) and most (dotted) used expert of a layer, mean over layers")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def _deviation(told: dict[str, Any]) -> float:
    return told["deviation"] or 0.0


def _cycle(count: int) -> list[str]:
    return [_COLORS[number % len(_COLORS)] for number in range(count)]
