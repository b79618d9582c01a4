"""Scores of token sequences in every layout, and the harness's against transformers on the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from scoring_worker import LAYOUTS, LENGTHS, SAID
from tokenizers import decoders
from torchrun import torchrun
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).parent
WORDS = ["<s>", "</s>", "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"]
WORDS = [*WORDS, "away", "from", "it", "."]
SEQUENCE = 32


def compared(here: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert [len(its["best"]) for its in here] == list(LENGTHS)
    for mine, theirs in zip(here, reference, strict=True):
        assert mine["log_p"] == pytest.approx(theirs["log_p"], abs=1e-4)
        assert mine["best"] == theirs["best"]
        assert max(mine["best"]) < SAID


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("scores")
    torchrun("scoring_worker.py", 1, path)
    return path


def scores(folder: Path, world: int) -> dict[str, list[dict[str, Any]]]:
    return json.loads((folder / f"scores-{world}.json").read_text())  # type: ignore[no-any-return]


def test_two_ranks_score_as_one(folder: Path) -> None:
    torchrun("scoring_worker.py", 2, folder)
    reference, found = scores(folder, 1), scores(folder, 2)
    assert len({token for its in reference["moe 1"] for token in its["best"]}) > 10
    assert list(found) == list(LAYOUTS[2])
    for name, its in found.items():
        compared(its, reference[f"{name.partition(' ')[0]} 1"])


@pytest.mark.slow
def test_four_ranks_score_as_one(folder: Path) -> None:
    torchrun("scoring_worker.py", 4, folder)
    compared(scores(folder, 4)["moe TP2+SP+EP2"], scores(folder, 1)["moe 1"])


def save_tokenizer(folder: Path, bos: bool) -> None:
    """Words; ``bos``: with a template that puts ``<s>`` before a text, as Llama's has."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose next tokens are far apart."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    shape: dict[str, Any] = {
        "vocab_size": len(WORDS) + 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQUENCE,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if request.param == "llama":
        made: Any = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        made = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2))
    made.save_pretrained(folder)
    save_tokenizer(folder, bos=request.param == "llama")
    return folder


def run(*command: object) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_harness_hears_the_same_from_transformers(model: Path) -> None:
    told = json.loads(run(HERE / "harness_worker.py", model, model / "tokenizer.json", SEQUENCE))
    ours, theirs = told["megatron"], told["hf"]
    assert [p for p, _ in ours["choices"]] == pytest.approx([p for p, _ in theirs["choices"]], abs=1e-4)
    assert [greedy for _, greedy in ours["choices"]] == [greedy for _, greedy in theirs["choices"]]
    assert ours["texts"] == pytest.approx(theirs["texts"], abs=1e-3)
    # transformers decodes an answer by itself: a decoder drops a space where a text begins
    assert [answer.removeprefix(" ") for answer in ours["answers"]] == theirs["answers"]
    assert len(set(ours["answers"])) == len(ours["answers"])


@pytest.mark.slow
def test_tasks_have_equal_scores(model: Path, tmp_path: Path) -> None:
    """Through the checkpoint in Megatron's format, and through the folder that it is exported to."""
    files = {
        "multiple_choice": [
            {"question": f"the {word}", "choices": ["runs away", "jumps", "dog"], "answer": number % 3}
            for number, word in enumerate(WORDS[2:])
        ],
        "nq": [
            {"question": f"the {word}", "answer": WORDS[number % 7 + 2 :]}
            for number, word in enumerate(WORDS)
        ],
        "gsm8k": [{"question": f"{word} and it", "answer": "#### 5"} for word in WORDS[2:]],
    }
    options: list[object] = []
    for kind, documents in files.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("\n".join(map(json.dumps, documents)))
        options += ["--task", f"{kind}={path}"]
    run("-m", "btx_megatron", "convert", model, tmp_path / "megatron", "--to", "megatron")
    scores = []
    for number, through in enumerate(("megatron", "hf")):
        out = tmp_path / f"{number}.json"
        printed = run(
            "-m", "btx_megatron", "tasks", tmp_path / "megatron", *options, "--max-new-tokens", 8,
            "--tokenizer", model / "tokenizer.json", "--through", through, "--json", out,
        )  # fmt: skip
        scores.append(json.loads(out.read_text()))
        assert printed.startswith(f"multiple_choice: acc {scores[-1]['multiple_choice']['value']:.4f} (15")
    assert scores[0] == scores[1]
    assert 0 < scores[0]["multiple_choice"]["value"] < 1
