"""report.md: a result page that can be read years later. Dated, with the numbers, what made them and what
was not measured. Every sentence about a result is made from the numbers, whichever way they fall."""

from __future__ import annotations

import math
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from btx_megatron.estimate_flops import flops_text
from btx_megatron.evaluation.rows import MOE_ROWS, main_row
from btx_megatron.manifest import Manifest
from btx_megatron.methods import has_moe, training_stages
from btx_megatron.recipe import MATCHED_STAGES, Recipe

Losses = dict[str, dict[str, float]]

_NO_PADDING = "Counts are without vocabulary padding."
_TITLES = {
    "btx": "Branch-Train-MiX",
    "sparse_upcycling": "Sparse upcycling",
    "dense": "Dense training continued",
    "btm": "Branch-Train-Merge",
    "cbtm": "Cluster-Branch-Train-Merge",
    "timoe": "Time-aware mixture of experts",
}


def render_page(
    recipe: Recipe, summary: dict[str, Any], evaluation: dict[str, Any], manifests: dict[str, Manifest]
) -> str:
    """The whole page, in Markdown; pictures are named relative to it."""
    held_out = ", ".join(f"{name} {count:,}" for name, count in evaluation["held_out_tokens"].items())
    sections = [
        f"# {_TITLES[recipe.method]}: {recipe.name}",
        f"Run finished {manifests['evaluate'].created[:10]}, report written {datetime.now(UTC):%Y-%m-%d} "
        "(UTC). One run with one random seed: there are no error bars.",
        "## Held-out loss",
        f"Nats a token, every measured token counted once ({held_out}). `mean` is the plain mean over "
        "the domains; *training tokens* and *training FLOPs* are what was spent on the model beyond the seed "
        "(FLOPs: the model's matrix products, forward and backward, with the causal half of attention). The "
        "best of each column is bold.",
        loss_table(summary),
        f"How `{main_row(recipe)}` stands, on the mean:",
        verdict(summary, main_row(recipe)),
        *filter(None, [retention_text(summary["held_out_loss"], main_row(recipe))]),
        "![Training and held-out loss](losses.png)",
        *tasks_section(evaluation["tasks"]),
        *clusters_section(recipe, evaluation.get("clusters")),
        *routing_section(evaluation["routing"]),
        "## What was run",
        model_text(recipe, summary["parameters"]),
        stage_table(recipe, manifests),
        "Experts may train side by side, so the run can take less than the sum of its stages.",
        environment_text(manifests["evaluate"]),
        "## Not measured",
        f"Other random seeds{'' if evaluation['tasks'] else ', downstream tasks'}, and anything about larger "
        "models. The times are wall times of "
        "one run on a machine that may have had other work to do.",
        "## To reproduce",
        "The resolved recipe is `recipe.yaml` in the run folder, and `recipe` in each stage's "
        "`manifest.json`. With the code at the commit above:",
        "```\nbtx run recipe.yaml run_folder=runs/again\n```",
    ]
    return "\n\n".join(sections) + "\n"


def loss_table(summary: dict[str, Any]) -> str:
    """Rows and columns of ``held_out_loss``, with the tokens and FLOPs that each row took."""
    losses: Losses = summary["held_out_loss"]
    columns = list(next(iter(losses.values())))
    best = {column: min(row[column] for row in losses.values()) for column in columns}
    lines = []
    for row, values in losses.items():
        cells = [f"**{v:.3f}**" if v == best[column] else f"{v:.3f}" for column, v in values.items()]
        lines.append([f"`{row}`", *cells, f"{summary['tokens'][row]:,}", flops_text(summary["flops"][row])])
    return markdown_table(["model", *columns, "training tokens", "training FLOPs"], lines)


def tasks_section(tasks: dict[str, Any]) -> list[str]:
    """The harness's number of each task and row, with its standard error over documents."""
    if not tasks:
        return []
    first = next(iter(tasks.values()))
    lines = [[f"`{row}`", *(_task_cell(told) for told in its.values())] for row, its in tasks.items()]
    named = ", ".join(
        f"`{name}`: {told['metric'].partition(',')[0]}, {told['documents']} documents, "
        f"{told['num_fewshot']} examples shown"
        for name, told in first.items()
    )
    return [
        "## Tasks",
        f"By the lm-evaluation-harness, higher is better, +- the standard error over documents. {named}.",
        markdown_table(["model", *first], lines),
    ]


