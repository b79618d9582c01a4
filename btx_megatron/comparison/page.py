"""report.md and report.html of a comparison: the same blocks, in Markdown and as one file for a browser.

Every sentence about a result is made from the numbers, whichever way they fell.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btx_megatron.comparison.pictures import draw_all
from btx_megatron.estimate_flops import flops_text
from btx_megatron.evaluation.page import markdown_table, versions_text
from btx_megatron.recipe_compare import LEAST_LOAD

if TYPE_CHECKING:
    from rich.table import Table as RichTable

REPORT = "report"


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `` `code` `` as in Markdown."""

    text: str


@dataclass(frozen=True)
class Table:
    """The first ``texts`` columns are text, the others numbers."""

    head: list[str]
    lines: list[list[str]]
    texts: int = 1


@dataclass(frozen=True)
class Picture:
    """A file beside the page."""

    title: str
    file: str


Block = Heading | Text | Table | Picture


def write_pages(results: dict[str, Any], out: Path) -> None:
    """Draw the pictures, and write both pages, into ``out``."""
    pictures = draw_all(results, out)
    blocks = list(page_blocks(results, pictures))
    (out / f"{REPORT}.md").write_text(markdown(results["name"], blocks), encoding="utf-8")
    (out / f"{REPORT}.html").write_text(one_html(results["name"], blocks, out), encoding="utf-8")


def page_blocks(results: dict[str, Any], pictures: dict[str, str]) -> Iterator[Block]:
    """The page, from compare.json alone."""
    seeds, first = results["random_seeds"], next(iter(results["variants"]))
    yield Text(_what_was_run(results))
    yield Heading("Held-out loss")
    yield Text(
        "Nats a token, every measured token counted once; `mean` is the plain mean over domains. Mean over "
        "the random seeds, +- their standard deviation. Tokens and FLOPs: of training beyond the seed, all "
        "stages that the model needs. Bold: the best of a column. Least load: share of the routes that the "
        "least used expert takes, 1 being an even one; of a layer: where it is least, by random seed."
    )
    yield losses_table(results, own=True)
    if any(row["variant"] is None for row in results["rows"].values()):
        yield Text("Other models that these runs measured:")
        yield losses_table(results, own=False)
    if any(row["tasks"] for row in results["rows"].values()):
        yield Heading("Tasks")
        yield Text("By the lm-evaluation-harness; higher is better. Ensembles are not asked.")
        yield tasks_table(results)
    for title, file in pictures.items():
        yield Picture(title, file)
    if results["differences"]:
        yield Heading(f"Differences from {first}")
        yield Text(
            "In the mean loss, taken within each random seed, which shares seed model, experts and order of "
            f"the data: mean, and Student's 95 % interval over {len(seeds)} of them. Above 0: worse."
        )
        yield differences_table(results)
    if results["predictions"]:
        yield Heading("Predictions")
        yield Text(
            "As the recipe has them. Seen: the whole 95 % interval of the difference (first row minus "
            "second) is where it is expected; not seen: all of it is elsewhere; else undecided."
        )
        yield predictions_table(results)
    yield Heading("How it was made")
    yield variants_table(results)
    yield Text(_made_with(results))


def _what_was_run(results: dict[str, Any]) -> str:
    count, seeds = len(results["variants"]), results["random_seeds"]
    matched = {"tokens": ", matched in tokens", "flops": ", matched in training FLOPs"}.get(
        results["match"] or "", ""
    )
    return (
        f"{count} variants{matched}, random seeds {', '.join(map(str, seeds))}; within each all start from "
        f"one seed model, and share what they have in common. Measured {_days(results)} (UTC)."
    )


