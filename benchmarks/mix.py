"""How fast and how lean the mix is, beside a plain copy of the same bytes and beside other tools.

    python benchmarks/mix.py make FOLDER --experts 4 --size 1.1B
    python benchmarks/mix.py run FOLDER --output DIR --peer mergekit=/path/to/its/python
    python benchmarks/mix.py scale FOLDER --output DIR --counts 2 4 8

`make` writes random Llama models in Hugging Face format. `run` lets every contestant make one mixture of
them, in turns: each round everyone once, each round another one first, so that a slow minute hits all. A
turn: the last result is gone, inputs are read into the page cache (--cold: dropped from it), then the clock
covers the whole command, its start-up, and fsync of every file of the result. Start-up is the same command on
models of less than a megabyte, so it holds whatever a tool loads before it can begin. `scale` lets btx mix
alone mix the first 2, 4, ... of the models, in turns: its time by the bytes, and its memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import models
from contestants import ROOT, Contestant, contestants
from measure import CommandFailed, Cost, commit, evict, machine, measure, sync_tree, versions, warm

PACKAGES = ["btx-megatron", "mergekit", "mixturekit", "torch", "safetensors", "transformers", "numpy"]
STARTS = 3


def take_turn(contestant: Contestant, experts: list[Path], output: Path, cold: bool) -> dict[str, Any]:
    """One mixture, made and thrown away. Raises CommandFailed."""
    work = Path(tempfile.mkdtemp(prefix="mix-", dir=output))
    log = output / f"{'-'.join(re.findall('[a-z]+', contestant.name))}.log"
    log.write_bytes(b"")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        commands = contestant.commands(experts, work)
        os.sync()  # what others left to write is not this one's
        (evict if cold else warm)(models.weight_files(experts))
        cost = Cost()
        for command in commands:
            # In this checkout, so that `python -m btx_megatron` is the one that lies here.
            cost = cost.then(measure(command, log, offline, ROOT))
        written = sum(path.stat().st_size for path in (work / "out").rglob("*") if path.is_file())
        if written < 0.9 * models.mixture_bytes(experts):
            raise CommandFailed(f"{contestant.name} left no whole mixture (see {log})")
        synced = sync_tree(work / "out")
        cost = dataclasses.replace(cost, seconds=cost.seconds + synced)
        return dataclasses.asdict(cost) | {"sync_seconds": synced, "output_bytes": written}
    finally:
        shutil.rmtree(work)


def run(options: argparse.Namespace) -> int:
    experts = models.find(options.folder.resolve())
    if not experts:
        sys.exit(f"{options.folder}: no models here; write some with `make`")
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    pythons = {"btx": sys.executable} | {tool: str(python) for tool, python in options.peer}
    report: dict[str, Any] = {
        "machine": machine(options.folder, options.output),
        "commit": commit(ROOT),
        "versions": {tool: versions(python, PACKAGES) for tool, python in pythons.items()},
        "inputs": f"{len(experts)} models, {models.total_bytes(experts) / 1e9:.2f} GB in all",
        "cache": "cold" if options.cold else "hot",
        "rounds": options.rounds,
        "starts": {},
        "turns": {},
        "failures": {},
    }
    taking_part = contestants(options.workers, options.peer)
    with tempfile.TemporaryDirectory(prefix="tiny-", dir=options.output) as folder:
        tiny = models.make(Path(folder) / "models", len(experts), "tiny")
        rounds(taking_part, tiny, options.output, STARTS, False, report["starts"], report["failures"])
    taking_part = [one for one in taking_part if one.name not in report["failures"]]
    turns, failures = report["turns"], report["failures"]
    rounds(taking_part, experts, options.output, options.rounds, options.cold, turns, failures)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["failures"] else 0


def scale(options: argparse.Namespace) -> int:
    """btx mix with more and more experts: is its time linear in bytes, is its memory flat?"""
    found = models.find(options.folder.resolve())
    if len(found) < max(options.counts):
        sys.exit(f"{options.folder}: {len(found)} models; make {max(options.counts)} with `make`")
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    (mixer,) = [one for one in contestants(options.workers, []) if one.name == "btx mix"]
    turns: dict[int, list[dict[str, Any]]] = {count: [] for count in options.counts}
    with tempfile.TemporaryDirectory(prefix="tiny-", dir=options.output) as folder:
        tiny = models.make(Path(folder) / "models", 2, "tiny")
        start = statistics.median(
            take_turn(mixer, tiny, options.output, cold=False)["seconds"] for _ in range(STARTS)
        )
    for _ in range(options.rounds):
        for count in options.counts:
            turns[count].append(take_turn(mixer, found[:count], options.output, cold=False))
    told = machine(options.folder, options.output) | {"commit": commit(ROOT), "rounds": options.rounds}
    print("\n".join(f"- {key}: {value}" for key, value in told.items()))
    print(f"- start-up: {start:.2f} s\n")
    print(
        "| experts | read GB | written GB | seconds (min-max) | after start-up, s/GB | peak MiB |\n|"
        + "---|" * 6
    )
    for count, mine in turns.items():
        read, written = models.total_bytes(found[:count]) / 1e9, mine[0]["output_bytes"] / 1e9
        seconds = [turn["seconds"] for turn in mine]
        rate = (statistics.median(seconds) - start) / (read + written)
        peak = max(turn["peak"] for turn in mine) / 2**20
        print(f"| {count} | {read:.2f} | {written:.2f} | {spread(seconds)} | {rate:.2f} | {peak:.0f} |")
    return 0


def rounds(
    taking_part: list[Contestant],
    experts: list[Path],
    output: Path,
    count: int,
    cold: bool,
    turns: dict[str, Any],
    failures: dict[str, str],
) -> None:
    """Let everyone have `count` turns; who fails is out, and is told."""
    for number in range(count):
        first = number % len(taking_part) if taking_part else 0
        for contestant in taking_part[first:] + taking_part[:first]:
            if contestant.name in failures:
                continue
            try:
                turn = take_turn(contestant, experts, output, cold)
            except CommandFailed as error:
                failures[contestant.name] = str(error)
                turns.pop(contestant.name, None)
                print(f"{contestant.name}: {error}", file=sys.stderr, flush=True)
                continue
            turns.setdefault(contestant.name, []).append(turn)
            seconds, peak = turn["seconds"], turn["peak"] / 2**20
            print(f"{contestant.name}: {seconds:.2f} s, {peak:.0f} MiB", file=sys.stderr, flush=True)


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    told = report["machine"] | {key: report[key] for key in ("commit", "inputs", "cache", "rounds")}
    lines = [f"- {key}: {value}" for key, value in (told | report["versions"]).items()]
    heads = ["", "seconds (min-max)", "x copy (min-max)", "x btx (min-max)", "start-up s", "CPU s"]
    heads += ["peak MiB", "anonymous", "read GB calls / device", "written GB calls / device", "result GB"]
    lines += ["", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    turns = report["turns"]
    for name, mine in turns.items():
        cells = [name, spread([turn["seconds"] for turn in mine])]
        cells += [ratio(mine, turns.get(other)) for other in ("copy", "btx mix")]
        cells.append(f"{statistics.median(turn['seconds'] for turn in report['starts'][name]):.2f}")
        middle = {key: statistics.median(turn[key] for turn in mine) for key in mine[0]}
        cells += [f"{middle['cpu_seconds']:.1f}"]
        cells += [f"{max(turn[key] for turn in mine) / 2**20:.0f}" for key in ("peak", "anonymous")]
        for way in ("read", "write"):
            cells.append(f"{middle[way + '_calls'] / 1e9:.2f} / {middle[way + '_device'] / 1e9:.2f}")
        cells.append(f"{middle['output_bytes'] / 1e9:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{name} failed: {message}" for name, message in report["failures"].items()]
    return "\n".join(lines)


def ratio(mine: list[dict[str, Any]], other: list[dict[str, Any]] | None) -> str:
    """Times as long as another one in the same round: median and spread over the rounds."""
    if other is None:
        return "-"
    return spread([a["seconds"] / b["seconds"] for a, b in zip(mine, other, strict=True)])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def peer(text: str) -> tuple[str, Path]:
    tool, _, python = text.partition("=")
    path = Path(python).absolute()  # not resolved: a virtual environment's python is a link
    if tool not in ("mergekit", "mixturekit") or not path.is_file():
        raise argparse.ArgumentTypeError(
            "give mergekit=PYTHON or mixturekit=PYTHON, a python that has it installed"
        )
    return tool, path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make", help="write random models")
    one.add_argument("folder", type=Path, help="a folder that does not exist")
    one.add_argument("--experts", type=int, default=4)
    one.add_argument("--size", choices=models.SIZES, default="0.3B")
    two = commands.add_parser("run", help="measure")
    two.add_argument("folder", type=Path, help="what `make` wrote")
    two.add_argument(
        "--output", type=Path, required=True, help="where mixtures are written, and removed again"
    )
    two.add_argument("--rounds", type=int, default=5)
    two.add_argument("--peer", type=peer, action="append", default=[], metavar="TOOL=PYTHON")
    two.add_argument("--cold", action="store_true", help="inputs are dropped from the page cache first")
    two.add_argument("--workers", type=int, help="threads of btx mix")
    two.add_argument("--json", type=Path, help="write every turn here")
    three = commands.add_parser("scale", help="measure btx mix alone with more and more experts")
    three.add_argument("folder", type=Path, help="what `make` wrote")
    three.add_argument("--output", type=Path, required=True, help="where mixtures are written, and removed")
    three.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8])
    three.add_argument("--rounds", type=int, default=3)
    three.add_argument("--workers", type=int, help="threads of btx mix")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.command != "make":
        try:
            return (run if options.command == "run" else scale)(options)
        except RuntimeError as error:  # this machine cannot tell what was asked
            sys.exit(f"cannot measure: {error}")
    if options.folder.exists():
        sys.exit(f"{options.folder} exists: name a folder that does not")
    models.make(options.folder, options.experts, options.size)
    print(f"{options.experts} models, {models.total_bytes(models.find(options.folder)) / 1e9:.2f} GB in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
