"""The stage mix of a run in a process of its own: a router from the run's training text, and a cut mixture
that Megatron loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from btx_megatron.checkpoints.formats import config_of, open_checkpoint
from btx_megatron.checkpoints.names import ROUTER
from btx_megatron.checkpoints.pieces import indices_of, read_part
from btx_megatron.data.folder import read_statistics, token_prefix
from btx_megatron.data.indexed import IndexedTokens
from btx_megatron.data.prepare import prepare
from btx_megatron.data.sample import PIECE
from btx_megatron.job import Job, Task, write_job
from btx_megatron.mixing.mix import Output, convert
from btx_megatron.mixing.of_recipe import router_tokens
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import parse_recipe, recipe_to_dict
from btx_megatron.run_folder import stage_folder

WORDS = {"birds": ["wing", "nest", "egg", "sings"], "stones": ["hard", "grey", "falls", "rolls"]}
HIDDEN, WIDTH, LAYERS = 16, 24, 2


def recipe_of(folder: Path, **mix: Any) -> Recipe:
    domains = [{"name": name, "sources": [{"path": str(folder / "text" / name)}]} for name in WORDS]
    model = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": WIDTH, "num_attention_heads": 2}
    tree = {
        "data": {"domains": domains, "held_out_fraction": 0.2, "num_workers": 1},
        "tokenizer": {"vocab_size": 280},
        "model": model | {"seq_length": 32},
        "mix": mix,
    }
    return parse_recipe(tree)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: prepared data and three random branches of one seed, which say what model they are."""
    path: Path = tmp_path_factory.mktemp("mix_stage")
    for name, words in WORDS.items():
        (path / "text" / name).mkdir(parents=True)
        for number in range(30):
            text = " ".join(words[(i * i + number + i // 7) % 4] for i in range(120))
            (path / "text" / name / f"{number}.txt").write_text(text)
    recipe = recipe_of(path)
    (path / "run" / "data").mkdir(parents=True)
    prepare(recipe, path / "run" / "data", lambda phase, done, total: None)
    rows = read_statistics(path / "run" / "data")["padded_vocab_size"]
    torch.manual_seed(3)
    seed = random_model(rows)
    for stage in ("expert:birds", "expert:stones", "seed"):
        weights = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in seed.items()}
        write_stage(path, stage, weights, recipe)
    return path


def random_model(rows: int) -> dict[str, Tensor]:
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": torch.ones(LAYERS, HIDDEN),
        "self_attention.linear_qkv.weight": torch.randn(LAYERS, 3 * HIDDEN, HIDDEN),
        "self_attention.linear_proj.weight": torch.randn(LAYERS, HIDDEN, HIDDEN),
        "mlp.linear_fc1.layer_norm_weight": torch.ones(LAYERS, HIDDEN),
        "mlp.linear_fc1.weight": torch.randn(LAYERS, 2 * WIDTH, HIDDEN),
        "mlp.linear_fc2.weight": torch.randn(LAYERS, HIDDEN, WIDTH),
    }
    return {f"decoder.layers.{name}": 0.3 * tensor for name, tensor in layer.items()} | {
        "embedding.word_embeddings.weight": torch.randn(rows, HIDDEN),
        "decoder.final_layernorm.weight": torch.ones(HIDDEN),
        "output_layer.weight": 0.3 * torch.randn(rows, HIDDEN),
    }


def write_stage(folder: Path, stage: str, weights: dict[str, Tensor], recipe: Recipe) -> None:
    from torch_dist import save_torch_dist

    plain = save_torch_dist(folder / "plain" / stage.replace(":", "-") / "release", weights)
    target = folder / "run" / stage_folder(stage) / "checkpoints"
    target.parent.mkdir(parents=True, exist_ok=True)
    convert(plain, Output(target, to="megatron", recipe=recipe_to_dict(recipe)))


def work(folder: Path, recipe: Recipe, stage: str, task: Task, name: str) -> Path:
    """Run the stage's worker; its checkpoint."""
    path = folder / "work" / name
    path.mkdir(parents=True)
    job = write_job(Job(task, stage, recipe, folder / "run", path))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "btx_megatron.launch.worker", str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path / "checkpoints"


def read(checkpoint: Path, name: str) -> Tensor:
    source = open_checkpoint(checkpoint)
    info = source.tensors[name]
    return torch.stack([read_part(source, name, index) for index in indices_of(name, info)]).reshape(
        info.shape
    )


def test_a_centroid_router_from_the_runs_own_training_text(folder: Path) -> None:
    """Its rows tell the domains apart in every layer, and the seed's lies between them."""
    recipe = recipe_of(folder, router_init="centroid", experts="copies", copies=2)
    checkpoint = work(folder, recipe, "mix", "mix", "centroid")
    router = read(checkpoint, ROUTER)
    assert router.shape == (LAYERS, 6, HIDDEN)
    assert torch.equal(router[:, 0::2], router[:, 1::2])  # both copies of a source know its text alike
    birds, stones, seed = router[:, 0], router[:, 2], router[:, 4]
    for layer in range(LAYERS):
        cosine = torch.nn.functional.cosine_similarity
        between = cosine(birds[layer], stones[layer], dim=0)
        assert cosine(birds[layer], seed[layer], dim=0) > between
        assert cosine(stones[layer], seed[layer], dim=0) > between


def test_the_sample_is_training_text_alone(folder: Path) -> None:
    recipe = recipe_of(folder, router_init="ridge")
    sampled = router_tokens(recipe, folder / "run" / "data")
    assert sampled is not None
    assert list(sampled.tokens) == ["birds", "stones", "seed"]
    held_out = IndexedTokens(token_prefix(folder / "run" / "data", "held_out", "birds", "text"))
    text = " ".join(map(str, sampled.tokens["birds"].tolist()))
    assert len(held_out) > 0
    assert held_out.lengths.max() <= PIECE  # else a part of one could be there
    for number in range(len(held_out)):
        assert " ".join(map(str, held_out[number].tolist())) not in text


def test_megatron_loads_a_cut_mixture(folder: Path) -> None:
    """Its experts are narrower than the model's feed-forward; the checkpoint says how wide they are."""
    recipe = recipe_of(folder, experts="split", chunks=2, average="ties")
    checkpoint = work(folder, recipe, "mix", "mix", "split")
    config = config_of(open_checkpoint(checkpoint))
    assert (config.num_experts, config.ffn_hidden_size) == (6, WIDTH // 2)
    text = next((folder / "text" / "birds").glob("*.txt"))
    tokenizer = folder / "run" / "data" / "tokenizer" / "tokenizer.model"
    program = (
        "import sys, json; from pathlib import Path\n"
        "from btx_megatron.evaluation.step0 import checkpoint_loss\n"
        "print(json.dumps(checkpoint_loss(*map(Path, sys.argv[1:4]), seq_length=32)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, checkpoint, text, tokenizer],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout.splitlines()[-1])["loss"] < 12


def test_the_recipe_builds_the_mixture_that_the_stage_wrote(folder: Path) -> None:
    """Shapes of Megatron's model, as the finetune stage builds it, and of the checkpoint."""
    recipe = recipe_of(folder, experts="virtual", chunks=2, copies=2)
    recipe.moe.moe_router_topk = 2
    checkpoint = work(folder, recipe, "mix", "mix", "virtual")
    program = f"""
import json
from pathlib import Path
from btx_megatron.job import read_job
from btx_megatron.runtime import ranks
recipe = read_job(Path({str(folder / "work" / "virtual" / "job.json")!r})).recipe
with ranks.joined_ranks():
    ranks.set_layout(recipe.stages.finetune.layout, 1)
    from btx_megatron.model.build import build_model
    from btx_megatron.training.checkpoint import load_weights
    rows = {read(checkpoint, "output_layer.weight").shape[0]}
    model = build_model(recipe, recipe.stages.finetune, rows, recipe.num_experts("finetune"))
    load_weights(Path({str(checkpoint)!r}), model)
    print(sum(parameter.numel() for parameter in model[0].parameters()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from btx_megatron.estimate import parameter_counts

    rows = read(checkpoint, "output_layer.weight").shape[0]
    counts = parameter_counts(recipe.model, rows, 12, 2, recipe.expert_ffn_hidden_size)
    assert int(done.stdout.splitlines()[-1]) == counts.moe_total
