"""Conversions against oracles: transformers' models, Megatron's own loader, the same bytes again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_worker import CASES, SOURCES, VOCABULARY, layouts_of
from torch import Tensor
from torchrun import torchrun
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from btx_megatron.checkpoints.formats import Format, Parallel, config_of, open_checkpoint
from btx_megatron.checkpoints.megatron_dist import DistCheckpoint
from btx_megatron.errors import UserError
from btx_megatron.job import Job
from btx_megatron.launch.worker import _TASKS
from btx_megatron.mixing.hashes import hash_tensors
from btx_megatron.mixing.mix import Output, convert, mix
from btx_megatron.mixing.plan import MixOptions
from btx_megatron.recipe_file import parse_recipe

SAVED = [(case, layout) for case in CASES for layout in layouts_of(case)]
SHAPE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 3e-5,
    "rope_theta": 20_000.0,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Megatron saved on two ranks; in there it has loaded our files, too."""
    folder = tmp_path_factory.mktemp("conversions")
    torchrun("convert_worker.py", 2, "two", folder, timeout=150)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    torchrun("convert_worker.py", 4, "four", folder)
    return folder


def to(source: Path, output: Path, kind: Format, parallel: Parallel | None = None) -> Path:
    convert(source, Output(output, kind, parallel or Parallel()))
    return output


def weights_sha256(folder: Path) -> dict[str, str]:
    """Of every safetensors file, header and all."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def config_json(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits.float()  # type: ignore[no-any-return]


def read_by_transformers(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model, after transformers said that it missed nothing and knew everything."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model  # type: ignore[no-any-return]


def some_tokens() -> Tensor:
    return torch.randint(SHAPE["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1))


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms that are not 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)


def llama(folder: Path, dtype: torch.dtype = torch.float32, shards: str = "5GB", **options: Any) -> Path:
    """A random Llama, written by transformers."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**(SHAPE | options))).to(dtype)
    randomize(model)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


# Megatron -> transformers


@pytest.mark.slow
@pytest.mark.parametrize(("case", "layout"), SAVED)
def test_exported_models_give_megatrons_logits(saved: Path, tmp_path: Path, case: str, layout: str) -> None:
    kind, precision, head = case.split("-")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    folder = to(saved / case / layout, tmp_path / "hf", "hf")
    model = read_by_transformers(folder, dtype)
    assert isinstance(model, LlamaForCausalLM if kind == "dense" else MixtralForCausalLM)
    assert model.config.vocab_size == VOCABULARY
    assert model.config.tie_word_embeddings is (head == "tied")
    ours = torch.load(saved / case / f"{layout}.pt")
    wanted = ours["logits"][..., :VOCABULARY]
    difference = (logits_of(model, ours["tokens"]) - wanted).abs()
    assert wanted.std() > 0.5
    if precision == "fp32":
        assert difference.max() < 1e-4  # seen: 6e-6
    else:  # both round as they go, and where two experts' logits all but tie each may take the other one
        assert difference.median() < 0.04  # seen: 0.016 dense, 0.023 MoE
        assert (difference > 0.4).float().mean() < 0.05


# there and back: Megatron's files


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_megatrons_weights_come_back_from_hugging_face_bit_for_bit(
    saved: Path, tmp_path: Path, case: str
) -> None:
    first = to(saved / case / "TP2", tmp_path / "hf", "hf")
    second = to(first, tmp_path / "torch_dist", "megatron")
    third = to(to(second, tmp_path / "hf again", "hf"), tmp_path / "torch_dist again", "megatron")
    before, after = DistCheckpoint(saved / case / "TP2"), DistCheckpoint(second)
    assert before.tensors.keys() == after.tensors.keys()
    hashes, wanted = hash_tensors(second), hash_tensors(saved / case / "TP2")
    for name in before.tensors:
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):  # without the padding
            assert torch.equal(after.read(name), before.read(name)[:VOCABULARY])
        else:
            assert hashes[name] == wanted[name], name
    assert hash_tensors(third) == hashes
    assert config_of(open_checkpoint(third)) == config_of(after)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_model_is_exported_to_the_same_bytes_however_megatron_saved_it(
    saved: Path, tmp_path: Path, case: str
) -> None:
    written = {
        name: weights_sha256(to(saved / case / name, tmp_path / name, "hf")) for name in layouts_of(case)
    }
    assert written["DP2"]
    assert all(files == written["DP2"] for files in written.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense-bf16-untied", "dense-fp32-tied"])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_tp2_pp2_sources_mix_to_the_bytes_of_tp1(
    sources: Path, tmp_path: Path, case: str, kind: Format
) -> None:
    """From torch_dist and from legacy shards, by Megatron's own hand."""
    tables, files = {}, {}
    for name in ("TP1", "TP2PP2", "legacy"):
        named = {str(number): sources / case / name / str(number) for number in range(SOURCES)}
        table = mix(named, Output(tmp_path / name, kind), MixOptions(random_seed=5))
        tables[name] = {tensor: row["xxh3_128"] for tensor, row in table.items()}
        files[name] = weights_sha256(tmp_path / name)
        hashes = {tensor: row["xxh3_128"] for tensor, row in hash_tensors(tmp_path / name).items()}
        assert kind == "hf" or hashes == tables[name]
    assert tables["TP1"] == tables["TP2PP2"] == tables["legacy"]
    assert files["TP1"] == files["TP2PP2"] == files["legacy"]
    assert len(files["TP1"]) == (1 if kind == "hf" else 0)