def _days(results: dict[str, Any]) -> str:
    days = sorted({told["created"][:10] for told in results["made_with"]})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def losses_table(results: dict[str, Any], own: bool) -> Table:
    """The variants' own models, or the others."""
    rows = {name: row for name, row in results["rows"].items() if (row["variant"] is not None) == own}
    columns = list(next(iter(rows.values()))["held_out_loss"])
    best = {column: min(row["held_out_loss"][column]["mean"] for row in rows.values()) for column in columns}
    lines = []
    for name, row in rows.items():
        cells = []
        for column in columns:
            told = row["held_out_loss"][column]
            text = _with_deviation(told)
            cells.append(f"**{text}**" if told["mean"] == best[column] else text)
        load = []
        if own:
            load = [
                _with_deviation(row[LEAST_LOAD], 2) if row[LEAST_LOAD] else "",
                _least_of_a_layer(results, row),
            ]
        parameters = f"{row['active_parameters']:,}" if row["active_parameters"] else ""
        lines.append([f"`{name}`", *cells, *load, f"{row['tokens']:,}", flops_text(row["flops"]), parameters])
    load_head = ["least load", "of a layer"] if own else []
    return Table(["model", *columns, *load_head, "tokens", "FLOPs", "active parameters"], lines)


def _least_of_a_layer(results: dict[str, Any], row: dict[str, Any]) -> str:
    """Load of the least used expert of the layer where it is least, over domains; under each random seed."""
    if row[LEAST_LOAD] is None:
        return ""
    least = []
    for routing in results["variants"][row["variant"]]["routing"]:
        layers = zip(*routing["share"], strict=True)  # [domain][layer][expert]
        means = [[sum(its) / len(its) for its in zip(*domains, strict=True)] for domains in layers]
        least.append(min(len(layer) * min(layer) for layer in means))
    return ", ".join(f"{value:.2f}" for value in least)


def tasks_table(results: dict[str, Any]) -> Table:
    """Every model that was asked."""
    rows = {name: row["tasks"] for name, row in results["rows"].items() if row["tasks"]}
    tasks = list(next(iter(rows.values())))
    best = {task: max(row[task]["mean"] for row in rows.values()) for task in tasks}
    lines = []
    for name, row in rows.items():
        cells = [(_with_deviation(row[task]), row[task]["mean"] == best[task]) for task in tasks]
        lines.append([f"`{name}`", *(f"**{text}**" if is_best else text for text, is_best in cells)])
    return Table(["model", *tasks], lines)


def print_results(results: dict[str, Any]) -> None:
    """The variants' losses and budgets, and how the predictions fell, in a terminal."""
    from rich.console import Console

    console = Console()
    losses = losses_table(results, own=True)
    # terminals are narrow, and the page has the rest
    shown = [
        number for number, head in enumerate(losses.head) if head not in ("of a layer", "active parameters")
    ]
    head, *lines = ([line[number] for number in shown] for line in (losses.head, *losses.lines))
    console.print(_for_terminal(Table(head, lines)))
    if results["predictions"]:
        console.print(_for_terminal(predictions_table(results)))


def _for_terminal(table: Table) -> RichTable:
    from rich.markup import escape
    from rich.table import Table as RichTable

    shown = RichTable()
    lines = [[escape(cell.replace("`", "")) for cell in line] for line in table.lines]
    for number, title in enumerate(table.head):
        is_name = number == 0 and table.texts == 1
        width = max(len(line[0]) for line in lines) if is_name else None
        shown.add_column(title, justify="left" if number < table.texts else "right", min_width=width)
    for line in lines:
        shown.add_row(*(_BOLD.sub(r"[bold green]\1[/]", cell) for cell in line))
    return shown


_BOLD = re.compile(r"\*\*(.+?)\*\*")


def differences_table(results: dict[str, Any]) -> Table:
    """Every variant but the first."""
    lines = []
    for name, told in results["differences"].items():
        each = ", ".join(f"{value:+.4f}" for value in told["values"])
        lines.append([f"`{name}`", f"{told['mean']:+.4f}", _interval(told), each])
    return Table(["variant", "mean", "95 % interval", "each random seed"], lines)


