"""How fast text becomes token files: ``btx prepare`` beside Megatron-LM's tools/preprocess_data.py.

    python benchmarks/tokenizing.py --preprocess Megatron-LM/tools/preprocess_data.py \
        --tokenizer-model tokenizer.model --megabytes 20 --rounds 5

preprocess_data.py is not in Megatron's wheel: give the path of a checkout's copy; it runs with the packages
of this interpreter. Both get the same JSON lines (text files of this interpreter's library and packages, no
text twice) and the same tokenizer. The contestants take turns, each once a round, so that a slow moment hits
all; a ratio compares two runs of one round. Each command is held to its cores with taskset.

Seconds are those of the whole command less those of the same command on three small documents, measured in
the same round: the imports (Megatron's take seconds) are no speed of tokenizing. CPU seconds, less theirs,
are told beside them: other load on the machine lengthens the former most.

``btx prepare`` does more than its rival: it reads everything a first time, for duplicates, bad documents and
the held-out split, and hashes what it writes. That the tokens are the same is checked after the first round:
all documents of the rival's files are in the training or held-out files, byte for byte and in its order.
(Texts with U+2581, SentencePiece's own sign for a space, are left out: ``btx prepare`` keeps the sign, its
rival makes it a space.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from measure import commit, machine, measure, versions

ROOT = Path(__file__).resolve().parents[1]
SPACE_SIGN = "\u2581"
SUFFIXES = (".py", ".txt", ".md", ".rst")


@dataclass(frozen=True)
class Contestant:
    name: str
    cores: int
    command: Callable[[Path, Path], list[str]]
    """From the JSON lines and an empty folder for the output."""


@dataclass(frozen=True)
class Taken:
    """One run, less its start-up."""

    seconds: float
    cpu_seconds: float
    start_up: float


def write_corpus(path: Path, size: int) -> tuple[int, int]:
    """Texts of this interpreter's own files, one a line; returns documents and bytes of text."""
    written = count = 0
    with path.open("w", encoding="utf-8") as file:
        for text in _texts():
            file.write(json.dumps({"text": text}) + "\n")
            written, count = written + len(text.encode()), count + 1
            if written >= size:
                return count, written
    raise SystemExit(f"this environment has only {written / 1e6:.0f} MB of text; lower --megabytes")