@pytest.mark.slow
def test_a_run_keeps_the_size_of_its_vocabulary_from_training_to_the_export(
    tmp_path: Path,
) -> None:
    """The padding of the embeddings is no token: Hugging Face must not see it, in the seed or in the mix."""
    run = tmp_path / "run"
    run.mkdir()
    torchrun("convert_worker.py", 1, "train", run)
    shutil.copytree(run / "seed", run / "experts" / "json")
    recipe = parse_recipe(DistCheckpoint(run / "seed" / "checkpoints").common["recipe"], "the checkpoint")
    job = Job("mix", "mix", recipe, run_folder=run, work_folder=run / "mix")
    job.work_folder.mkdir()
    _TASKS["mix"](job)
    for stage in ("seed", "mix"):
        source = DistCheckpoint(run / stage / "checkpoints")
        assert source.tensors["embedding.word_embeddings.weight"].shape[0] == 640
        assert config_of(source).vocab_size == source.common["vocab_size"] == 600
        folder = to(run / stage / "checkpoints", tmp_path / f"{stage} hf", "hf")
        model = read_by_transformers(folder, torch.float32)
        assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 600


# there and back: transformers' files


WAYS = {
    "megatron": ("megatron", Parallel()),
    "legacy TP2 PP2": ("megatron-legacy", Parallel(tensor=2, pipeline=2)),
    "hf": ("hf", Parallel()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_comes_back_in_the_same_bytes(
    tmp_path: Path, way: str, dtype: torch.dtype, tied: bool
) -> None:
    source = llama(tmp_path / "theirs", dtype, tie_word_embeddings=tied, vocab_size=68)
    first = to(source, tmp_path / "hf", "hf")
    there = to(first, tmp_path / "there", *WAYS[way])  # type: ignore[arg-type]
    back = to(there, tmp_path / "back", "hf")
    assert weights_sha256(back) == weights_sha256(first) != {}
    theirs, ours = (read_by_transformers(folder, dtype).state_dict() for folder in (source, back))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("way", WAYS)
def test_a_mixtral_comes_back_in_the_same_bytes(tmp_path: Path, way: str) -> None:
    first = to(mixtral(tmp_path / "theirs"), tmp_path / "hf", "hf")
    kind, parallel = WAYS[way]
    parallel = Parallel(parallel.tensor, parallel.pipeline, 2)
    back = to(to(first, tmp_path / "there", kind, parallel), tmp_path / "back", "hf")  # type: ignore[arg-type]
    assert weights_sha256(back) == weights_sha256(first) != {}
    assert config_json(back).items() >= {"num_local_experts": 4, "num_experts_per_tok": 3}.items()


# what transformers writes


def mixtral(folder: Path, shards: str = "5GB") -> Path:
    """A random Mixtral, written by transformers."""
    torch.manual_seed(3)
    options = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 3, "vocab_size": 68}
    model = MixtralForCausalLM(MixtralConfig(**options))
    randomize(model)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_llama_in_several_shards_is_read(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    source = llama(tmp_path / "theirs", dtype, "20KB", tie_word_embeddings=tied)
    assert len(list(source.glob("*.safetensors"))) > 3
    back = to(to(source, tmp_path / "there", "megatron"), tmp_path / "back", "hf")
    theirs, ours = (read_by_transformers(folder, dtype) for folder in (source, back))
    torch.testing.assert_close(
        logits_of(ours, some_tokens()), logits_of(theirs, some_tokens()), atol=0, rtol=0
    )


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_mixtral_of_transformers_is_read(tmp_path: Path, shards: str) -> None:
    source = mixtral(tmp_path / "theirs", shards)
    back = to(to(source, tmp_path / "there", "megatron"), tmp_path / "back", "hf")
    theirs, ours = (read_by_transformers(folder, torch.float32) for folder in (source, back))
    torch.testing.assert_close(
        logits_of(ours, some_tokens()), logits_of(theirs, some_tokens()), atol=0, rtol=0
    )


def test_the_export_says_what_vllm_and_transformers_4_read(tmp_path: Path) -> None:
    folder = to(mixtral(tmp_path / "theirs"), tmp_path / "hf", "hf")
    wanted = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "torch_dtype": "float32",
        "rope_theta": 20_000.0,
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rms_norm_eps": 3e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "hidden_act": "silu",
    }
    assert config_json(folder).items() >= wanted.items()
    names = {name for source in folder.glob("*.safetensors") for name in safetensors_names(source)}
    prefix = "model.layers.3.block_sparse_moe."
    assert {name for name in names if name.startswith(prefix)} == {prefix + "gate.weight"} | {
        f"{prefix}experts.{expert}.{matrix}.weight" for expert in range(4) for matrix in ("w1", "w2", "w3")
    }


def safetensors_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("way", WAYS)
def test_llama_3s_rope_scaling_travels(tmp_path: Path, way: str) -> None:
    """Its logits too: with another original length, or none, they would differ."""
    source = llama(tmp_path / "theirs", rope_scaling=dict(LLAMA3), vocab_size=68)
    there = to(source, tmp_path / "there", *WAYS[way])  # type: ignore[arg-type]
    back = to(there, tmp_path / "back", "hf")
    assert config_json(back)["rope_scaling"] == LLAMA3
    assert config_json(back)["rope_parameters"] == LLAMA3 | {"rope_theta": 20_000.0}
    theirs, ours = (read_by_transformers(folder, torch.float32) for folder in (source, back))
    tokens = some_tokens()
    torch.testing.assert_close(logits_of(ours, tokens), logits_of(theirs, tokens), atol=0, rtol=0)
    plain = read_by_transformers(llama(tmp_path / "plain", vocab_size=68), torch.float32)
    assert (logits_of(plain, tokens) - logits_of(ours, tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["megatron", "megatron-legacy"])
def test_yarn_is_refused_towards_megatron(tmp_path: Path, kind: Format) -> None:
    source = llama(tmp_path / "theirs", rope_scaling=dict(YARN))
    with pytest.raises(UserError, match=r"^rope_scaling .*yarn.*convert to Hugging Face instead$") as refused:
        to(source, tmp_path / "there", kind)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "there").exists()


def test_yarn_passes_to_hugging_face(tmp_path: Path) -> None:
    source = llama(tmp_path / "theirs", rope_scaling=dict(YARN))
    theirs, ours = (
        read_by_transformers(folder, torch.float32) for folder in (source, to(source, tmp_path / "hf", "hf"))
    )
    torch.testing.assert_close(
        logits_of(ours, some_tokens()), logits_of(theirs, some_tokens()), atol=0, rtol=0
    )


def test_a_mistral_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    """Neither a Llama nor Megatron's model would look through its window."""
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="sliding_window"):
        to(tmp_path / "theirs", tmp_path / "hf", "hf")


