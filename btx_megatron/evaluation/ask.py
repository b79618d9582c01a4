"""Tasks asked of one checkpoint of any format: ``btx tasks``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from btx_megatron.checkpoints.formats import config_of, open_checkpoint
from btx_megatron.checkpoints.stream import copy_plan
from btx_megatron.data.tokenizer import open_tokenizer
from btx_megatron.durable import write_durably
from btx_megatron.errors import UserError
from btx_megatron.evaluation.alone import EMBEDDING, loaded_model, need_megatron
from btx_megatron.evaluation.tasks import FORMATS, check_task
from btx_megatron.evaluation.text import tokenizer_file
from btx_megatron.recipe_tasks import TaskFile

Through = Literal["megatron", "hf"]


def ask_tasks(
    checkpoint: Path,
    tasks: list[TaskFile],
    *,
    execute_code: bool = False,
    through: str = "megatron",
    tokenizer: Path | None = None,
    seq_length: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Ask a checkpoint, print a table, and return what the harness says, written to ``out`` too.

    ``through``: ``megatron`` builds the model here, in fp32 on this process's device; ``hf`` asks
    transformers, of the folder itself or of an export of it into a temporary one. ``seq_length`` None: the
    checkpoint's. Raises UserError for what does not fit together.
    """
    if through not in get_args(Through):
        raise UserError(f"--through {through}: must be one of {', '.join(get_args(Through))}")
    if not tasks:
        raise UserError("no task; name one with --task FORMAT=FILE")
    for told in tasks:
        check_task(told, execute_code)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--json {out}: its folder is not there; make it first")
    asked = by_transformers if through == "hf" else by_megatron
    with asked(checkpoint, tokenizer, seq_length) as model:
        from btx_megatron.evaluation.harness import task_scores

        scores = task_scores(model, tasks, execute_code)
    for name, its in scores.items():
        print(f"{name}: {its['metric'].partition(',')[0]} {its['value']:.4f} ({its['documents']} documents)")
    if out is not None:
        write_durably(out, json.dumps(scores, indent=1) + "\n")
    return scores


def told_tasks(
    given: list[str],
    fewshot: list[str],
    num_fewshot: int | None,
    limit: int | None,
    max_new_tokens: int,
) -> list[TaskFile]:
    """``FORMAT=FILE`` of a command line, as tasks named by their files; ``fewshot`` in the same form."""
    examples: dict[str, str] = {}
    for text in fewshot:
        kind, file = _pair("--fewshot", text)
        if examples.setdefault(kind, file) != file:
            raise UserError(f"--fewshot {text}: {kind} has {examples[kind]} already; name one file")
    tasks: list[TaskFile] = []
    for text in given:
        kind, file = _pair("--task", text)
        name = Path(file).stem
        if any(task.name == name for task in tasks):
            raise UserError(f"--task {text}: another task is named '{name}', too; rename one of the files")
        shown = num_fewshot if kind in examples else None
        tasks.append(TaskFile(name, kind, file, examples.get(kind), shown, limit, max_new_tokens))  # type: ignore[arg-type]
    unused = set(examples) - {task.format for task in tasks}
    if unused:
        raise UserError(f"--fewshot {sorted(unused)[0]}=...: no --task of that format")
    for option, value, least in (
        ("--num-fewshot", num_fewshot, 0),
        ("--limit", limit, 1),
        ("--max-new-tokens", max_new_tokens, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} {value}: must be at least {least}")
    return tasks


def _pair(option: str, text: str) -> tuple[str, str]:
    kind, _, file = text.partition("=")
    if kind not in FORMATS or not file:
        raise UserError(f"{option} {text}: write FORMAT=FILE; formats: {', '.join(FORMATS)}")
    return kind, file


@contextmanager
def by_megatron(checkpoint: Path, tokenizer: Path | None, seq_length: int | None) -> Iterator[Any]:
    need_megatron("btx tasks --through megatron")
    source = open_checkpoint(checkpoint)
    config = config_of(source)
    opened = open_tokenizer(tokenizer_file(source.folder, tokenizer))
    rows = source.tensors[EMBEDDING].shape[0]
    if opened.vocab_size > rows:
        raise UserError(
            f"{opened.path}: {opened.vocab_size} tokens, the model has {rows}; name its --tokenizer"
        )
    length = seq_length or config.seq_length
    with loaded_model(copy_plan(source), config, length) as loaded:
        from btx_megatron.evaluation.harness import ScoredModel
        from btx_megatron.evaluation.scoring import Scorer

        scorer = Scorer(loaded.model, loaded.stage, opened.vocab_size)
        yield ScoredModel(scorer, opened, length)


@contextmanager
def by_transformers(checkpoint: Path, tokenizer: Path | None, seq_length: int | None) -> Iterator[Any]:
    import torch

    with _hf_folder(checkpoint) as folder:
        given = tokenizer_file(folder, tokenizer)
        if given.name != "tokenizer.json":
            raise UserError(f"{given}: transformers reads a tokenizer.json; name one with --tokenizer")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from lm_eval.models.huggingface import HFLM

        yield HFLM(
            pretrained=str(folder),
            tokenizer=str(given.parent),
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype="float32",
            batch_size=4,
            max_length=seq_length,
        )


@contextmanager
def _hf_folder(checkpoint: Path) -> Iterator[Path]:
    if (checkpoint / "config.json").exists():
        yield checkpoint
        return
    from btx_megatron.mixing.mix import Output, convert

    with tempfile.TemporaryDirectory() as folder:
        convert(checkpoint, Output(Path(folder) / "hf", "hf"))
        yield Path(folder) / "hf"
