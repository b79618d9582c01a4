"""Options of ``btx mix`` and ``btx convert`` that would mean nothing are refused: a table of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from llamas import assert_refused, hashes, mix_arguments, run_btx, write_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas a and b, their mixture moe, and another of which no manifest tells: trained."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        write_llama(folder / name, seed)
    for name in ("moe", "trained"):
        assert run_btx(*mix_arguments([folder / "a", folder / "b"], folder / name))[0] == 0
    (folder / "trained" / "manifest.json").unlink()
    return folder


MIX = [
    ("--density 0.5", "--density has no effect with --average mean"),
    ("--average base --base a --density 0.5", "--density has no effect with --average base"),
    ("--average weighted --weight a=2 --density 1", "--density has no effect with --average weighted"),
    ("--base a", "--base has no effect with --average mean"),
    ("--average weighted --base a", "--base has no effect with --average weighted"),
    ("--weight a=2", "--weight has no effect with --average mean"),
    ("--average base --base a --weight a=2", "--weight has no effect with --average base"),
    ("--router-init zero --router-std 0.1", "--router-std has no effect with --router-init zero"),
    ("--router-init centroid --router-std 0.1", "--router-std has no effect with --router-init centroid"),
    ("--router-init zero --random-seed 1", "--random-seed has no effect: nothing is drawn"),
    ("--router-text a=a/config.json", "--router-text has no effect with --router-init normal"),
    ("--tokenizer-model a", "--tokenizer-model is for --router-text"),
    ("--chunks 2", "--chunks 2 means nothing with --experts stack"),
    ("--copies 2", "--copies 2 means nothing with --experts stack"),
    ("--lambda 0.5", "--lambda needs --moe"),
    ("--add-expert c=c", "--add-expert needs --moe"),
    ("--drop-expert 0", "--drop-expert needs --moe"),
]
TARGET = [
    ("--to hf --target-tensor-model-parallel-size 2", "is for --to megatron-legacy, not for hf"),
    ("--to megatron --target-tensor-model-parallel-size 2", "is for --to megatron-legacy, not for megatron"),
    ("--to hf --target-pipeline-model-parallel-size 2", "is for --to megatron-legacy, not for hf"),
    ("--to megatron --target-pipeline-model-parallel-size 2", "is for --to megatron-legacy, not for"),
    ("--to hf --target-expert-model-parallel-size 2", "is for a Megatron target, not for hf"),
    ("--to hf --make-vocab-size-divisible-by 2", "is for a Megatron target, not for hf"),
    ("--to megatron --make-vocab-size-divisible-by 0", "by 0: must be at least 1"),
    ("--to megatron --make-vocab-size-divisible-by -2", "by -2: must be at least 1"),
    ("--to megatron --approximate", "--approximate is for --to hf, not for megatron"),
    ("--to megatron-legacy --approximate", "--approximate is for --to hf, not for megatron-legacy"),
    ("--to megatron --target-expert-model-parallel-size 0", "size 0: must be at least 1"),
    ("--to hf --workers -1", "--workers -1: must be at least 0"),
    ("--to hf --max-memory 0", "--max-memory 0: write it as 500M or 2G"),
    ("--to hf --max-memory 1K", "--max-memory 1024: this takes"),
]
CONVERT = [
    ("--to megatron --target-expert-model-parallel-size 2", "a dense model has no experts to spread"),
    ("--to megatron-legacy --target-expert-model-parallel-size 2", "a dense model has no experts to spread"),
]
GROW = [  # which mixture, options, message
    ("trained", "--add-expert c=c --lambda 1.5", "--lambda 1.5: must lie between 0 and 1"),
    ("trained", "--add-expert c=c --lambda -0.5", "--lambda -0.5: must lie between 0 and 1"),
    ("trained", "--add-expert c=c --lambda nan", "--lambda nan: must lie between 0 and 1"),
    ("trained", "--drop-expert 0 --lambda 0.5", "--lambda has no effect with --drop-expert"),
    ("trained", "--drop-expert 0 --router-std 0.5", "--router-std has no effect with --drop-expert"),
    ("trained", "--drop-expert 0 --random-seed 5", "--random-seed has no effect with --drop-expert"),
    ("trained", "--drop-expert 0 --add-expert c=c", "one --add-expert NAME=PATH, or one --drop-expert"),
    ("trained", "", "give one --add-expert NAME=PATH, or one --drop-expert NUMBER"),
    ("moe", "--add-expert c=c --lambda 0.5", "--lambda has no effect: "),
    ("moe", "--add-expert c=c --router-std 0.5", "--router-std has no effect: "),
    ("moe", "--add-expert c=c --random-seed 5", "is as it was mixed, so all its experts are mixed again"),
    ("trained", "--add-expert c=c --average mean", "--average has no effect with --moe"),
    ("trained", "--add-expert c=c --density 0.5", "--density has no effect with --moe"),
    ("trained", "--add-expert c=c --base a", "--base has no effect with --moe"),
    ("trained", "--add-expert c=c --expert a=a", "--expert has no effect with --moe"),
    ("trained", "--add-expert c=c --router-topk 1", "--router-topk has no effect with --moe"),
]
RECIPE = [
    "--workers 2", "--max-memory 1G", "--dry-run", "--density 0.5", "--output out", "--to hf",
    "--approximate",
    "--make-vocab-size-divisible-by 128", "--tokenizer union", "--random-seed 1",
]  # fmt: skip


def words(models: Path, line: str) -> list[object]:
    """Names of models, as NAME=PATH too, become their paths."""
    found: list[object] = []
    for word in line.split():
        name, equals, path = word.rpartition("=")
        known = path in ("a", "b", "c") and not (equals and name not in ("a", "b", "c"))
        found.append(f"{name}{equals}{models / path}" if known else word)
    return found


@pytest.mark.parametrize(("line", "message"), [*MIX, *TARGET])
def test_mix(models: Path, line: str, message: str) -> None:
    arguments = mix_arguments([models / "a", models / "b"], models / "out", *words(models, line))
    assert_refused(models, message, *arguments)
    assert_refused(models, message, *arguments, "--dry-run")


@pytest.mark.parametrize(("line", "message"), [*TARGET, *CONVERT])
def test_convert(models: Path, line: str, message: str) -> None:
    assert_refused(models, message, "convert", models / "a", models / "out", *words(models, line))


@pytest.mark.parametrize(("which", "line", "message"), GROW)
def test_grow(models: Path, which: str, line: str, message: str) -> None:
    arguments = ["mix", "--moe", models / which, "--output", models / "out", *words(models, line)]
    assert_refused(models, message, *arguments)
    assert_refused(models, message, *arguments, "--dry-run")


@pytest.mark.parametrize("line", RECIPE)
def test_a_recipe_says_everything(tmp_path: Path, line: str) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    message = f"{line.split()[0]} goes with --expert or --moe, not with a RECIPE"
    assert_refused(tmp_path, message, "mix", tmp_path / "recipe.yaml", *line.split())


@pytest.mark.parametrize(
    "line",
    [
        "--average ties --base a --density 0.5 --weight a=2",
        "--average dare --base a --density 0.9 --random-seed 3 --router-init zero --router-topk 2",
        "--router-std 0.1 --random-seed 3 --workers 1 --max-memory 1G",
        "--drop-ratio 0.5 --random-seed 3 --router-init zero",
        "--to hf --target-tensor-model-parallel-size 1 --target-expert-model-parallel-size 1",
        "--to megatron --target-expert-model-parallel-size 2 --make-vocab-size-divisible-by 64",
        "--to megatron-legacy --target-tensor-model-parallel-size 2 --target-expert-model-parallel-size 2",
        "--to hf --router-pre-softmax --router-topk 1 --approximate",
    ],
)
def test_what_means_something_is_taken(models: Path, line: str) -> None:
    arguments = mix_arguments([models / "a", models / "b"], models / "out", *words(models, line), "--dry-run")
    code, out, err = run_btx(*arguments)
    assert (code, err) == (0, "")
    assert "memory" in out


def test_lambda_is_for_an_untrained_mixture_whose_sources_are_gone(models: Path, tmp_path: Path) -> None:
    sources = [write_llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    assert run_btx(*mix_arguments(sources, tmp_path / "moe"))[0] == 0
    sources[1].rename(tmp_path / "elsewhere")
    grow = [
        "mix",
        "--moe",
        tmp_path / "moe",
        "--add-expert",
        f"c={models / 'c'}",
        "--output",
        tmp_path / "out",
    ]
    assert_refused(tmp_path, f"expert b: {sources[1]} is gone", *grow)
    assert run_btx(*grow, "--lambda", 0.25)[0] == 0
    assert len(hashes(tmp_path / "out")) == 10
