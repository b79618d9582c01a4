"""Weights against the model that lies beside them, and Megatron-LM's against its saved arguments."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import (
    LAYERS,
    assert_refused,
    mix_arguments,
    read_hf,
    read_ours,
    run_btx,
    write_llama,
)
from torch import Tensor
from torch_dist import save_torch_dist
from transformers import LlamaConfig

from btx_megatron.checkpoints.formats import config_of, open_checkpoint
from btx_megatron.checkpoints.megatron_args import to_args
from btx_megatron.checkpoints.names import DENSE_TO_MOE, ROUTER
from btx_megatron.checkpoints.names import LAYERS as PREFIX
from btx_megatron.checkpoints.tracker import RELEASE, write_tracker

NORM = PREFIX + "mlp.linear_fc1.layer_norm_weight"


def write_megatron(
    folder: Path, like: Path, change: Callable[[dict[str, Tensor]], Any] | None = None, **args: Any
) -> Path:
    """The weights and the model of ``like`` as Megatron-LM saves them; ``args`` go over its arguments."""
    weights = read_ours(like)
    config = config_of(open_checkpoint(like))
    if change is not None:
        change(weights)
    save_torch_dist(folder / RELEASE, weights)
    saved = to_args(config, len(weights["embedding.word_embeddings.weight"]))
    for name, value in args.items():
        setattr(saved, name, value)
    torch.save({"args": saved}, folder / RELEASE / "common.pt")
    write_tracker(folder, RELEASE)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama", 1)


@pytest.fixture
def mixtral(llama: Path) -> Path:
    other, out = write_llama(llama.parent / "other", 2), llama.parent / "mixtral"
    assert run_btx(*mix_arguments([llama, other], out))[0] == 0
    return out


def refused(folder: Path, message: str, *targets: str) -> None:
    for to in targets or ("hf", "megatron", "megatron-legacy"):
        assert_refused(folder.parent, message, "convert", folder, folder.parent / "out", "--to", to)


def test_what_fits_is_converted(llama: Path, mixtral: Path, tmp_path: Path) -> None:
    for like in (llama, mixtral):
        there, back = tmp_path / f"{like.name}-there", tmp_path / f"{like.name}-back"
        write_megatron(there, like)
        assert run_btx("convert", there, back, "--to", "hf")[0] == 0
        assert all(torch.equal(tensor, read_hf(like)[name]) for name, tensor in read_hf(back).items())


def test_a_weight_that_the_model_does_not_have(llama: Path, mixtral: Path, tmp_path: Path) -> None:
    bias = PREFIX + "self_attention.linear_qkv.bias"

    def with_bias(weights: dict[str, Tensor]) -> None:
        weights[bias] = torch.zeros(LAYERS, 32, dtype=torch.bfloat16)

    def with_expert_bias(weights: dict[str, Tensor]) -> None:
        weights[PREFIX + "mlp.router.expert_bias"] = torch.zeros(LAYERS, 2, dtype=torch.bfloat16)

    refused(write_megatron(tmp_path / "dense", llama, with_bias), bias)
    moe = write_megatron(tmp_path / "moe", mixtral, with_expert_bias)
    refused(moe, "router.expert_bias")
    more = ("--add-expert", f"c={llama}", "--lambda", "0.3", "--output", tmp_path / "out")
    assert_refused(tmp_path, "router.expert_bias", "mix", "--moe", moe, *more)


def test_more_rows_than_the_model_has(llama: Path, tmp_path: Path) -> None:
    name = PREFIX + "self_attention.linear_qkv.weight"

    def gated(weights: dict[str, Tensor]) -> None:
        weights[name] = torch.cat([weights[name], weights[name][:, :16]], 1)

    refused(write_megatron(tmp_path / "gated", llama, gated), f"{name} is [2, 48, 16], and [2, 32, 16] by")


def test_another_width_of_experts(mixtral: Path, tmp_path: Path) -> None:
    other = write_megatron(tmp_path / "other-width", mixtral, moe_ffn_hidden_size=12)
    refused(other, "by the checkpoint's configuration")
    same = write_megatron(tmp_path / "same", mixtral, ffn_hidden_size=999)  # what dense layers would have
    assert run_btx("convert", same, tmp_path / "back", "--to", "hf")[0] == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["intermediate_size"] == 24


@pytest.mark.parametrize(
    "args",
    [
        {"layernorm_zero_centered_gamma": True},
        {"window_size": (64, 0)},
        {"position_embedding_type": "none"},
        {"moe_router_score_function": "sigmoid"},
    ],
)
def test_arguments_of_another_model(mixtral: Path, tmp_path: Path, args: dict[str, Any]) -> None:
    (name,) = args
    other = write_megatron(tmp_path / "megatron", mixtral, **args)
    refused(other, f"its saved arguments say {name}")


def test_a_mixture_of_local_layers(mixtral: Path, tmp_path: Path) -> None:
    """Megatron's local layers save a mixture's norm under the dense name; every target has the mixture's."""

    def local(weights: dict[str, Tensor]) -> None:
        weights[NORM] = weights.pop(DENSE_TO_MOE[NORM])

    there = write_megatron(tmp_path / "local", mixtral, local)
    for to in ("hf", "megatron", "megatron-legacy"):
        out = tmp_path / to
        assert run_btx("convert", there, out, "--to", to)[0] == 0
        ours, theirs = read_ours(out), read_ours(mixtral)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_of_several_types_are_no_hugging_face_folder(mixtral: Path, tmp_path: Path) -> None:
    def wide(weights: dict[str, Tensor]) -> None:
        weights[ROUTER] = weights[ROUTER].float()

    there = write_megatron(tmp_path / "wide", mixtral, wide)
    refused(there, f"must be of one type, and {ROUTER} is float32 beside bfloat16", "hf")
    assert run_btx("convert", there, tmp_path / "megatron", "--to", "megatron")[0] == 0
    assert read_ours(tmp_path / "megatron")[ROUTER].dtype == torch.float32