def _texts() -> Iterator[str]:
    folders = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")}
    files = sorted(f for folder in folders for f in folder.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    random.Random(1).shuffle(files)
    seen = set()
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and SPACE_SIGN not in text and text not in seen:
            seen.add(text)
            yield text


def ours(tokenizer: Path, kind: str, workers: int) -> Callable[[Path, Path], list[str]]:
    def command(lines: Path, folder: Path) -> list[str]:
        recipe = {
            "run_folder": str(folder / "run"),
            "data": {
                "num_workers": workers,
                "held_out_fraction": 0.05,
                "domains": [{"name": "all", "sources": [{"name": "lines", "path": str(lines)}]}],
            },
            "tokenizer": {"tokenizer_type": kind, "tokenizer_model": str(tokenizer)},
            "training": {"train_iters": 2, "lr_warmup_iters": 0},
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML, too
        return [sys.executable, "-m", "btx_megatron", "prepare", str(folder / "recipe.yaml")]

    return command


def theirs(script: Path, tokenizer: Path, kind: str, workers: int) -> Callable[[Path, Path], list[str]]:
    def command(lines: Path, folder: Path) -> list[str]:
        options = {
            "--input": lines,
            "--output-prefix": folder / "theirs",
            "--tokenizer-type": kind,
            "--tokenizer-model": tokenizer.parent if kind == "HuggingFaceTokenizer" else tokenizer,
            "--workers": workers,
        }
        flat = [str(value) for pair in options.items() for value in pair]
        return [sys.executable, str(script), *flat, "--append-eod"]

    return command


def take(contestant: Contestant, lines: Path, few: Path, folder: Path) -> Taken:
    """Run it on a few lines, then on all, each in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    costs = []
    for name, text in (("few", few), ("all", lines)):
        place = folder / name
        place.mkdir(parents=True)
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: contestant.cores]))
        command = ["taskset", "--cpu-list", cores, *contestant.command(text, place)]
        costs.append(measure(command, folder / "log", environment))
    start, whole = costs
    return Taken(whole.seconds - start.seconds, whole.cpu_seconds - start.cpu_seconds, start.seconds)


def check_same_tokens(our_run: Path, their_prefix: Path) -> int:
    """Raise SystemExit unless both made the same tokens of every document; returns how many tokens."""
    sys.path.insert(0, str(ROOT))
    from btx_megatron.data.folder import token_prefix
    from btx_megatron.data.indexed import IndexedTokens

    all_of_theirs = IndexedTokens(their_prefix)
    sides = {
        s: IndexedTokens(token_prefix(our_run / "data", s, "all", "lines")) for s in ("train", "held_out")
    }
    at = dict.fromkeys(sides, 0)
    for i in range(len(all_of_theirs)):
        document = all_of_theirs[i].tobytes()
        for side, tokens in sides.items():
            if at[side] < len(tokens) and tokens[at[side]].tobytes() == document:
                at[side] += 1
                break
        else:
            raise SystemExit(f"document {i}: the tokens differ")
    if at != {side: len(tokens) for side, tokens in sides.items()}:
        raise SystemExit(f"documents differ: {at} of ours are theirs")
    return all_of_theirs.total_tokens


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--preprocess", type=Path, required=True, help="Megatron-LM's tools/preprocess_data.py"
    )
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    kinds = ["SentencePieceTokenizer", "HuggingFaceTokenizer"]
    parser.add_argument("--tokenizer-type", choices=kinds, default=kinds[0])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-tokenize"), help="must not exist")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    folder = args.folder.resolve()
    script, model, kind = args.preprocess.resolve(), args.tokenizer_model.resolve(), args.tokenizer_type
    contestants = [
        Contestant(f"{name}, {cores} core{'s'[: cores - 1]}", cores, command)
        for cores in (1, 2)
        for name, command in (
            ("btx", ours(model, kind, cores)),
            ("preprocess_data", theirs(script, model, kind, cores)),
        )
    ]
    lines, few = folder / "lines.jsonl", folder / "few.jsonl"
    documents, size = write_corpus(lines, int(args.megabytes * 1e6))
    few.write_text("".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(3)), encoding="utf-8")
    for key, value in machine(folder, folder).items():
        print(f"{key}: {value}")
    packages = ["sentencepiece", "tokenizers", "transformers", "megatron-core", "torch", "numpy"]
    print(f"versions: {versions(sys.executable, packages)}; btx {commit(ROOT)}")
    print(f"text: {size / 1e6:.1f} MB in {documents} documents; {kind} {model.name}")
    taken: dict[str, list[Taken]] = {contestant.name: [] for contestant in contestants}
    for number in range(args.rounds):
        order = contestants[number % 4 :] + contestants[: number % 4]
        for contestant in order:
            place = folder / f"{number}" / contestant.name.replace(", ", "-").replace(" ", "-")
            run = take(contestant, lines, few, place)
            taken[contestant.name].append(run)
            told = f"{run.seconds:.2f} s, CPU {run.cpu_seconds:.2f} s, start-up {run.start_up:.1f} s"
            print(f"round {number}: {contestant.name}: {told}", file=sys.stderr, flush=True)
        if number == 0:
            their_files = folder / "0" / "preprocess_data-1-core" / "all" / "theirs_text_document"
            tokens = check_same_tokens(folder / "0" / "btx-1-core" / "all" / "run", their_files)
            print(f"same tokens: {tokens:,}", flush=True)
    tell(taken, size)
    return 0


def tell(taken: dict[str, list[Taken]], size: int) -> None:
    """Seconds of each, then the ratios of runs of one round: median (least to most)."""
    for name, runs in taken.items():
        seconds, cpu = [run.seconds for run in runs], [run.cpu_seconds for run in runs]
        rate = size / 1e6 / statistics.median(seconds)
        start = statistics.median(run.start_up for run in runs)
        print(f"{name:26} {spread(seconds)} s, CPU {spread(cpu)} s, {rate:.2f} MB/s; start-up {start:.1f} s")
    pairs = [
        ("one core, btx over preprocess_data", "preprocess_data, 1 core", "btx, 1 core"),
        ("two cores, btx over preprocess_data", "preprocess_data, 2 cores", "btx, 2 cores"),
        ("btx, two cores over one", "btx, 1 core", "btx, 2 cores"),
        ("preprocess_data, two cores over one", "preprocess_data, 1 core", "preprocess_data, 2 cores"),
    ]
    for title, slow, fast in pairs:
        both = list(zip(taken[slow], taken[fast], strict=True))
        speed = spread([a.seconds / b.seconds for a, b in both])
        cpu = spread([a.cpu_seconds / b.cpu_seconds for a, b in both])
        print(f"{title:36} {speed} times as fast; CPU seconds {cpu}")


if __name__ == "__main__":
    sys.exit(main())
