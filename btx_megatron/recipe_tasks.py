"""The recipe's ``evaluate.tasks``: tasks in local files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from btx_megatron.recipe_numbers import at_least


@dataclass
class TaskFile:
    """A task that every model of the run is asked, with the lm-evaluation-harness (extra ``eval``)."""

    name: str = ""
    """In the tables."""
    format: Literal["gsm8k", "humaneval", "mbpp", "multiple_choice", "nq"] = "multiple_choice"
    """Of the documents, a line of JSON each: the benchmark's own keys. docs/tasks.md shows them."""
    path: str = ""
    """File of documents."""
    fewshot_path: str | None = None
    """File of documents that are shown, with their answers, before each question."""
    num_fewshot: int | None = None
    """How many of them. Null: as many as the benchmark shows, none without a file; where
    it shows none it must be said."""
    limit: int | None = None
    """Ask the first documents only."""
    max_new_tokens: int = 256
    """Of an answer that is generated."""


def task_problems(tasks: list[TaskFile], seq_length: int, time_mask: bool) -> Iterator[str]:
    """What cannot hold; that the files can be read is seen before a run begins.

    ``seq_length``: tokens that the models read at once.
    """
    names = [task.name for task in tasks]
    for number, task in enumerate(tasks):
        key = f"evaluate.tasks[{number}]"
        if not task.name or names.count(task.name) > 1:
            yield f"{key}.name '{task.name}': every task needs a name of its own"
        if not task.path:
            yield f"{key}.path: name a file of JSON lines"
        yield from at_least(key, task, 0, ("num_fewshot",))
        yield from at_least(key, task, 1, ("limit", "max_new_tokens"))
        if task.format != "multiple_choice" and task.max_new_tokens >= seq_length:
            yield (
                f"{key}.max_new_tokens {task.max_new_tokens} leaves no room for a question in the "
                f"{seq_length} tokens that the model reads at once (model.seq_length); lower it"
            )
    if tasks and time_mask:
        yield "evaluate.tasks: with moe.moe_router_time_mask a question needs a time, which tasks have not"
