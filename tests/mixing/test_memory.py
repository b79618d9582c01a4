"""What ``--dry-run`` and ``--max-memory`` say of memory is true of the whole process, at its peak."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from llamas import mix_arguments, write_llama

HERE = Path(__file__).parent
MB = 1 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three Llamas of 49 MB each; the embedding is 8 MB."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"layers": 6, "hidden": 512, "width": 1536, "vocabulary": 8192}
    return [write_llama(folder / name, seed, **sizes) for seed, name in enumerate("abc")]


def grown(models: list[Path], output: Path, *more: object) -> tuple[int, int]:
    """By how much the process grew, and what was announced."""
    arguments = [*mix_arguments(models, output, "--workers", 2)[1:], *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    worker = [sys.executable, str(HERE / "memory_worker.py"), *map(str, arguments)]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["grown"], found["announced"]


@pytest.mark.parametrize("to", ["hf", "megatron", "megatron-legacy"])
def test_a_mean(models: list[Path], tmp_path: Path, to: str) -> None:
    found, announced = grown(models, tmp_path / "out", "--to", to)
    assert found < announced < 96 * MB
    assert to == "megatron" or found < 32 * MB  # blocks are used again: 350 MB before they were


def test_a_mean_in_smaller_blocks(models: list[Path], tmp_path: Path) -> None:
    found, announced = grown(models, tmp_path / "out", "--max-memory", "68M")
    assert found < announced <= 68 * MB


@pytest.mark.parametrize("options", [["--average", "ties"], ["--average", "dare"], ["--drop-ratio", 0.5]])
def test_a_rule_that_needs_whole_parts(models: list[Path], tmp_path: Path, options: list[object]) -> None:
    base = ["--base", models[0]] if "--average" in options else []
    found, announced = grown(models, tmp_path / "out", *options, *base)
    assert announced / 4 < found < announced
    if options[-1] == "ties":
        less = announced * 3 // 4
        found, announced = grown(models, tmp_path / "less", *options, *base, "--max-memory", less)
        assert found < announced <= less


@pytest.mark.parametrize(
    "options",
    [
        ["--experts", "split", "--chunks", 4],
        ["--experts", "blend"],
        ["--experts", "virtual", "--chunks", 2, "--copies", 2],
        ["--average", "weighted", "--weight", "a=2"],
    ],
)
def test_other_rules(models: list[Path], tmp_path: Path, options: list[object]) -> None:
    found, announced = grown(models, tmp_path / "out", *options)
    assert found < announced
