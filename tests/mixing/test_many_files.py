"""Experts of more files than a process may open."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from llamas import hashes, mix_arguments, run_btx, write_llama

LIMIT = 64


def limited() -> None:
    """In the child, before it runs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, hard))


def test_eight_experts_of_twenty_files_under_a_limit_of_64(tmp_path: Path) -> None:
    models = [write_llama(tmp_path / f"e{number}", number, shards=20) for number in range(8)]
    assert sum(len(list(model.glob("*.safetensors"))) for model in models) == 160 > 2 * LIMIT
    for to in ("hf", "megatron-legacy"):
        more = ["--to", to, "--workers", 8]
        if to == "megatron-legacy":
            more += ["--target-expert-model-parallel-size", 8, "--target-tensor-model-parallel-size", 2]
        done = subprocess.run(
            [sys.executable, "-m", "btx_megatron", *map(str, mix_arguments(models, tmp_path / to, *more))],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=Path(__file__).parents[2],
            preexec_fn=limited,
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert run_btx(*mix_arguments(models, tmp_path / "free"))[0] == 0
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "free") == hashes(tmp_path / "megatron-legacy")