def predictions_table(results: dict[str, Any]) -> Table:
    """A line for each, as it fell."""
    lines = []
    for told in results["predictions"]:
        first, second = told["rows"]
        sign = {"lower": "<", "higher": ">", "equal": f"= (within {told['within']:g})"}[told["expect"]]
        difference = f"{told['difference']['mean']:+.4f} {_interval(told | told['difference'])}"
        test = f"`{first}` {sign} `{second}`, {told['measure']}"
        lines.append([told["claim"], test, f"**{told['verdict']}**", difference])
    return Table(["claim", "test", "verdict", "difference"], lines, texts=3)


def variants_table(results: dict[str, Any]) -> Table:
    """Overrides and steps of each variant, and the wall time of its own stages."""
    lines = []
    for name, told in results["variants"].items():
        overrides = " ".join(f"`{override}`" for override in told["overrides"]) or "(the recipe)"
        steps = f"{told['train_iters']:,}" if told["train_iters"] else ""
        seconds = (
            [stages[told["last_stage"]] for stages in told["stage_seconds"]] if told["last_stage"] else []
        )
        time = f"{sum(seconds) / len(seconds):.0f}" if seconds else ""
        lines.append([f"`{name}`", overrides, told["last_stage"] or "", steps, time])
    return Table(["variant", "overrides", "last stage", "its steps", "its seconds"], lines, texts=3)


def _made_with(results: dict[str, Any]) -> str:
    made_with: dict[str, list[int]] = {}
    for seed, told in zip(results["random_seeds"], results["made_with"], strict=True):
        text = f"{versions_text(told['versions'], told['code_commit'])} On {told['machine']}."
        made_with.setdefault(text, []).append(seed)
    texts = [
        text if len(made_with) == 1 else f"Random seeds {', '.join(map(str, seeds))}: {text}"
        for text, seeds in made_with.items()
    ]
    return (
        f"{' '.join(texts)} Each run's folder has its resolved recipe; times are wall times of a machine "
        "that may have had other work to do."
    )


def _with_deviation(told: dict[str, Any], digits: int = 3) -> str:
    text = f"{told['mean']:.{digits}f}"
    return text if told["deviation"] is None else f"{text} +- {told['deviation']:.{digits}f}"


def _interval(told: dict[str, Any]) -> str:
    if told["half_width"] is None:
        return "(one random seed)"
    low, high = told["mean"] - told["half_width"], told["mean"] + told["half_width"]
    return f"[{low:+.4f}, {high:+.4f}]"


def markdown(title: str, blocks: list[Block]) -> str:
    """The page in Markdown; pictures are named relative to it."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Picture):
            parts.append(f"![{block.title}]({block.file})")
        else:
            parts.append(markdown_table(block.head, block.lines, block.texts))
    return "\n\n".join(parts) + "\n"


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}td,th{padding:.3rem .6rem;text-align:left;
border-bottom:1px solid #ddd}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}
code{background:#f3f3f3;padding:0 .2rem}"""


def one_html(title: str, blocks: list[Block], folder: Path) -> str:
    """The page as one file: pictures of ``folder`` are inside."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h2>{html.escape(block.text)}</h2>")
        elif isinstance(block, Text):
            parts.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Picture):
            data = base64.b64encode((folder / block.file).read_bytes()).decode()
            parts.append(f'<p><img alt="{html.escape(block.title)}" src="data:image/png;base64,{data}"></p>')
        else:
            parts.append(_html_table(block))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"


def _html_table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        numbers = [""] * table.texts + [' class="n"'] * (len(cells) - table.texts)
        return "".join(f"<{tag}{c}>{_inline(x)}</{tag}>" for x, c in zip(cells, numbers, strict=True))

    rows = [row(table.head, "th"), *(row(line, "td") for line in table.lines)]
    return "<table>" + "".join(f"<tr>{cells}</tr>" for cells in rows) + "</table>"


def _inline(text: str) -> str:
    """`` `code` `` and ``**bold**``, which may hold code."""
    parts = html.escape(text).split("`")
    text = "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
    parts = text.split("**")
    return "".join(f"<b>{part}</b>" if number % 2 else part for number, part in enumerate(parts))
