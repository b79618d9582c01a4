"""Routers from text, against a forward pass in transformers and a few lines of torch."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = {"birds": ["wing", "nest", "egg", "sings"], "stones": ["hard", "grey", "falls", "rolls"]}
SHARED = ["the", "a", "and", "is"]
HIDDEN, LAYERS, TEMPERATURE, STRENGTH = 32, 2, 0.1, 0.01


def vocabulary() -> dict[str, int]:
    words = [word for its in WORDS.values() for word in its]
    return {word: number for number, word in enumerate(["<unk>", *SHARED, *words])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two branches of one random Llama in fp32, each with a text; the second text is longer."""
    path: Path = tmp_path_factory.mktemp("router_text")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    seed = LlamaForCausalLM(config)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name, words in WORDS.items():
        model = copy.deepcopy(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(path / name)
        tokenizer.save(str(path / name / "tokenizer.json"))
        length = 300 if name == "birds" else 500
        text = [(words + SHARED)[i * i % 7 + i % 2] for i in range(length)]
        (path / f"{name}.txt").write_text(" ".join(text))
    return path


def btx(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "btx_megatron", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def mix(folder: Path, output: str, *options: object) -> subprocess.CompletedProcess[str]:
    experts = [part for name in WORDS for part in ("--expert", f"{name}={folder / name}")]
    return btx("mix", *experts, "--output", folder / output, "--to", "hf", *options)


def with_texts(folder: Path) -> list[str]:
    return [part for name in WORDS for part in ("--router-text", f"{name}={folder / name}.txt")]


def features(folder: Path, windows: int = 4) -> list[list[Tensor]]:
    """By layer and expert: what stands in front of the feed-forward in the averaged model, in fp64."""
    models = [LlamaForCausalLM.from_pretrained(folder / name) for name in WORDS]
    average = copy.deepcopy(models[0]).double()
    for key, parameter in average.named_parameters():
        parameter.data = sum(dict(model.named_parameters())[key].data for model in models).double() / 2
    taken: dict[int, list[Tensor]] = {layer: [] for layer in range(LAYERS)}
    for layer, block in enumerate(average.model.layers):
        block.mlp.register_forward_pre_hook(lambda _, inputs, layer=layer: taken[layer].append(inputs[0]))
    for name in WORDS:
        ids = [vocabulary()[word] for word in (folder / f"{name}.txt").read_text().split()]
        with torch.no_grad():
            average(torch.tensor(ids[: windows * 64]).reshape(windows, 64))
    return [[states.reshape(-1, HIDDEN) for states in taken[layer]] for layer in range(LAYERS)]


def gates(folder: Path, output: str) -> Tensor:
    weights = load_file(folder / output / "model.safetensors")
    return torch.stack(
        [weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for layer in range(LAYERS)]
    )


def centroid(states: list[Tensor]) -> Tensor:
    means = torch.stack([batch.mean(0) for batch in states])
    length = torch.cat(states).square().sum(1).mean().sqrt()
    return means / means.norm(dim=1, keepdim=True) / (TEMPERATURE * length)


def ridge(states: list[Tensor]) -> Tensor:
    x = torch.cat(states)
    y = torch.cat([torch.full((len(batch),), number) for number, batch in enumerate(states)])
    gram = x.T @ x
    gram += STRENGTH * gram.diagonal().mean() * torch.eye(HIDDEN)
    return torch.linalg.solve(gram, x.T @ torch.nn.functional.one_hot(y).double()).T / TEMPERATURE


@pytest.mark.parametrize(("kind", "expected"), [("centroid", centroid), ("ridge", ridge)])
def test_rows_are_those_of_a_forward_pass_in_transformers(folder: Path, kind: str, expected) -> None:  # type: ignore[no-untyped-def]
    done = mix(folder, kind, "--router-init", kind, *with_texts(folder))
    assert done.returncode == 0, done.stderr
    reference = [expected(states) for states in features(folder)]  # the shorter text predicts 299 tokens
    for layer, rows in enumerate(gates(folder, kind).double()):
        torch.testing.assert_close(rows, reference[layer], rtol=2e-4, atol=2e-4)
        for own, states in enumerate(features(folder)[layer]):
            assert (states @ rows.T).argmax(1).eq(own).double().mean() > 0.6
    manifest = json.loads((folder / kind / "manifest.json").read_text())
    assert set(manifest["recipe"]["router_text"]) == set(WORDS)
    assert btx("verify", folder / kind).returncode == 0


def test_a_text_of_one_window_counts_alone(folder: Path, tmp_path: Path) -> None:
    """Nothing fills up a batch."""
    for name in WORDS:
        words = (folder / f"{name}.txt").read_text().split()
        (tmp_path / f"{name}.txt").write_text(" ".join(words[:70]))
    short = [part for name in WORDS for part in ("--router-text", f"{name}={tmp_path / name}.txt")]
    done = mix(folder, "short", "--router-init", "centroid", *short)
    assert done.returncode == 0, done.stderr
    for states, rows in zip(features(folder, windows=1), gates(folder, "short").double(), strict=True):
        torch.testing.assert_close(rows, centroid(states), rtol=2e-4, atol=2e-4)


def test_a_split_expert_has_its_sources_row_in_all_chunks(folder: Path) -> None:
    done = mix(
        folder, "split", "--router-init", "centroid", *with_texts(folder), "--experts", "split", "--chunks", 2
    )
    assert done.returncode == 0, done.stderr
    rows = gates(folder, "split")
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert torch.equal(rows[:, 2], rows[:, 3])
    torch.testing.assert_close(rows[0, ::2].double(), centroid(features(folder)[0]), rtol=2e-4, atol=2e-4)


def test_another_tokenizer_is_taken_where_one_is_named(folder: Path, tmp_path: Path) -> None:
    done = mix(
        folder, "named", "--router-init", "ridge", *with_texts(folder),
        "--tokenizer-model", tmp_path / "tokenizer.json",
    )  # fmt: skip
    assert done.returncode == 2
    assert "tokenizer.json" in done.stderr
    assert not (folder / "named").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--router-init", "centroid"], "needs a text of every expert; give --router-text birds=FILE"),
        (["--router-init", "ridge", "--router-text", "birds=birds.txt"], "give --router-text stones=FILE"),
        (["--router-text", "birds=birds.txt"], "--router-text has no effect with --router-init normal"),
        (["--tokenizer-model", "x"], "--tokenizer-model is for --router-text"),
        (["--router-init", "ridge", "TEXTS", "--router-text", "x=birds.txt"], "x: no such expert"),
        (["--router-init", "ridge", "TEXTS", "--experts", "blend"], "no text is its own"),
        (["--router-init", "centroid", "--dry-run"], "needs a text of every expert"),
        (["--router-init", "centroid", "--router-text", "birds=no.txt", "--router-text", "stones=no.txt"],
         "no.txt: cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(folder: Path, options: list[str], message: str) -> None:
    given = [part for option in options for part in (with_texts(folder) if option == "TEXTS" else [option])]
    done = mix(folder, "mistake", *given)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "mistake").exists()


def test_such_a_mixture_does_not_grow_by_mixing_again(folder: Path) -> None:
    assert mix(folder, "base", "--router-init", "centroid", *with_texts(folder)).returncode == 0
    more = ["mix", "--moe", folder / "base", "--add-expert", f"more={folder / 'birds'}"]
    done = btx(*more, "--output", folder / "grown")
    assert done.returncode == 2
    assert "cannot be mixed again with one more" in done.stderr
    assert btx(*more, "--output", folder / "grown", "--lambda", 0.25).returncode == 0