def test_experts_with_other_numbers_of_tokens(llama: Path, tmp_path: Path) -> None:
    experts = [write_megatron(tmp_path / f"{tokens}", llama, vocab_size=tokens) for tokens in (30, 32)]
    message = "vocab_size is 30 in expert a and 32 in expert b"
    assert_refused(tmp_path, message, *mix_arguments(experts, tmp_path / "out", "--to", "hf"))


def test_an_expert_that_says_no_number_of_tokens_takes_the_others(llama: Path, tmp_path: Path) -> None:
    silent, said = (write_megatron(tmp_path / f"{tokens}", llama, vocab_size=tokens) for tokens in (None, 30))
    out = tmp_path / "out"
    assert run_btx(*mix_arguments([silent, said], out, "--to", "hf"))[0] == 0
    assert config_of(open_checkpoint(out)).vocab_size == 30
    assert len(read_ours(out)["embedding.word_embeddings.weight"]) == 30


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": None, "rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
        {
            "rope_theta": None,
            "rope_scaling": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
    ],
)  # fmt: skip
def test_theta_is_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = write_llama(tmp_path / "theta", config=rope)
    content = json.loads((folder / "config.json").read_text())
    for key in [key for key, value in content.items() if value is None]:
        del content[key]
    theirs = LlamaConfig(**content).rope_parameters
    ours = config_of(open_checkpoint(folder))
    assert ours.rotary_base == theirs["rope_theta"] == 5e5
    assert "rope_theta" not in dict(ours.rope_scaling or ())


def test_a_scaling_with_lists_can_be_looked_at(tmp_path: Path) -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], "factor": 4.0}
    one = write_llama(tmp_path / "one", 1, config={"rope_scaling": scaling})
    two = write_llama(tmp_path / "two", 2, config={"rope_scaling": scaling})
    refused(one, "Megatron knows Llama 3's alone", "megatron")
    assert run_btx("inspect", one, two)[0] == 0
    assert run_btx(*mix_arguments([one, two], tmp_path / "out"))[0] == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == scaling


def test_heads_that_are_turned_in_part_are_refused(tmp_path: Path) -> None:
    part = write_llama(
        tmp_path / "part", config={"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    )
    refused(part, "partial_rotary_factor is 0.5")


def test_tokenizers_of_two_kinds_are_not_known_to_be_one(tmp_path: Path) -> None:
    one = write_llama(tmp_path / "one", 1, tokenizer={"model": {"vocab": {}}})
    two = write_llama(tmp_path / "two", 2)
    (two / "tokenizer.model").write_bytes(b"of SentencePiece")
    code, out, _ = run_btx(*mix_arguments([one, two], tmp_path / "out"))
    assert code == 0
    assert "tokenizer: one source has tokenizer.json alone, another tokenizer.model alone" in out
    (one / "tokenizer.model").write_bytes(b"of SentencePiece")  # who has both tells that they are one
    code, out, _ = run_btx(*mix_arguments([one, two], tmp_path / "compared"))
    assert code == 0
    assert "tokenizer: " not in out


def test_a_folder_of_somebody_else(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_dir(path: Path, **options: Any) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", is_dir)  # the tests may be run by somebody who may read everything
    code, out, err = run_btx("verify", llama)
    assert (code, out) == (2, "")
    assert err == f"btx: {llama}: Permission denied; ask its owner for access\n"


@pytest.mark.parametrize("factor", [{}, {"factor": None}, {"factor": 0}])
def test_a_scaling_without_its_factor_is_named(tmp_path: Path, factor: dict[str, Any]) -> None:
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    one = write_llama(
        tmp_path / "one", 1, config={"rope_scaling": {"rope_type": "llama3", **known, **factor}}
    )
    refused(one, "rope_scaling: factor is", "megatron")