def test_a_mistral_is_a_llama(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None))
    randomize(model)
    model.save_pretrained(tmp_path / "theirs")
    ours = read_by_transformers(to(tmp_path / "theirs", tmp_path / "hf", "hf"), torch.float32)
    torch.testing.assert_close(
        logits_of(ours, some_tokens()), logits_of(model, some_tokens()), atol=0, rtol=0
    )


# four copies


@pytest.mark.parametrize("std", [1e-3, 0.02, 10.0])
@pytest.mark.parametrize("topk", [2, 3, 4])
def test_four_copies_of_a_llama_give_its_logits(tmp_path: Path, topk: int, std: float) -> None:
    source = llama(tmp_path / "theirs")
    options = MixOptions(router_topk=topk, router_std=std)
    mix(dict.fromkeys("abcd", source), Output(tmp_path / "moe", "hf"), options)
    moe, dense = (read_by_transformers(folder, torch.float32) for folder in (tmp_path / "moe", source))
    assert moe.config.num_experts_per_tok == topk
    gates = [layer.mlp.gate.weight for layer in moe.model.layers]
    assert all(gate.std() > std / 2 for gate in gates)
    wanted = logits_of(dense, some_tokens())
    assert wanted.std() > 0.5
    torch.testing.assert_close(logits_of(moe, some_tokens()), wanted, atol=1e-4, rtol=0)
