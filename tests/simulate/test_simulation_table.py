"""``btx plan --simulate``: what is printed, quickly, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from btx_megatron.cli import main
from btx_megatron.recipe_file import load_recipe
from btx_megatron.simulate.assumptions import Assumptions
from btx_megatron.simulate.table import both_sides, simulation_text, spread_text
from btx_megatron.simulate.trials import Spread

QUICKSTART = str(Path(__file__).parents[2] / "examples" / "quickstart.yaml")


def test_the_table() -> None:
    recipe = load_recipe(QUICKSTART)
    lines = simulation_text(recipe, [64, 1024], 3, ["mfu=1e-9", "peak_tflops=1"]).splitlines()
    assert lines[0].startswith("simulated with 3 seeds: median (5-95 %); a GPU fails every 50,700 h")
    assert [line.split()[0:2] for line in lines[2:6]] == [
        ["64", "btx"],
        ["64", "one"],
        ["1,024", "btx"],
        ["1,024", "one"],
    ]
    assert lines == simulation_text(recipe, [64, 1024], 3, ["mfu=1e-9", "peak_tflops=1"]).splitlines()


def test_both_sides_do_the_same_work() -> None:
    sides = both_sides(load_recipe(QUICKSTART), Assumptions(mfu=1e-9), 64, 2)
    btx, one = (outcomes[0] for outcomes in sides.values())
    assert btx.useful == pytest.approx(one.useful)
    assert btx.lost > 0
    assert btx.lost == pytest.approx(btx.spent.total)
    assert btx.reserved >= btx.allocated > btx.useful


def test_spread_text() -> None:
    assert spread_text(Spread(1234.5, 1000, 2000), ",.0f") == "1,234 (1,000-2,000)"


def test_the_command_line_without_torch_or_numpy() -> None:
    code = (
        "import sys; from btx_megatron.cli import main; code = main(); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    options = ["plan", QUICKSTART, "--simulate", "--gpus", "64", "--seeds", "2", "--assume", "mfu=1e-6"]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one run") == 2  # its row, and the note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simulate", "--seeds", "0"], "--seeds 0"),
        (["--simulate", "--assume", "x=1"], "known here"),
        (["--gpus", "64"], "belong to --simulate"),
        (["--seeds", "0"], "belong to --simulate"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["btx", "plan", QUICKSTART, *options])
    assert main() == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
