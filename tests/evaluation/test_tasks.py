"""Local files as the harness's tasks: what is asked, what counts as right, and what is refused."""

from __future__ import annotations

import json
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btx_megatron.errors import UserError
from btx_megatron.evaluation.ask import ask_tasks, told_tasks
from btx_megatron.evaluation.tasks import FORMATS, check_task, documents_hash, make_task
from btx_megatron.recipe_file import load_recipe
from btx_megatron.recipe_tasks import TaskFile

DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": "2 and 3?", "answer": "2 + 3 = 5\n#### 5"},
        {"question": "A thousand and one?", "answer": "#### 1,001"},
    ],
    "nq": [
        {"question": "who wrote it", "answer": ["Ada Lovelace", "Ada"]},
        {"question": "who read it?", "answer": "Charles"},
    ],
    "multiple_choice": [
        {"question": "Which?", "choices": ["this", "that one"], "answer": 1},
        {"question": "What?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    ],
    "humaneval": [
        {
            "task_id": "x/0",
            "prompt": "def add(a, b):\n",
            "entry_point": "add",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        },
        {
            "task_id": "x/1",
            "prompt": "def less(a, b):\n",
            "entry_point": "less",
            "test": "def check(candidate):\n    assert candidate(3, 2) == 1\n",
        },
    ],
    "mbpp": [
        {
            "text": "Add.",
            "code": "def add(a, b):\n    return a + b",
            "test_list": [f"assert add({n}, 1) == {n + 1}" for n in range(3)],
        },
        {
            "prompt": "Double.",
            "code": "def double(a):\n    return 2 * a",
            "test_list": [f"assert double({n}) == {2 * n}" for n in range(3)],
        },
    ],
}
PROMPTS = {
    "gsm8k": ["Question: 2 and 3?\nAnswer:", "Question: A thousand and one?\nAnswer:"],
    "nq": [
        "Answer these questions:\n\nQ: who wrote it?\nA:",
        "Answer these questions:\n\nQ: who read it?\nA:",
    ],
    "humaneval": ["def add(a, b):\n", "def less(a, b):\n"],
    "mbpp": [
        "You are an expert Python programmer, and here is your task: Add. "
        "Your code should pass these tests:\n\n"
        "assert add(0, 1) == 1\nassert add(1, 1) == 2\nassert add(2, 1) == 3\n[BEGIN]\n",
        "You are an expert Python programmer, and here is your task: Double. "
        "Your code should pass these tests:\n\n"
        "assert double(0) == 0\nassert double(1) == 2\nassert double(2) == 4\n[BEGIN]\n",
    ],
}
RIGHT = {
    "gsm8k": [" 2 and 3 are 5.\n#### 5", " #### 1001."],
    "nq": [" Ada", " charles"],
    "humaneval": ["    return a + b", "    return a - b"],
    "mbpp": ["def add(a, b):\n    return a + b\n", "double = lambda a: a * 2\n"],
}
WRONG = {
    "gsm8k": [" #### 6", " 1001"],
    "nq": [" Babbage", " Ada"],
    "humaneval": ["    return a", "    exit()"],
    "mbpp": ["", "def double(a):\n    return a\n"],
}


class Parrot:
    """A model of the harness that says what it was told to, in order, and likes some of the choices."""

    def __init__(self, answers: list[str], likes: frozenset[str] = frozenset()) -> None:
        self.answers, self.likes = answers, likes
        self.asked: list[tuple[Any, ...]] = []
        self.rank, self.world_size = 0, 1

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked += [request.args for request in requests]
        return self.answers[: len(requests)]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(-1.0 if continuation in self.likes else -9.0, False) for _, continuation in self.asked]


def scores_of(model: Parrot, task: TaskFile, execute_code: bool = False) -> dict[str, Any]:
    """The harness is imported here, not when tests are collected: it takes seconds."""
    from btx_megatron.evaluation.harness import task_scores

    scores: dict[str, Any] = task_scores(model, [task], execute_code)[task.name]
    return scores


def written(folder: Path, kind: str, documents: list[Any] | None = None, **more: Any) -> TaskFile:
    """A file of documents, as a task."""
    path = folder / f"{kind}.jsonl"
    lines = [json.dumps(document) for document in documents or DOCUMENTS[kind]]
    path.write_text("\n".join(lines) + "\n\n")
    return TaskFile(kind, kind, str(path), **more)  # type: ignore[arg-type]


def test_formats_are_what_a_recipe_may_say() -> None:
    assert set(FORMATS) == set(typing.get_args(typing.get_type_hints(TaskFile)["format"]))