def _task_cell(told: dict[str, Any]) -> str:
    metric, _, filtered = told["metric"].partition(",")
    error = told["all"].get(f"{metric}_stderr,{filtered}")
    return f"{told['value']:.3f}" if error is None else f"{told['value']:.3f} +- {error:.3f}"


def verdict(summary: dict[str, Any], main: str = "btx") -> str:
    """One line for each other row: how much better or worse the method's is, as it fell."""
    losses = summary["held_out_loss"]
    lines = []
    for row, values in losses.items():
        if row == main:
            continue
        line = f"- {_compare(losses[main]['mean'], values['mean'], f'`{row}`')}"
        kind, _, domain = row.partition(":")
        if kind == "expert" and domain in values:
            line += f"; on its own domain, {_compare(losses[main][domain], values[domain], 'it')}"
        if row in MATCHED_STAGES:
            line += _cost(summary, row, main)
        lines.append(line + ".")
    return "\n".join(lines)


def _cost(summary: dict[str, Any], row: str, main: str) -> str:
    """What a baseline and the method took, and how many parameters a token of each uses."""
    tokens, flops, parameters = summary["tokens"], summary["flops"], summary["parameters"]
    start = "the seed trained on" if row == "dense" else "copies of the seed, trained"
    text = (
        f", {start} for {tokens[row]:,} tokens ({main} {tokens[main]:,}) and "
        f"{flops_text(flops[row])} FLOPs ({main} {flops_text(flops[main])})"
    )
    if row == "dense" and main in MOE_ROWS:
        text += (
            f"; a token uses {parameters['moe_active']:,} parameters of {main} and {parameters['dense']:,} "
            "of dense"
        )
    return text


def clusters_section(recipe: Recipe, clusters: dict[str, Any] | None) -> list[str]:
    """Heading and table of what c-BTM found; nothing of the other methods."""
    if not clusters:
        return []
    lines = [
        [
            name,
            " ".join(found["words"]),
            *(f"{found['documents_of'].get(domain, 0):,}" for domain in recipe.domain_names),
        ]
        for name, found in clusters.items()
    ]
    text = (
        "Found in the training documents without their domains; counted here are documents of "
        "each domain, and told the words that weigh most in a cluster's centre."
    )
    return ["## Clusters", text, markdown_table(["cluster", "words", *recipe.domain_names], lines, texts=2)]


def routing_section(routing: dict[str, Any] | None) -> list[str]:
    """Heading, text and picture; nothing of a method without a MoE."""
    if not routing:
        return []
    picture = "![Share of the routes by domain, layer and expert](routing.png)"
    return ["## Routing of the MoE", routing_text(routing), picture, routing_table(routing)]


def routing_table(routing: dict[str, Any]) -> str:
    """Layer by layer: experts a token, and how well its domain is told from them (``specialization``)."""
    told = ("active_experts", "mutual_information", "balanced_accuracy")
    layers = zip(*(routing[key] for key in told), strict=True)
    lines = [
        [str(layer), f"{active:.2f}", f"{information:.3f}", f"{accuracy:.0%}"]
        for layer, (active, information, accuracy) in enumerate(layers)
    ]
    domains = len(routing["domains"])
    text = (
        "How well a token's domain is told from the experts that it took: mutual information in nats (at "
        f"most {math.log(domains):.3f}), and the balanced accuracy of a guess ({1 / domains:.0%} by chance)."
    )
    head = ["layer", "experts a token", "mutual information", "guessed right"]
    return f"{markdown_table(head, lines)}\n\n{text}"


def retention_text(losses: Losses, main: str) -> str:
    """The method on each domain beside the domain's own expert; nothing where there are no experts."""
    domains = [row.partition(":")[2] for row in losses if row.startswith("expert:")]
    domains = [domain for domain in domains if domain in losses[main]]  # not c-BTM's clusters
    parts = [f"{name} {losses[main][name] - losses[f'expert:{name}'][name]:+.3f}" for name in domains]
    return f"Beside each domain's own expert, in nats a token: {', '.join(parts)}." if parts else ""


