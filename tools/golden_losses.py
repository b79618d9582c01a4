"""Losses of twenty steps under four layouts, beside those that are kept in tests/golden.

    python tools/golden_losses.py             train and compare
    python tools/golden_losses.py --update    train and keep what came out

A change that is meant to leave the numbers alone shows here if it does not; one that is meant to change them
comes with new files, which the review sees. Losses are in nats a token, fp32 on CPUs. Between CPUs of other
types the order of sums differs, and twenty steps at a high learning rate enlarge that: hence TOLERANCE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "golden"
WORKER = ROOT / "tests" / "functional" / "layout_worker.py"
LAYOUTS = {
    "dense-1-process": "dense 1 process",
    "dense-tp2-sp": "dense TP2+SP",
    "moe-1-process": "moe 1 process",
    "moe-ep2": "moe EP2",
}
"""File names, and what layout_worker.py calls the run."""
TOLERANCE = 1e-3


def main() -> int:
    """Exit code 0 where all losses are as they were, or were written; else 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="keep the new losses")
    update = parser.parse_args().update
    runs = train()
    for name, run in LAYOUTS.items():
        losses = runs[run]["loss"]
        if update:
            (FOLDER / f"{name}.txt").write_text(to_text(losses))
        problem = compare(name, losses)
        print(f"{name}: {problem or 'as before'}")
        if problem:
            return 1
    return 0


def train() -> dict[str, Any]:
    """What layout_worker.py tells of its runs on one rank and on two."""
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks), str(WORKER), folder, "--losses"]
            subprocess.run(command, check=True)
            runs |= json.loads((Path(folder) / f"result-{ranks}.json").read_text())
    return runs


def compare(name: str, losses: Sequence[float]) -> str | None:
    """What differs from the kept losses of this layout, in one line; None where nothing does."""
    kept = from_text((FOLDER / f"{name}.txt").read_text())
    if list(kept) != list(range(1, len(losses) + 1)):
        return f"{len(losses)} steps, but {len(kept)} are kept"
    differences = {step: abs(loss - losses[step - 1]) for step, loss in kept.items()}
    worst = max(differences, key=differences.__getitem__)
    if differences[worst] <= TOLERANCE:
        return None
    return f"step {worst}: {losses[worst - 1]:.6f}, kept is {kept[worst]:.6f}"


def to_text(losses: Sequence[float]) -> str:
    """One line ``step loss`` a step."""
    return "".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(losses, 1))


def from_text(text: str) -> Mapping[int, float]:
    """Inverse of to_text."""
    return {int(step): float(loss) for step, loss in map(str.split, text.splitlines())}


if __name__ == "__main__":
    sys.exit(main())