@pytest.mark.parametrize("kind", RIGHT)
def test_answers_are_judged_as_the_benchmark_does(kind: str, tmp_path: Path) -> None:
    task = written(tmp_path, kind, max_new_tokens=17)
    for answers, score in ((RIGHT[kind], 1.0), (WRONG[kind], 0.0), ([RIGHT[kind][0], WRONG[kind][1]], 0.5)):
        parrot = Parrot(answers)
        told = scores_of(parrot, task, execute_code=True)
        assert (told["value"], told["documents"], told["num_fewshot"]) == (score, 2, 0)
        assert told["all"][told["metric"]] == score
    assert [context for context, _ in parrot.asked] == PROMPTS[kind]
    assert all(generation["max_gen_toks"] == 17 for _, generation in parrot.asked)
    assert not any(generation["do_sample"] for _, generation in parrot.asked)


def test_mbpp_shows_its_tests(tmp_path: Path) -> None:
    parrot = Parrot(RIGHT["mbpp"])
    scores_of(parrot, written(tmp_path, "mbpp"), execute_code=True)
    assert "here is your task: Double. Your code should pass these tests:" in parrot.asked[1][0]
    assert parrot.asked[1][0].endswith("assert double(2) == 4\n[BEGIN]\n")


@pytest.mark.parametrize(
    "more",
    [
        {"test_imports": ["import math"]},
        {"test_setup_code": "import math", "test_imports": []},
        {"test_imports": None, "test_setup_code": "import math"},
    ],
)
def test_mbpp_runs_what_its_tests_need(tmp_path: Path, more: dict[str, Any]) -> None:
    document = {
        "prompt": "A third.",
        "code": "def third(a):\n    return a / 3",
        "test_list": [f"assert math.isclose(third({n}), {n}/3)" for n in range(3)],
    }
    answers = [document["code"]]
    assert scores_of(Parrot(answers), written(tmp_path, "mbpp", [document | more]), True)["value"] == 1
    assert scores_of(Parrot(answers), written(tmp_path, "mbpp", [document]), True)["value"] == 0


def test_mbpp_shows_examples_with_their_programs(tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps(DOCUMENTS["mbpp"][0]))
    parrot = Parrot(RIGHT["mbpp"])
    told = scores_of(parrot, written(tmp_path, "mbpp", fewshot_path=str(examples), num_fewshot=1), True)
    assert told["value"] == 1
    shown = "[BEGIN]\ndef add(a, b):\n    return a + b\n[DONE]"
    assert [shown in prompt for prompt, _ in parrot.asked] == [True, True]
    assert parrot.asked[1][0].endswith("assert double(2) == 4\n[BEGIN]\n")


def test_mbpp_shows_its_examples_in_their_order(tmp_path: Path) -> None:
    """To every question: the benchmark's sampler takes the first ones."""
    examples = tmp_path / "examples.jsonl"
    first = DOCUMENTS["mbpp"][0]
    examples.write_text("\n".join(json.dumps(first | {"text": f"Example {n}."}) for n in range(3)))
    parrot = Parrot(RIGHT["mbpp"])
    scores_of(parrot, written(tmp_path, "mbpp", fewshot_path=str(examples), num_fewshot=3), True)
    for prompt, _ in parrot.asked:
        places = [prompt.index(f"Example {n}.") for n in range(3)]
        assert places == sorted(places)


def test_examples_that_nobody_would_see_are_refused(tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps(DOCUMENTS["nq"][0]))
    with pytest.raises(UserError, match="task 'nq': nq shows no examples by itself; say num_fewshot"):
        make_task(written(tmp_path, "nq", fewshot_path=str(examples)), False)


