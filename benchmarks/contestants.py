"""Who is measured: our mix, a plain copy, and the peers that the user has.

They do not do the same work. `copy` only reads all input bytes and writes as many as a mixture has, in
blocks of 8 MB, in one thread ("threaded": one a core, 4 at most); btx averages the shared weights in fp32 and
hashes; mergekit-moe takes the shared weights of its first model; "linear, then moe" averages first, as the
method asks for; mixturekit averages in bf16 and writes no router. Peers run with their defaults.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models

ROOT = Path(__file__).resolve().parents[1]
MOST_THREADS = 4
Command = list[str]
Commands = Callable[[list[Path], Path], list[Command]]
"""Of the models and an empty folder to work in; the result is its subfolder `out`."""


@dataclass(frozen=True)
class Contestant:
    """A way to make one mixture out of many models."""

    name: str
    commands: Commands


def copy(threads: int) -> Commands:
    def commands(experts: list[Path], work: Path) -> list[Command]:
        command = [sys.executable, str(ROOT / "benchmarks" / "copy_bytes.py"), str(work / "out")]
        command += [str(models.mixture_bytes(experts)), str(threads)]
        return [command + [str(file) for file in models.weight_files(experts)]]

    return commands


def btx(workers: int | None) -> Commands:
    def commands(experts: list[Path], work: Path) -> list[Command]:
        command = [sys.executable, "-m", "btx_megatron", "mix"]
        for path in experts:
            command += ["--expert", f"{path.name}={path}"]
        command += ["--output", str(work / "out"), "--to", "hf", "--router-topk", "2"]
        return [command + (["--workers", str(workers)] if workers else [])]

    return commands


def write_config(path: Path, config: dict[str, Any]) -> str:
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    return str(path)


def mergekit_moe(python: Path, base: Path | None = None) -> Commands:
    def commands(experts: list[Path], work: Path) -> list[Command]:
        config = {
            "base_model": str(base or experts[0]),
            "gate_mode": "random",  # its cheapest; the others need a forward pass
            "dtype": "bfloat16",
            "experts_per_token": 2,
            "experts": [{"source_model": str(path)} for path in experts],
        }
        config_file = write_config(work / "moe.yaml", config)
        return [[str(python.parent / "mergekit-moe"), config_file, str(work / "out")]]

    return commands


def mergekit_two_steps(python: Path) -> Commands:
    def commands(experts: list[Path], work: Path) -> list[Command]:
        config = {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "models": [{"model": str(path), "parameters": {"weight": 1.0}} for path in experts],
        }
        average = work / "average"
        config_file = write_config(work / "linear.yaml", config)
        linear = [str(python.parent / "mergekit-yaml"), config_file, str(average)]
        return [linear, *mergekit_moe(python, base=average)(experts, work)]

    return commands


def mixturekit(python: Path) -> Commands:
    def commands(experts: list[Path], work: Path) -> list[Command]:
        config = {
            "moe_method": "traditional",
            "model_type": "mixture",
            "num_experts_per_tok": 2,
            "experts": [{"expert_name": path.name, "model_id": str(path)} for path in experts],
        }
        config_file = write_config(work / "mixture.yaml", config)
        return [[str(python.parent / "mixturekit"), "build", config_file, "--output", str(work / "out")]]

    return commands


def contestants(workers: int | None, peers: list[tuple[str, Path]]) -> list[Contestant]:
    """`peers`: names of tools, and the python that has the tool installed."""
    found = [Contestant("copy", copy(1))]
    cores = len(os.sched_getaffinity(0))
    if cores > 1:
        found.append(Contestant("copy, threaded", copy(min(cores, MOST_THREADS))))
    found.append(Contestant("btx mix", btx(workers)))
    for tool, python in peers:
        if tool == "mergekit":
            found += [
                Contestant("mergekit-moe", mergekit_moe(python)),
                Contestant("mergekit linear, then moe", mergekit_two_steps(python)),
            ]
        else:
            found.append(Contestant("mixturekit", mixturekit(python)))
    return found
