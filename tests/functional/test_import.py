"""A run that starts from somebody's Llama with its own tokenizer: imported, branched, mixed, exported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from btx_megatron.checkpoints.formats import open_checkpoint
from btx_megatron.checkpoints.pieces import indices_of, read_part
from btx_megatron.data.held_out import held_out_windows
from btx_megatron.errors import UserError
from btx_megatron.mixing.pretrained import check_pretrained, import_checkpoint
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import load_recipe

EMBEDDING = "embedding.word_embeddings.weight"
SEQUENCE = 32
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": SEQUENCE,
    "rotary_base": 500000.0,
    "norm_epsilon": 1e-6,
    "use_rope_scaling": True,
    "rope_scaling_factor": 32.0,
    "untie_embeddings_and_output_weights": False,
    "make_vocab_size_divisible_by": 16,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama with Llama 3.2's RoPE and an odd vocabulary, its tokenizer, two domains, a recipe."""
    path: Path = tmp_path_factory.mktemp("import")
    texts = {
        "foxes": "the quick brown fox jumps over a lazy dog",
        "sums": "two and two are four and one is five",
    }
    for name, text in texts.items():
        for number in range(12):
            file = path / name / f"{number}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{number} {text} " * (20 + number))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts.values(), trainer)
    (path / "llama").mkdir()
    tokenizer.save(str(path / "llama" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (path / "llama" / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )
    llama.save_pretrained(path / "llama")
    for parameter in llama.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    llama.save_pretrained(path / "branch")  # somebody has trained it on
    recipe = {
        "name": "imported",
        "run_folder": str(path / "run"),
        "data": {
            "domains": [{"name": name, "sources": [{"path": name}]} for name in texts],
            "held_out_fraction": 0.2,
            "num_workers": 1,
        },
        "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "llama"},
        "model": MODEL,
        "training": {"train_iters": 4, "lr": 1e-3, "lr_warmup_iters": 1, "global_batch_size": 4},
        "stages": {
            "seed": {"pretrained_checkpoint": "llama"},
            "experts": {"foxes": {"pretrained_checkpoint": "branch"}},
            "finetune": {"layout": {"data_parallel_size": 2}},
        },
        "baselines": ["dense"],
        "launch": {"device": "cpu"},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


def load(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", list(overrides))


def vocabulary(folder: Path) -> dict[str, int]:
    tokens = len(AutoTokenizer.from_pretrained(folder / "llama"))
    return {"vocab_size": tokens, "padded_vocab_size": -(-tokens // 16) * 16}


def test_weights_are_taken_bit_for_bit_and_the_vocabulary_is_padded(folder: Path, tmp_path: Path) -> None:
    sizes = vocabulary(folder)
    assert sizes["padded_vocab_size"] > sizes["vocab_size"]
    outputs = import_checkpoint(load(folder), "seed", sizes, tmp_path / "seed")
    taken, llama = open_checkpoint(tmp_path / "seed"), open_checkpoint(folder / "llama")
    assert set(taken.tensors) == set(llama.tensors) == set(outputs["tensors"])
    rows = read_part(taken, EMBEDDING, ())
    assert len(rows) == sizes["padded_vocab_size"]
    assert torch.equal(rows[: sizes["vocab_size"]], read_part(llama, EMBEDDING, ()))
    assert not rows[sizes["vocab_size"] :].any()
    norm = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    assert torch.equal(read_part(taken, norm, (1,)), read_part(llama, norm, (1,)))
    outputs = import_checkpoint(load(folder, "training.bf16=true"), "seed", sizes, tmp_path / "bf16")
    assert outputs["tensors"][norm]["dtype"] == "bfloat16"
    assert outputs["tensors"][norm]["rule"].endswith("as bfloat16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.hidden_size=64", "model.rotary_base=1e4", "model.use_rope_scaling=false"],
            r"set model.hidden_size=32 model.kv_channels=8 model.rotary_base=500000.0 "
            r"model.use_rope_scaling=true model.rope_scaling_factor=32.0$",
        ),
        (
            ["model.untie_embeddings_and_output_weights=true"],
            "set model.untie_embeddings_and_output_weights=false",
        ),
        (["model.seq_length=128"], "set model.seq_length=64"),
        (
            ["stages.seed.pretrained_checkpoint=/nowhere"],
            "stages.seed.pretrained_checkpoint: /nowhere: no such folder",
        ),
        (["stages.finetune.pretrained_checkpoint=x"], "only stages.seed and stages.experts are imported"),
        (["tokenizer.tokenizer_type=SentencePieceTokenizer"], "missing, or not a SentencePiece model"),
        (["tokenizer.tokenizer_model=null"], "a HuggingFaceTokenizer is not trained here"),
        (
            ["tokenizer.tokenizer_model=null", "tokenizer.tokenizer_type=SentencePieceTokenizer"],
            "stages.seed is a checkpoint, name the tokenizer that it was trained with",
        ),
        (
            ["tokenizer.tokenizer_model=other"],
            "stages.seed.* was trained with another tokenizer than .*other",
        ),
        (["tokenizer.tokenizer_model=larger"], "another tokenizer than"),
    ],
)
def test_mistakes_are_told_before_anything_starts(folder: Path, overrides: list[str], message: str) -> None:
    from btx_megatron.launch.tables import plan_text

    write_tokenizers(folder)
    with pytest.raises(UserError, match=message):
        plan_text(load(folder, *overrides))


def write_tokenizers(folder: Path) -> None:
    """``other``: two words have each other's numbers; ``larger``: has one more."""
    content = json.loads((folder / "llama" / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    one, two = list(words)[-2:]
    swapped = words | {one: words[two], two: words[one]}
    for name, vocabulary in (("other", swapped), ("larger", words | {"larger": len(words) + 1})):
        (folder / name).mkdir(exist_ok=True)
        changed = content | {"model": content["model"] | {"vocab": vocabulary}}
        (folder / name / "tokenizer.json").write_text(json.dumps(changed))


def test_rows_are_counted_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    """The checkpoint has no tokenizer beside it that could be compared."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "llama" / name, bare)
    write_tokenizers(folder)
    wanted = [f"stages.seed.pretrained_checkpoint={bare}", "tokenizer.tokenizer_model=larger"]
    with pytest.raises(UserError, match=r"bare: has rows for .* tokens; name the checkpoint's own tokenizer"):
        check_pretrained(load(folder, *wanted))


def test_legacy_shards_are_the_same_seed(folder: Path, tmp_path: Path) -> None:
    btx(
        "convert",
        folder / "llama",
        tmp_path / "legacy",
        "--to",
        "megatron-legacy",
        "--target-tensor-model-parallel-size",
        2,
        "--make-vocab-size-divisible-by",
        8,
    )
    assert {path.name for path in (tmp_path / "legacy" / "release").iterdir()} == {"mp_rank_00", "mp_rank_01"}
    recipe = load(folder, f"stages.seed.pretrained_checkpoint={tmp_path / 'legacy'}")
    check_pretrained(recipe)
    taken = import_checkpoint(recipe, "seed", vocabulary(folder), tmp_path / "taken")
    direct = import_checkpoint(load(folder), "seed", vocabulary(folder), tmp_path / "direct")
    hashes = [
        {name: tensor["xxh3_128"] for name, tensor in outputs["tensors"].items()}
        for outputs in (taken, direct)
    ]
    assert hashes[0] == hashes[1]
    assert taken["imported"] != direct["imported"]


def test_rounding_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_checkpoint(load(folder), "seed", vocabulary(folder), tmp_path / "fp32")
    assert not capsys.readouterr().out
    import_checkpoint(load(folder, "training.bf16=true"), "seed", vocabulary(folder), tmp_path / "bf16")
    assert "llama: float32 is rounded to bfloat16, the run's type" in capsys.readouterr().out


def test_a_vocabulary_that_does_not_fit_is_told(folder: Path, tmp_path: Path) -> None:
    rows = vocabulary(folder)["vocab_size"]
    few = {"vocab_size": rows - 20, "padded_vocab_size": rows - 10}
    with pytest.raises(UserError, match=r"the run's models 290; set model\.make_vocab_size_divisible_by=25$"):
        import_checkpoint(load(folder), "seed", few, tmp_path / "a")
    with pytest.raises(UserError, match="name the checkpoint's own tokenizer"):
        import_checkpoint(
            load(folder), "seed", {"vocab_size": rows + 1, "padded_vocab_size": 512}, tmp_path / "a"
        )
    assert not list(tmp_path.iterdir())


def test_a_mixture_is_no_seed(folder: Path, tmp_path: Path) -> None:
    btx(
        "mix",
        "--expert",
        f"a={folder / 'llama'}",
        "--expert",
        f"b={folder / 'llama'}",
        "--output",
        tmp_path / "moe",
    )
    with pytest.raises(UserError, match="a mixture of experts; the seed and experts are dense models"):
        check_pretrained(load(folder, f"stages.experts.sums.pretrained_checkpoint={tmp_path / 'moe'}"))


def test_a_mixture_of_another_format_is_grown(folder: Path, tmp_path: Path) -> None:
    """Its weights bit for bit, the vocabulary padded as the new experts' is, and every expert has a name."""
    experts = [f"--expert={name}={folder / source}" for name, source in (("a", "llama"), ("b", "branch"))]
    btx("mix", *experts, "--output", tmp_path / "moe")
    growing = [f"mix.grow_from={tmp_path / 'moe'}", "baselines=[]"]
    recipe = load(folder, *growing, "mix.grow_experts=[a,b]")
    assert recipe.expert_names == ["a", "b", "foxes", "sums", "seed"]
    assert recipe.imported_stages == ["seed", "grown_from", "expert:foxes"]
    check_pretrained(recipe)
    sizes = vocabulary(folder)
    import_checkpoint(recipe, "grown_from", sizes, tmp_path / "imported")
    before, after = open_checkpoint(tmp_path / "moe"), open_checkpoint(tmp_path / "imported")
    assert after.tensors[EMBEDDING].shape[0] == sizes["padded_vocab_size"]
    assert set(after.tensors) == set(before.tensors)
    for name in set(before.tensors) - {EMBEDDING}:
        for index in indices_of(name, before.tensors[name]):
            assert torch.equal(read_part(after, name, index), read_part(before, name, index))
    with pytest.raises(
        UserError, match=r"mix\.grow_from .*moe: has 2 experts, and mix\.grow_experts names 3"
    ):
        check_pretrained(load(folder, *growing, "mix.grow_experts=[a,b,c]"))
    dense = [f"mix.grow_from={folder / 'llama'}", "mix.grow_experts=[a,b]", "baselines=[]"]
    with pytest.raises(UserError, match=r"mix\.grow_from: .*llama: a dense model, not a mixture"):
        check_pretrained(load(folder, *dense))


def btx(*arguments: object) -> str:
    command = [sys.executable, "-m", "btx_megatron", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_an_imported_llama_to_an_exported_mixtral(folder: Path) -> None:
    btx("run", folder / "recipe.yaml")
    run = folder / "run"
    summary = json.loads((run / "report" / "summary.json").read_text())
    losses = summary["held_out_loss"]
    assert summary["tokens"]["seed"] == summary["tokens"]["expert:foxes"] == 0
    assert summary["tokens"]["dense"] == 8 * 4 * SEQUENCE  # expert sums and the MoE stage
    for row, stage in (("seed", "seed"), ("expert:foxes", "experts/foxes"), ("btx", "finetune")):
        btx("convert", run / stage, folder / stage, "--to", "hf")
        kind = MixtralForCausalLM if row == "btx" else LlamaForCausalLM
        theirs = loss_in_transformers(folder / stage, kind, run, stage)
        assert theirs == pytest.approx(losses[row]["foxes"], abs=1e-5)
        theirs = AutoTokenizer.from_pretrained(folder / stage)
        assert theirs.encode("a fox<end>", add_special_tokens=False)[-1] == theirs.eos_token_id


def loss_in_transformers(folder: Path, kind: Any, run: Path, stage: str) -> float:
    """Of the domain foxes. The vocabulary's padding counts, as Megatron has it: its rows begin as zeros,
    training moves them, and the export leaves them out."""
    rows = read_part(open_checkpoint(run / stage), EMBEDDING, ())[vocabulary(run.parent)["vocab_size"] :]
    assert len(rows)
    model = kind.from_pretrained(folder).eval()
    total = tokens = 0.0
    for inputs, labels, mask in held_out_windows(run / "data", "foxes", SEQUENCE):
        assert isinstance(inputs, np.ndarray)
        with torch.no_grad():
            out = model(torch.from_numpy(inputs)[None], output_hidden_states=True)
            logits = torch.cat([out.logits[0], out.hidden_states[-1][0] @ rows.T], dim=1)
        losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
        total += float((losses * torch.from_numpy(mask)).sum())
        tokens += float(mask.sum())
    return total / tokens
