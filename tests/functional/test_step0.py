"""The step-0 loss of checkpoints of every format, against transformers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "runs",
    "away",
    "from",
    "it",
]
SEQUENCE = 16


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with norms that are not 1, its tokenizer, and a text beside it."""
    folder: Path = tmp_path_factory.mktemp("step0")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder / "llama")
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "llama" / "tokenizer.json"))
    (folder / "text.txt").write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(50)))
    return folder


def btx(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "btx_megatron", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def loss_of(folder: Path, checkpoint: str, *options: object) -> tuple[float, int]:
    done = btx(
        "verify", folder / checkpoint, "--loss", folder / "text.txt", "--seq-length", SEQUENCE, *options
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"^loss: (\S+)$.*^tokens: (\d+)$", done.stdout, re.MULTILINE | re.DOTALL)
    assert found, done.stdout
    return float(found[1]), int(found[2])


def loss_in_transformers(folder: Path) -> tuple[float, int]:
    model = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "llama" / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode((folder / "text.txt").read_text()).ids)
    total = 0.0
    for start in range(0, len(ids) - 1, SEQUENCE):
        window = ids[start : start + SEQUENCE + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1), len(ids) - 1


def test_the_loss_is_transformers_loss(llama: Path) -> None:
    expected, tokens = loss_in_transformers(llama)
    assert expected > 3  # a wrong weight would show
    loss, counted = loss_of(llama, "llama")
    assert counted == tokens == 49
    assert loss == pytest.approx(expected, abs=1e-5)


def test_copies_of_a_model_have_its_loss(llama: Path) -> None:
    mixed = btx(
        "mix", "--expert", f"x={llama / 'llama'}", "--experts", "copies", "--copies", 3,
        "--router-std", 1, "--output", llama / "moe", "--to", "megatron",
    )  # fmt: skip
    assert mixed.returncode == 0, mixed.stderr
    loss, _ = loss_of(llama, "moe", "--tokenizer", llama / "llama" / "tokenizer.json")
    assert loss == pytest.approx(loss_in_transformers(llama)[0], abs=1e-5)


@pytest.mark.parametrize(
    ("text", "tokenizer", "message"),
    [
        ("nowhere.txt", None, "nowhere.txt: cannot be read (No such file or directory)"),
        ("one.txt", None, "one.txt: 1 tokens; a loss needs at least 2"),
        ("text.txt", "large.json", "is beyond the 15 of the model; name its --tokenizer"),
    ],
)
def test_mistakes_are_one_line(llama: Path, text: str, tokenizer: str | None, message: str) -> None:
    (llama / "one.txt").write_text("fox")
    vocabulary = {word: 100 + number for number, word in enumerate(["<unk>", *WORDS])}
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    large.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    large.save(str(llama / "large.json"))
    options = ["--tokenizer", llama / tokenizer] if tokenizer else []
    done = btx("verify", llama / "llama", "--loss", llama / text, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_windows_are_no_longer_than_the_model_reads(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(" ".join(WORDS[i * i % len(WORDS)] for i in range(150)))
    told = [
        btx("verify", llama / "llama", "--loss", text, *options).stdout
        for options in ([], ["--seq-length", 64], ["--seq-length", 128])
    ]
    default, same, longer = (re.findall(r"^loss: (\S+)$", out, re.MULTILINE) for out in told)
    assert default
    assert default == same != longer