def test_answers_keep_the_space_that_a_tokenizer_drops(tmp_path: Path) -> None:
    """Llama's puts one before a text and takes one away: of a program's four spaces three would come back."""
    import sentencepiece

    from btx_megatron.data.tokenizer import Tokenizer
    from btx_megatron.evaluation.harness import ScoredModel, _Answer

    text = tmp_path / "text"
    text.write_text("def add(a, b):\n    return a + b\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "t"), vocab_size=300, byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "t.model")
    prompt, wanted = "def add(a, b):\n", "    return a + b"
    whole = tokenizer.encode([prompt + wanted])[0]
    assert tokenizer.decode(whole) == prompt + wanted
    for cut in range(1, len(whole)):
        before = tokenizer.decode(whole[:cut])
        answer = _Answer(whole[:cut], most=9, stops=[], tokens=whole[cut:])
        model = ScoredModel(lambda sequences: [], tokenizer, 64)
        assert before + model._text(answer) == prompt + wanted, cut


def test_what_waits_is_told_before_each_program(tmp_path: Path) -> None:
    parrot, told = Parrot(RIGHT["humaneval"]), []
    parrot.still_here = lambda: told.append(1)  # type: ignore[attr-defined]
    scores_of(parrot, written(tmp_path, "humaneval"), True)
    assert len(told) == 2


def test_choices(tmp_path: Path) -> None:
    task = written(tmp_path, "multiple_choice")
    for likes, score in (({" that one", " a"}, 1.0), ({" this", " a"}, 0.5), ({" this", " b"}, 0.0)):
        parrot = Parrot([], frozenset(likes))
        assert scores_of(parrot, task)["value"] == score
    assert parrot.asked[0] == ("Question: Which?\nAnswer:", " this")
    assert [continuation for _, continuation in parrot.asked] == [" this", " that one", " a", " b"]


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    """U+2028 and U+0085 end lines of text in Python's eyes, and may stand in a JSON string as they are."""
    task = written(tmp_path, "nq")
    Path(task.path).write_bytes('{"question": "who\u2028wrote\u0085it", "answer": "Ada"}\r\n'.encode())
    parrot = Parrot([" Ada"])
    assert scores_of(parrot, task)["documents"] == 1
    assert "who\u2028wrote\u0085it?" in parrot.asked[0][0]


def test_examples_are_shown_before_the_question(tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    lines = [json.dumps({"question": f"{n} and 1?", "answer": f"#### {n + 1}"}) for n in range(6)]
    examples.write_text("\n".join(lines))
    for number, expected in ((None, 5), (2, 2), (0, 0)):
        task = written(tmp_path, "gsm8k", fewshot_path=str(examples), num_fewshot=number)
        parrot = Parrot(RIGHT["gsm8k"])
        assert scores_of(parrot, task)["num_fewshot"] == expected
        prompt = parrot.asked[0][0]
        assert prompt.count("#### ") == expected
        assert prompt.endswith("Question: 2 and 3?\nAnswer:")


def test_the_first_documents_alone(tmp_path: Path) -> None:
    parrot = Parrot(RIGHT["gsm8k"])
    told = scores_of(parrot, written(tmp_path, "gsm8k", limit=1))
    assert told["documents"] == len(parrot.asked) == 1


def test_code_runs_if_it_may(tmp_path: Path) -> None:
    for kind in ("humaneval", "mbpp"):
        for check in (check_task, make_task):
            with pytest.raises(UserError, match=f"task '{kind}': {kind} runs programs that the model wrote"):
                check(written(tmp_path, kind), False)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("nq", "", "has no document"),
        ("nq", "{", ":1: not JSON; a document of nq is one line of it"),
        ("nq", "[]", ":1: no key 'question'; nq has question, answer"),
        ("nq", '\n{"question": "a"}', ":2: no key 'answer'; nq has question, answer"),
        ("nq", '{"question": 3, "answer": ["b"]}', ":1: not a document of nq (3 is no text)"),
        ("nq", '{"question": "a", "answer": []}', ":1: not a document of nq ([] is no list of texts)"),
        ("nq", '{"question": "a", "answer": null}', ":1: not a document of nq (None is no list of texts)"),
        ("gsm8k", '{"question": "a", "answer": 2}', ":1: not a document of gsm8k (2 is no text)"),
        (
            "humaneval",
            '{"prompt": 3, "test": "a", "entry_point": "b"}',
            "not a document of humaneval (3 is no",
        ),
        ("multiple_choice", '{"question": "a", "choices": ["", "b"], "answer": 1}', "a choice is empty"),
        ("multiple_choice", '{"question": "a", "choices": [1, "b"], "answer": 1}', "(1 is no text)"),
        (
            "multiple_choice",
            '{"question": "a", "choices": ["b", "c"], "answer": 1.7}',
            "answer '1.7' is none",
        ),
        ("multiple_choice", '{"question": "a", "choices": ["b"], "answer": 1}', "answer '1' is none of the"),
        ("multiple_choice", '{"question": "a", "choices": ["b"]}', ":1: not a document of multiple_choice"),
        ("mbpp", '{"code": "", "text": "a", "test_list": ["b"]}', "test_list has fewer than three tests"),
    ],
)
def test_a_file_that_is_something_else(kind: str, text: str, message: str, tmp_path: Path) -> None:
    task = written(tmp_path, kind)
    Path(task.path).write_text(text)
    with pytest.raises(UserError) as refused:
        check_task(task, execute_code=True)
    assert message in str(refused.value)
    assert f"task '{kind}': " in str(refused.value)


