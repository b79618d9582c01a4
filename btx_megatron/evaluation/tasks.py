"""Tasks in local files: JSON lines in the formats of known benchmarks, as tasks of the lm-evaluation-harness.

Prompts, answers' filters and metrics are the harness's own, read from the package; only the documents come
from elsewhere, so that nothing is fetched. Programs (HumanEval, MBPP) run in sandbox.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from btx_megatron.errors import UserError
from btx_megatron.evaluation.sandbox import passes, warn_where_open
from btx_megatron.recipe_tasks import TaskFile

Document = dict[str, Any]

_FEWSHOT_SEED = 1234  # the harness's


@dataclass(frozen=True)
class Format:
    """A benchmark's format."""

    of: str
    """The harness's task that it is."""
    needs: tuple[str, ...]
    """Keys of a document."""
    metric: str
    """What counts where one number is told; of [0, 1], more is better."""
    program: Callable[[Document, str], str] | None = None
    """Document and answer -> the program that must run to its end."""
    take: Callable[[Document], Document] | None = None
    """A document as the file has it -> as the harness's task reads it; None: the keys that it needs, which
    are texts. KeyError and the like: a bad one."""


def _humaneval_program(document: Document, answer: str) -> str:
    return f"{document['prompt']}{answer}\n{document['test']}\ncheck({document['entry_point']})\n"


def _mbpp_program(document: Document, answer: str) -> str:
    return "\n".join([document["test_setup_code"], answer, *document["test_list"], ""])


def _take_mbpp(document: Document) -> Document:
    tests = _texts(document["test_list"])
    if len(tests) < 3:
        raise ValueError("test_list has fewer than three tests, which the prompt shows")
    text = document.get("text") or document["prompt"]
    imports = document.get("test_imports") or []  # the sanitized form's name for what the tests need
    setup = "\n".join(_text(line) for line in [*imports, document.get("test_setup_code") or ""])
    return {
        "text": _text(text),
        "code": _text(document["code"]),
        "test_list": tests,
        "test_setup_code": setup.strip(),
    }


def _take_nq(document: Document) -> Document:
    answers = document["answer"]
    question = _text(document["question"]).strip().removesuffix("?")  # the prompt has one
    return {"question": question, "answer": _texts([answers] if isinstance(answers, str) else answers)}


def _take_choices(document: Document) -> Document:
    """ARC's way, or choices as a list with the right one's number."""
    choices = document["choices"]
    if isinstance(choices, list):
        labels = [str(number) for number in range(len(choices))]
        choices, answer = {"text": choices, "label": labels}, str(document["answer"])
    else:
        answer = document["answerKey"]
    texts, labels = _texts(choices["text"]), _texts(choices["label"])
    if answer not in labels or len(labels) != len(texts):
        raise ValueError(f"answer '{answer}' is none of the choices")
    if not all(text.strip() for text in texts):
        raise ValueError("a choice is empty")
    choices = {"text": texts, "label": labels}
    return {"question": _text(document["question"]), "choices": choices, "answerKey": answer}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or not values:
        raise TypeError(f"{values!r} is no list of texts")
    return [_text(value) for value in values]


FORMATS = {
    "gsm8k": Format("gsm8k/gsm8k", ("question", "answer"), "exact_match,strict-match"),
    "humaneval": Format(
        "humaneval/humaneval", ("prompt", "test", "entry_point"), "pass@1,none", _humaneval_program
    ),
    "mbpp": Format("mbpp/mbpp", ("code", "test_list"), "pass@1,none", _mbpp_program, _take_mbpp),
    "multiple_choice": Format("arc/arc_easy", ("question", "choices"), "acc,none", take=_take_choices),
    "nq": Format("nq_open/nq_open", ("question", "answer"), "exact_match,remove_whitespace", take=_take_nq),
}


def check_task(told: TaskFile, execute_code: bool) -> None:
    """Raise UserError for what make_task would refuse; nothing of the harness is imported."""
    _read_task(told, execute_code)


def check_documents(told: TaskFile, execute_code: bool) -> None:
    """As check_task, of the files alone: the harness need not be installed here."""
    _read_documents(told, execute_code)


def documents_hash(told: TaskFile) -> str:
    """SHA-256, in hex, over the files of a task. Raises UserError for one that cannot be read."""
    digest = hashlib.sha256()
    for file in filter(None, (told.path, told.fewshot_path)):
        digest.update(hashlib.sha256(_read(told, file)).digest())
    return digest.hexdigest()


