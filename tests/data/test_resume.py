"""``prepare`` killed at every step that it reports, and begun again."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpora import json_lines, random_words, write_files

from btx_megatron.data import prepare as prepare_module
from btx_megatron.data.prepare import prepare
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import parse_recipe

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from test_resume import recipe_over
from btx_megatron.data.prepare import prepare
count = 0
def progress(phase, done, total):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    prepare(recipe_over(Path(sys.argv[1])), Path(sys.argv[2]), progress)
"""


def write_corpus(folder: Path) -> Path:
    """Two domains: text files, and JSON lines in two files."""
    write_files(folder / "plain", {f"{i}.txt": random_words(i, 60) for i in range(12)})
    lines = {f"{n}.jsonl": json_lines([random_words(100 * n + i, 60) for i in range(12)]) for n in (1, 2)}
    write_files(folder / "lines", lines)
    return folder


def recipe_over(corpus: Path, **data: Any) -> Recipe:
    sources = [{"name": name, "path": str(corpus / name)} for name in ("plain", "lines")]
    domains = [{"name": "one", "sources": sources}, {"name": "two", "sources": [sources[1]]}]
    settings = {"domains": domains, "num_workers": 1, "held_out_fraction": 0.2, **data}
    return parse_recipe({"data": settings, "tokenizer": {"vocab_size": 300}})


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_of(recipe: Recipe, folder: Path) -> list[tuple[str, int, int]]:
    told: list[tuple[str, int, int]] = []
    prepare(recipe, folder, lambda *step: told.append(step))
    return told


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a source was read, a tokenizer trained, a side tokenized."""
    counts = {"collect": 0, "train_tokenizer": 0, "tokenize": 0}
    for name in counts:
        monkeypatch.setattr(prepare_module, name, counted(getattr(prepare_module, name), name, counts))
    return counts


def counted(function: Callable[..., Any], name: str, counts: dict[str, int]) -> Callable[..., Any]:
    def counting(*arguments: Any) -> Any:
        counts[name] += 1
        return function(*arguments)

    return counting


def kill_at(corpus: Path, folder: Path, step: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", KILLED_AT, str(corpus), str(folder), str(step)]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == -signal.SIGKILL


def test_killed_at_any_step_the_bytes_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    steps = steps_of(recipe_over(corpus), tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert not any(name.startswith(".") for name in expected)
    for step in range(1, len(steps) + 1, max(1, len(steps) // 7)):
        folder = tmp_path / f"killed{step}"
        folder.mkdir()
        kill_at(corpus, folder, step)
        again = steps_of(recipe_over(corpus), folder)
        assert contents(folder) == expected, steps[step - 1]
        assert [s for s in again if s[1] == s[2]]  # the bar still ends complete


def test_killed_again_and_again_it_comes_to_its_end(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    prepare(recipe_over(corpus), tmp_path / "whole", lambda *step: None)
    (tmp_path / "data").mkdir()
    for step in (3, 9, 7, 11, 8):
        kill_at(corpus, tmp_path / "data", step)
    prepare(recipe_over(corpus), tmp_path / "data", lambda *step: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def stopped_after(phase: str, tokenized: int, recipe: Recipe, folder: Path) -> None:
    """Stop (as an exception, which leaves no more behind than a kill) after so many sides of a source."""
    done = 0

    def progress(now: str, at: int, total: int) -> None:
        nonlocal done
        done += now == phase
        if now == phase and done > tokenized:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, folder, progress)


def test_what_is_finished_is_not_done_again(tmp_path: Path, uncounted: dict[str, int]) -> None:
    corpus = write_corpus(tmp_path / "text")
    stopped_after("tokenize", 5, recipe_over(corpus), tmp_path / "data")
    assert uncounted == {"collect": 3, "train_tokenizer": 1, "tokenize": 3}
    prepare(recipe_over(corpus), tmp_path / "data", lambda *step: None)
    assert uncounted == {"collect": 3, "train_tokenizer": 1, "tokenize": 3 + 3}


def test_text_that_changed_in_between_is_read_and_tokenized_again(
    tmp_path: Path, uncounted: dict[str, int]
) -> None:
    corpus = write_corpus(tmp_path / "text")
    recipe = recipe_over(corpus)
    stopped_after("tokenize", 7, recipe, tmp_path / "data")
    (corpus / "plain" / "3.txt").write_text("entirely new")
    before = dict(uncounted)
    prepare(recipe, tmp_path / "data", lambda *step: None)
    assert uncounted["collect"] - before["collect"] == 1
    prepare(recipe, tmp_path / "whole", lambda *step: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_another_recipe_in_between_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    first, other = recipe_over(corpus), recipe_over(corpus, random_seed=7)
    other.data.domains[0].sources[0].name = "renamed"
    for recipe, after in [(first, 7), (other, 7), (first, 3), (other, 5)]:
        stopped_after("tokenize", after, recipe, tmp_path / "data")
    prepare(first, tmp_path / "data", lambda *step: None)
    prepare(first, tmp_path / "whole", lambda *step: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_tokenizer_that_was_taken_in_between_is_not_kept(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    first, other = recipe_over(corpus), recipe_over(corpus)
    smaller = recipe_over(corpus)
    smaller.tokenizer.vocab_size = 290
    prepare(smaller, tmp_path / "smaller", lambda *step: None)
    other.tokenizer.tokenizer_model = str(tmp_path / "smaller" / "tokenizer" / "tokenizer.model")
    for recipe in (first, other):
        stopped_after("tokenize", 2, recipe, tmp_path / "data")
    prepare(first, tmp_path / "data", lambda *step: None)
    prepare(first, tmp_path / "whole", lambda *step: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_records_that_are_broken_are_not_believed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text")
    prepare(recipe_over(corpus), tmp_path / "whole", lambda *step: None)
    stopped_after("tokenize", 5, recipe_over(corpus), tmp_path / "data")
    records = sorted(path for path in (tmp_path / "data" / ".resume").rglob("*") if path.is_file())
    assert len(records) >= 2 * 3 + 1 + 2
    for i, record in enumerate(records):
        record.write_bytes([b"", b"{}", b"junk"][i % 3])
    prepare(recipe_over(corpus), tmp_path / "data", lambda *step: None)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