def test_files_and_examples_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.jsonl cannot be read .*; name a file of JSON lines"):
        check_task(TaskFile("a", "nq", str(tmp_path / "nowhere.jsonl")), False)
    task = written(tmp_path, "gsm8k", num_fewshot=3)
    with pytest.raises(UserError, match="3 examples are to be shown, and there are 0; give a few-shot file"):
        check_task(task, False)


def test_keys_that_nobody_needs_may_hold_anything(tmp_path: Path) -> None:
    documents = [{"question": "2 and 3?", "answer": "#### 5", "id": n} for n in (1, "x")]
    assert scores_of(Parrot(["#### 5"] * 2), written(tmp_path, "gsm8k", documents))["value"] == 1


def test_a_tasks_hash_is_of_its_files(tmp_path: Path) -> None:
    task = written(tmp_path, "gsm8k")
    first = documents_hash(task)
    shown = replace(task, fewshot_path=task.path)
    written(tmp_path, "gsm8k", DOCUMENTS["gsm8k"][:1])
    assert len({first, documents_hash(task), documents_hash(shown)}) == 3
    with pytest.raises(UserError, match="cannot be read"):
        documents_hash(replace(task, path="nowhere.jsonl"))


def test_a_command_lines_tasks() -> None:
    tasks = told_tasks(["gsm8k=a/b.jsonl", "nq=c.jsonl"], ["nq=d.jsonl"], 3, None, 8)
    assert [(task.name, task.format, task.path, task.fewshot_path, task.num_fewshot) for task in tasks] == [
        ("b", "gsm8k", "a/b.jsonl", None, None),
        ("c", "nq", "c.jsonl", "d.jsonl", 3),
    ]
    for numbers, message in (
        ((-1, None, 8), "--num-fewshot -1: must be at least 0"),
        ((None, 0, 8), "--limit 0: must be at least 1"),
        ((None, None, 0), "--max-new-tokens 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            told_tasks(["nq=c.jsonl"], [], *numbers)
    for given, fewshot, message in (
        (["mmlu=a.jsonl"], [], "--task mmlu=a.jsonl: write FORMAT=FILE; formats: gsm8k, "),
        (["nq"], [], "--task nq: write FORMAT=FILE"),
        (["nq=a/x.jsonl", "gsm8k=b/x.jsonl"], [], "another task is named 'x'"),
        (["nq=a.jsonl"], ["gsm8k=b.jsonl"], "--fewshot gsm8k=...: no --task of that format"),
        (["nq=a.jsonl"], ["nq=b.jsonl", "nq=c.jsonl"], "--fewshot nq=c.jsonl: nq has b.jsonl already"),
    ):
        with pytest.raises(UserError, match=message):
            told_tasks(given, fewshot, None, None, 8)
    with pytest.raises(UserError, match="no task; name one with --task FORMAT=FILE"):
        ask_tasks(Path("nowhere"), [])
    with pytest.raises(UserError, match="--through vllm: must be one of megatron, hf"):
        ask_tasks(Path("nowhere"), tasks, through="vllm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, r"evaluate.tasks\[0\].name '': every task needs a name of its own"),
        ({"path": ""}, r"evaluate.tasks\[0\].path: name a file of JSON lines"),
        ({"limit": 0}, r"evaluate.tasks\[0\].limit 0: must be at least 1"),
        ({"num_fewshot": -1}, r"evaluate.tasks\[0\].num_fewshot -1: must be at least 0"),
        ({"max_new_tokens": 0}, r"evaluate.tasks\[0\].max_new_tokens 0: must be at least 1"),
        ({"max_new_tokens": 256}, r"max_new_tokens 256 leaves no room for a question in the 256 tokens"),
        ({"format": "mmlu"}, r"key 'format': Invalid value 'mmlu', expected one of"),
    ],
)
def test_a_recipes_tasks(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
    told = {"name": "a", "format": "nq", "path": "a.jsonl", "max_new_tokens": 8}

    def override(values: dict[str, Any]) -> str:
        return f"evaluate.tasks=[{json.dumps(values)}]"

    loaded = load_recipe(recipe, [override(told)])
    assert loaded.evaluate.tasks[0].path == str(recipe.parent / "a.jsonl")  # beside the recipe
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, [override(told | changes)])