def make_task(
    told: TaskFile, execute_code: bool = False, before_program: Callable[[], None] = lambda: None
) -> Any:
    """The harness's task of a file.

    ``before_program`` is called before each program that runs, which may take seconds. Raises UserError for
    a file that cannot be read or has a document of another format, few-shot examples that are too few, or
    programs where ``execute_code`` is false.
    """
    config, documents = _read_task(told, execute_code)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of documents that come from a function
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config |= {
        "task": told.name,
        "custom_dataset": lambda **_: {name: Dataset.from_list(its) for name, its in documents.items()},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "train" if "train" in documents else None,
    }
    if config["output_type"] == "generate_until":
        config["generation_kwargs"] |= {"max_gen_toks": told.max_new_tokens}
    program = FORMATS[told.format].program
    if program:
        warn_where_open()

        def judge(document: Document, results: list[str]) -> dict[str, float]:
            before_program()
            return {"pass@1": float(passes(program(document, results[0])))}

        config |= {
            "process_results": judge,
            "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        }
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(_FEWSHOT_SEED)
    return task


def _read_task(told: TaskFile, execute_code: bool) -> tuple[dict[str, Any], dict[str, list[Document]]]:
    """The harness's configuration, and documents by split."""
    documents = _read_documents(told, execute_code)
    config = _config(FORMATS[told.format].of)
    if told.num_fewshot is not None or not told.fewshot_path:
        config["num_fewshot"] = told.num_fewshot or 0
    shots, there = config.setdefault("num_fewshot", 0), len(documents.get("train", []))
    if there and not shots and told.num_fewshot is None:
        raise UserError(
            f"task '{told.name}': {told.format} shows no examples by itself; say num_fewshot, or leave the "
            "few-shot file out"
        )
    if shots > there:
        raise UserError(
            f"task '{told.name}': {shots} examples are to be shown, and there are {there}; give a few-shot "
            "file with more, or lower num_fewshot"
        )
    return config, documents


def _read_documents(told: TaskFile, execute_code: bool) -> dict[str, list[Document]]:
    """By split."""
    if FORMATS[told.format].program and not execute_code:
        raise UserError(
            f"task '{told.name}': {told.format} runs programs that the model wrote; say --execute-code "
            "(evaluate.execute_code=true) if they may run here"
        )
    documents = {"test": _documents(told, told.path)}
    if told.fewshot_path:  # MBPP's prompt asks whether a document is one of them
        documents["train"] = [{**its, "is_fewshot": True} for its in _documents(told, told.fewshot_path)]
    return documents


def _config(name: str) -> dict[str, Any]:
    """The harness's configuration of a task, without its documents and without Python of its own."""
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "tasks need the package lm-eval, which is not installed here; install the extra 'eval'"
        )

    class Loader(yaml.SafeLoader):
        """Leaves references to functions as they are."""

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    path = Path(found.submodule_search_locations[0]) / "tasks" / f"{name}.yaml"
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader)
    for key in ("dataset_path", "dataset_name", "tag", "unsafe_code"):
        config.pop(key, None)
    samples = config.pop("fewshot_config", None) or {}  # the benchmark's own examples: they come as a file
    if "sampler" in samples:
        config["fewshot_config"] = {"sampler": samples["sampler"]}
    if any("custom" in str(filters) for filters in config.get("filter_list", [])):
        del config["filter_list"]
    return config


def _documents(told: TaskFile, file: str) -> list[Document]:
    form, documents = FORMATS[told.format], []
    try:
        lines = _read(told, file).decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"task '{told.name}': {file} is no UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"task '{told.name}': {file}:{number}"
        try:
            document = json.loads(line)
        except ValueError:
            raise UserError(f"{where}: not JSON; a document of {told.format} is one line of it") from None
        missing = [key for key in form.needs if not isinstance(document, dict) or key not in document]
        if missing:
            raise UserError(f"{where}: no key '{missing[0]}'; {told.format} has {', '.join(form.needs)}")
        try:
            taken = form.take(document) if form.take else {key: _text(document[key]) for key in form.needs}
            documents.append(taken)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: not a document of {told.format} ({error})") from None
    if not documents:
        raise UserError(f"task '{told.name}': {file} has no document")
    return documents


def _read(told: TaskFile, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(
            f"task '{told.name}': {file} cannot be read ({error}); name a file of JSON lines"
        ) from None