def routing_text(routing: dict[str, Any]) -> str:
    """Which expert each domain uses most, over all layers, and how that compares with an even share."""
    experts, parts = routing["experts"], []
    for domain, layers in zip(routing["domains"], routing["share"], strict=True):
        means = [sum(shares) / len(layers) for shares in zip(*layers, strict=True)]
        top = max(range(len(experts)), key=means.__getitem__)
        parts.append(f"{domain} goes most to the expert {experts[top]} ({means[top]:.0%})")
    even = f"Even would be {1 / len(experts):.0%}."
    return f"Share of the routes, mean over the layers: {'; '.join(parts)}. {even}"


def model_text(recipe: Recipe, parameters: dict[str, int]) -> str:
    """Shape and size of the models."""
    model = recipe.model
    text = (
        f"A Llama-shaped model: {model.num_layers} layers, hidden size {model.hidden_size}, feed-forward "
        f"{model.ffn_hidden_size}, {model.num_attention_heads} heads, sequence length {model.seq_length}; "
        f"{parameters['dense']:,} parameters. "
    )
    return text + (_moe_text(recipe, parameters) if has_moe(recipe) else "") + _NO_PADDING


def _moe_text(recipe: Recipe, parameters: dict[str, int]) -> str:
    moe, names = recipe.moe, recipe.expert_names
    width = recipe.expert_ffn_hidden_size
    cut = f", each with a feed-forward of {width}" if width != recipe.model.ffn_hidden_size else ""
    return (
        f"The MoE has {len(names)} experts ({', '.join(names)}){cut}, {moe.router_text(len(names))} routing, "
        f"balancing `{moe.moe_router_load_balancing_type}` with weight {moe.moe_aux_loss_coeff:g}; "
        f"{parameters['moe_total']:,} parameters, {parameters['moe_active']:,} of them active for a token. "
    )


def stage_table(recipe: Recipe, manifests: dict[str, Manifest]) -> str:
    """Tokens, layout and wall time of each stage."""
    trained = training_stages(recipe)
    lines = []
    for stage, manifest in manifests.items():
        layout = recipe.stage(stage).layout if stage in trained else None
        layout = recipe.evaluate.layout if stage == "evaluate" else layout
        tokens = f"{manifest.tokens:,}" if manifest.tokens else ""
        lines.append([stage, str(layout) if layout else "", tokens, f"{manifest.duration_seconds:.1f}"])
    return markdown_table(["stage", "layout", "training tokens", "seconds"], lines, texts=2)


def environment_text(manifest: Manifest) -> str:
    """Versions and commit of the evaluation, and the machine that writes the report."""
    made_with = versions_text(manifest.versions, manifest.code_commit)
    return f"{made_with} The report was written on {machine_text()}."


def versions_text(versions: dict[str, str], code_commit: str | None) -> str:
    """What a manifest says of the packages and the code that made a result."""
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = f"code at commit `{code_commit}`" if code_commit else "code outside git"
    return f"Versions: {told}; {commit}."


def machine_text() -> str:
    """Cores, processor and NVIDIA GPUs of this machine, as Linux tells them."""
    name = _first_value(Path("/proc/cpuinfo"), "model name") or platform.machine()
    devices = Path("/proc/driver/nvidia/gpus").glob("*/information")
    gpus = [_first_value(path, "Model") or "an NVIDIA GPU" for path in sorted(devices)]
    cores = len(os.sched_getaffinity(0))
    return ", ".join([f"{cores} core{'s' if cores > 1 else ''} of {name}", *gpus])


def _first_value(path: Path, key: str) -> str | None:
    """The first ``key : value`` of a /proc file."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def _compare(ours: float, theirs: float, other: str) -> str:
    if round(ours, 3) == round(theirs, 3):
        return f"equal to {other} (to three digits)"
    return f"{abs(ours - theirs):.3f} nats {'better' if ours < theirs else 'worse'} than {other}"


def markdown_table(head: list[str], lines: list[list[str]], texts: int = 1) -> str:
    """A Markdown table whose first ``texts`` columns are text and the others numbers."""
    aligned = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, aligned, *lines])
