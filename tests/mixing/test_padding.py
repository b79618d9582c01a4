"""Odd vocabularies: ``--make-vocab-size-divisible-by`` towards Megatron, and the way back without padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llamas import (
    HIDDEN,
    assert_refused,
    hashes,
    mix_arguments,
    random_weights,
    read_hf,
    read_ours,
    run_btx,
    write_llama,
)

from btx_megatron.checkpoints.formats import config_of, open_checkpoint
from btx_megatron.checkpoints.vocabulary import EMBEDDING, OUTPUT

ODD = 37
OPTION = "--make-vocab-size-divisible-by"


def done(*arguments: object) -> str:
    code, out, err = run_btx(*arguments)
    assert (code, err) == (0, "")
    return out


def rules(folder: Path) -> dict[str, str]:
    table = json.loads((folder / "manifest.json").read_text())["outputs"]["tensors"]
    return {name: row["rule"] for name, row in table.items()}


def megatron_rows(out: str, vocab_size: int, tensor_parallel: int) -> int:
    """What Megatron-LM makes of the printed flag, by its own function."""
    (line,) = [line for line in out.splitlines() if OPTION in line]
    multiple = int(line.split()[1]) * tensor_parallel
    return -(-vocab_size // multiple) * multiple


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("to", "number", "tensor_parallel", "rows"),
    [
        ("megatron", None, 1, 37),
        ("megatron", 1, 1, 37),
        ("megatron", 128, 1, 128),
        ("megatron", 5, 1, 40),
        ("megatron-legacy", None, 1, 37),
        ("megatron-legacy", 1, 2, 38),
        ("megatron-legacy", 16, 2, 64),
        ("megatron-legacy", 150, 2, 300),
    ],
)
def test_there_and_back_is_bit_exact(
    tmp_path: Path, to: str, number: int | None, tensor_parallel: int, rows: int, tied: bool
) -> None:
    source = write_llama(tmp_path / "hf", 3, vocabulary=ODD, tied=tied)
    padded, back = tmp_path / "padded", tmp_path / "back"
    options: list[object] = ["--to", to]
    options += [OPTION, number] if number is not None else []
    options += ["--target-tensor-model-parallel-size", tensor_parallel] if tensor_parallel > 1 else []
    out = done("convert", source, padded, *options)
    assert megatron_rows(out, ODD, tensor_parallel) == rows
    assert number in (None, 1) or f"{OPTION} {number} " in out

    ours = read_ours(padded)
    for name in (EMBEDDING, OUTPUT)[: 1 if tied else 2]:
        assert ours[name].shape == (rows, HIDDEN)
        assert not ours[name][ODD:].any()
        assert rules(padded)[name] == ("copy+padded" if rows > ODD else "copy")
    checkpoint = open_checkpoint(padded)
    args = checkpoint.args if to == "megatron-legacy" else checkpoint.common["args"]  # type: ignore[attr-defined]
    assert (args.vocab_size, args.padded_vocab_size) == (ODD, rows)
    assert args.make_vocab_size_divisible_by * tensor_parallel * round(
        rows / args.make_vocab_size_divisible_by / tensor_parallel
    ) == rows  # fmt: skip
    done("verify", padded)

    done("convert", padded, back, "--to", "hf")
    done("verify", back)
    expected, found = random_weights(3, tied=tied, vocabulary=ODD), read_hf(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    done("convert", source, tmp_path / "same", "--to", "hf")
    assert hashes(back) == hashes(tmp_path / "same")
    assert rules(back)[EMBEDDING] == ("copy+cut" if rows > ODD else "copy")
    assert json.loads((back / "config.json").read_text())["vocab_size"] == ODD


def test_a_mixture_is_padded_and_cut_too(tmp_path: Path) -> None:
    sources = [write_llama(tmp_path / name, seed, vocabulary=ODD) for seed, name in enumerate("ab")]
    for name, options in (("hf", ["--to", "hf"]), ("padded", ["--to", "megatron", OPTION, 64])):
        done(*mix_arguments(sources, tmp_path / name, *options))
    assert rules(tmp_path / "padded")[OUTPUT] == "mean+padded"
    done("convert", tmp_path / "padded", tmp_path / "back", "--to", "hf")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "hf")
    more = mix_arguments(sources, tmp_path / "none", "--to", "megatron", OPTION, 64, "--dry-run")
    assert "mean+padded" in done(*more)
    # and from padded experts: rows stay, and are cut towards Hugging Face
    padded = []
    for source in sources:
        done("convert", source, tmp_path / f"m{source.name}", "--to", "megatron", OPTION, 64)
        padded.append(tmp_path / f"m{source.name}")
    done(*mix_arguments(padded, tmp_path / "again"))
    assert hashes(tmp_path / "again") == hashes(tmp_path / "padded")
    done(*mix_arguments(padded, tmp_path / "cut", "--to", "hf", "--average", "ties", "--base", padded[0]))
    assert read_hf(tmp_path / "cut")["lm_head.weight"].shape == (ODD, HIDDEN)
    done("verify", tmp_path / "cut")


def test_padding_is_made_anew_for_another_number(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "hf", 3, vocabulary=ODD)
    done("convert", source, tmp_path / "a", "--to", "megatron", OPTION, 128)
    for name, number, rows in (("b", 16, 48), ("c", 64, 64), ("d", 1, 37)):
        done("convert", tmp_path / "a", tmp_path / name, "--to", "megatron", OPTION, number)
        assert read_ours(tmp_path / name)[EMBEDDING].shape[0] == rows


def test_a_vocabulary_of_unknown_size_is_all_tokens(tmp_path: Path) -> None:
    from test_mix import random_weights as ours
    from tiny import VOCABULARY, write_dense

    source = write_dense(tmp_path / "plain", ours(0))
    done("convert", source, tmp_path / "out", "--to", "megatron", OPTION, 24)
    assert read_ours(tmp_path / "out")[EMBEDDING].shape[0] == 24 > VOCABULARY


def test_the_size_of_an_unknown_vocabulary_is_known_once_it_is_padded(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "hf", 3, vocabulary=ODD)
    done("convert", source, tmp_path / "a", "--to", "megatron-legacy")
    (file,) = (tmp_path / "a").rglob("model_optim_rng.pt")
    content = torch.load(file, weights_only=False)
    content["args"].vocab_size = None
    torch.save(content, file)
    (tmp_path / "a" / "manifest.json").unlink()
    done("convert", tmp_path / "a", tmp_path / "b", "--to", "megatron", OPTION, 64)
    assert config_of(open_checkpoint(tmp_path / "b")).vocab_size == ODD
    done("convert", tmp_path / "b", tmp_path / "back", "--to", "hf")
    assert read_hf(tmp_path / "back")["lm_head.weight"].shape == (ODD, HIDDEN)
    done("convert", tmp_path / "a", tmp_path / "all", "--to", "hf")
    assert read_hf(tmp_path / "all")["lm_head.weight"].shape == (ODD, HIDDEN)


def test_what_is_refused(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "hf", 3, vocabulary=ODD)
    out = tmp_path / "out"
    assert_refused(
        tmp_path, f"give {OPTION} 128",
        "convert", source, out, "--to", "megatron-legacy", "--target-tensor-model-parallel-size", 2,
    )  # fmt: skip
    assert_refused(tmp_path, f"{OPTION}", "convert", source, out, "--to", "hf", OPTION, 128)
    assert_refused(tmp_path, f"{OPTION}", *mix_arguments([source, source], out, OPTION, 128))
    assert_refused(
        tmp_path, f"{OPTION} 0: must be at least 1", "convert", source, out, "--to", "megatron", OPTION, 0
    )
