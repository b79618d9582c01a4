"""The house: imports run downwards only, and the base install needs no Megatron."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "btx_megatron"
# from the top floor to the ground; rooms of one row may know each other
FLOORS = [
    {"cli", "__main__"},
    {"comparison"},
    {"launch"},
    {"simulate"},
    {"pipeline"},
    {"mixing", "evaluation", "ensembles"},
    {"training"},
    {"job"},
    {"checkpoints", "model", "data", "runtime"},
    {"run_folder"},
    {"recipe_file"},
    {"recipe_grow"},
    {"manifest"},
    {"estimate_fit", "recipe_checks"},
    {
        "recipe_compare_checks",
        "recipe_ensemble_checks",
        "recipe_gpu_checks",
        "recipe_grow_checks",
        "recipe_layout_checks",
        "recipe_mask_checks",
        "recipe_mix_checks",
        "recipe_moe_checks",
        "recipe_slurm_checks",
    },
    {"matching"},
    {"estimate_comm", "estimate_flops", "estimate_memory", "gpus"},
    {"estimate", "expert_masks"},
    {"methods"},
    {"recipe"},
    {
        "recipe_compare",
        "recipe_data",
        "recipe_layout",
        "recipe_mix",
        "recipe_slurm",
        "recipe_tasks",
        "recipe_training",
    },
    {"durable"},
    {
        "errors",
        "columns",
        "quick_import",
        "recipe_numbers",
        "recipe_yaml",
        "times",
        "tokenizer_json",
        "traffic",
    },
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {module.split(".")[1] for module in modules if module.startswith("btx_megatron.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    floor = FLOOR_OF[room_of(path)]
    upwards = {room for room in imports_of(path) if room in FLOOR_OF and FLOOR_OF[room] < floor}
    assert not upwards


@pytest.mark.parametrize(
    "module",
    [
        "mixing.mix",
        "mixing.verify",
        "mixing.inspect",
        "data.prepare",
        "cli",
        "evaluation.report",
        "launch.worker",
    ],
)
def test_the_base_install_imports_no_megatron(module: str) -> None:
    program = (
        f"import sys, btx_megatron.{module}; sys.exit(any(m.startswith('megatron') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
