"""Sources, outputs and options that ``btx mix`` and ``btx convert`` refuse: one line, nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import (
    Change,
    assert_mix_refused,
    assert_refused,
    mix_arguments,
    read_hf,
    run_btx,
    write_llama,
)

NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "good", 0)


# sources that do not fit together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 32}, "hidden_size is 16 in expert good and 32 in expert bad"),
        ({"width": 32}, "ffn_hidden_size is 24 in expert good and 32 in expert bad"),
        ({"layers": 3}, "num_layers is 2 in expert good and 3 in expert bad"),
        ({"vocabulary": 40}, "vocab_size is 32 in expert good and 40 in expert bad"),
        ({"dtype": torch.float32}, "[16] bfloat16 in expert good and [16] float32 in expert bad"),
        ({"tied": True}, "tied is False in expert good and True in expert bad"),
        ({"config": {"rope_theta": 5e5}}, "rotary_base is 10000.0 in expert good and 500000.0 in expert bad"),
        (
            {"config": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
            "rope_scaling is None in expert good and ",
        ),
        ({"config": {"rms_norm_eps": 1e-6}}, "norm_epsilon is 1e-05 in expert good and 1e-06 in expert bad"),
        ({"config": {"num_attention_heads": 8, "head_dim": 2}}, "bad: model.layers.0.self_attn."),
    ],
)
def test_sources_that_differ(good: Path, options: dict[str, Any], message: str) -> None:
    assert_mix_refused(good, write_llama(good.parent / "bad", 1, **options), message)


def test_sources_of_other_tokenizers(tmp_path: Path) -> None:
    good = write_llama(tmp_path / "good", 0, tokenizer={"a": 1})
    same = write_llama(tmp_path / "same", 0, tokenizer={"a": 1})
    bad = write_llama(tmp_path / "bad", 1, tokenizer={"a": 2})
    assert_mix_refused(good, bad, "bad/tokenizer.json: another tokenizer than expert good's")
    assert run_btx(*mix_arguments([good, same], tmp_path / "out"))[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (good / "tokenizer.json").read_text()


def test_a_base_that_is_another_model(good: Path) -> None:
    other = write_llama(good.parent / "other", 1)
    base = write_llama(good.parent / "base", 1, width=32)
    arguments = mix_arguments([good, other], good.parent / "out", "--base", base, "--average", "ties")
    assert_refused(good.parent, "ffn_hidden_size is 24 in expert a and 32 in", *arguments)


def test_a_mixture_where_a_dense_model_is_needed(good: Path) -> None:
    other = write_llama(good.parent / "other", 1)
    for to in ("hf", "megatron", "megatron-legacy"):
        moe = good.parent / f"moe-{to}"
        assert run_btx(*mix_arguments([good, other], moe, "--to", to))[0] == 0
        assert_mix_refused(good, moe, "expert bad")
        assert_refused(
            good.parent, "a dense Llama is needed", *mix_arguments([moe, moe], good.parent / "out")
        )


def _add(name: str, *shape: int) -> Change:
    return lambda weights: weights.update({name: torch.ones(shape, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"model_type": "gpt2"}}, "bad/config.json: model_type 'gpt2' is not supported"),
        ({"config": {"model_type": None}}, "bad/config.json: model_type 'None' is not supported"),
        ({"config": {"attention_bias": True}}, "attention_bias is true; models with biases are not"),
        ({"config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported"),
        ({"config": {"hidden_size": "16"}}, "bad/config.json: hidden_size is 16; it must be a whole number"),
        ({"config": {"hidden_size": 0}}, "bad/config.json: hidden_size is 0"),
        ({"config": {"num_hidden_layers": True}}, "bad/config.json: num_hidden_layers is True"),
        ({"config": {"num_hidden_layers": 10**13}}, "bad/config.json: num_hidden_layers is 10000000000000"),
        ({"config": {"num_key_value_heads": "2"}}, "bad/config.json: num_key_value_heads is 2"),
        ({"config": {"num_key_value_heads": 3}}, "bad/config.json: num_key_value_heads is 3"),
        ({"config": {"head_dim": 1.5}}, "bad/config.json: head_dim is 1.5"),
        ({"config": {"rope_theta": "much"}}, "bad/config.json: rope_theta is much"),
        ({"config": {"rope_theta": -1}}, "bad/config.json: rope_theta is -1"),
        ({"config": {"rms_norm_eps": None}}, "bad/config.json: rms_norm_eps is None"),
        ({"config": {"rope_scaling": 3}}, "bad/config.json: rope_scaling is 3"),
        ({"config": {"rope_parameters": "x"}}, "bad/config.json: rope_parameters is x"),
        ({"config": {"model_type": "mistral", "sliding_window": "x"}}, "config.json: sliding_window is x"),
        ({"change": _add("model.layers.0.self_attn.q_proj.bias", 16)}, "no rule for model.layers.0.self_att"),
        ({"change": _add("model.layers.0.mlp.adapter.weight", 4, 4)}, "no rule for model.layers.0.mlp.adap"),
        ({"change": _add("model.layers.2.input_layernorm.weight", 16)}, "no rule for model.layers.2.input_"),
        ({"change": lambda weights: weights.pop(NORM)}, "bad: model.norm.weight is missing"),
        ({"change": lambda weights: weights.pop("model.embed_tokens.weight")}, "embed_tokens.weight is mis"),
        ({"change": _add("lm_head.weight", 33, 16)}, "lm_head.weight has 33 rows"),
        ({"config": {"vocab_size": 48}}, "bad/config.json: vocab_size is 48"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_plain_llama(good: Path, options: dict[str, Any], message: str) -> None:
    bad = write_llama(good.parent / "bad", 1, **options)
    assert_mix_refused(good, bad, message)
    assert_refused(good.parent, message, "convert", bad, good.parent / "out", "--to", "megatron")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000])
def test_a_configuration_that_is_no_json(good: Path, text: str) -> None:
    bad = write_llama(good.parent / "bad", 1)
    (bad / "config.json").write_text(text)
    assert_mix_refused(good, bad, "bad/config.json: ")


def test_a_path_that_is_no_checkpoint(good: Path) -> None:
    (good.parent / "empty").mkdir()
    (good.parent / "file").write_text("text")
    assert_mix_refused(good, good.parent / "empty", "empty: no checkpoint there")
    assert_mix_refused(good, good.parent / "file", "file: no such folder; name a checkpoint's")
    assert_mix_refused(good, good.parent / "absent", "absent: no such folder; name a checkpoint's")
    assert_mix_refused(
        good, good, "absent: no such folder", "--average", "base", "--base", good.parent / "absent"
    )
    assert_refused(
        good.parent,
        "absent: no such folder",
        *("convert", good.parent / "absent", good.parent / "out", "--to", "hf"),
    )


# the output


def test_an_output_that_exists_is_left_alone(good: Path) -> None:
    other, out = write_llama(good.parent / "other", 1), good.parent / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert_mix_refused(good, other, "out: exists; delete it, or name another output")
    (out / "mine").unlink()
    assert run_btx(*mix_arguments([good, other], out))[0] == 0  # an empty folder is none
    assert_mix_refused(good, other, "out: exists; delete it")
    assert_refused(good.parent, "out: exists; delete it", "convert", good, out, "--to", "megatron")
    (good.parent / "file").write_text("text")
    assert_refused(good.parent, "file: exists", *mix_arguments([good, other], good.parent / "file"))
    assert_refused(good.parent, "file", *mix_arguments([good, other], good.parent / "file" / "out"))


@pytest.mark.parametrize("where", ["good", "good/out", "good/a/b", "link/out", ".", "linked-out"])
def test_an_output_in_a_source_or_around_one(good: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_llama(good.parent / "other", 1)
    (good.parent / "link").symlink_to(good)
    (good.parent / "linked-out").symlink_to(good / "new")
    monkeypatch.chdir(good.parent)
    assert_refused(good.parent, where, *mix_arguments([good, other], Path(where)))
    assert_refused(good.parent, where, "convert", good, where, "--to", "megatron")
    assert_refused(
        good.parent, where, *mix_arguments([other, other], Path(where), "--base", good, "--average", "base")
    )


def test_a_source_under_the_name_that_is_written_first(good: Path) -> None:
    """What is left of a killed run is deleted: not if it is a source."""
    bad = write_llama(good.parent / ".out.partial", 1)
    assert_mix_refused(good, bad, ".out.partial")


def test_an_output_here(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, here = write_llama(good.parent / "other", 1), good.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert_refused(good.parent, "the folder that you are in", *mix_arguments([good, other], Path(".")))
    assert run_btx(*mix_arguments([good, other], Path("sub")))[0] == 0
    assert run_btx("verify", here / "sub")[0] == 0


def test_an_output_through_a_link(good: Path) -> None:
    """The folder that it leads to is written, and the link stays."""
    other, place = write_llama(good.parent / "other", 1), good.parent / "far" / "away"
    place.parent.mkdir()
    (good.parent / "out").symlink_to(place)
    assert run_btx(*mix_arguments([good, other], good.parent / "out"))[0] == 0
    assert (good.parent / "out").is_symlink()
    assert run_btx("verify", place)[0] == 0
    assert [path.name for path in place.parent.iterdir()] == ["away"]


def test_an_output_in_a_megatron_source(good: Path) -> None:
    """Beside its release/ is in it, too."""
    source = good.parent / "megatron"
    assert run_btx("convert", good, source, "--to", "megatron")[0] == 0
    assert_refused(good.parent, "lies in a source", "convert", source, source / "hf", "--to", "hf")


# words and numbers of the command line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--expert", "c"], "--expert c: write it as NAME=PATH"),
        (["--expert", "c="], "--expert c=: write it as NAME=PATH"),
        (["--expert", "=c"], "--expert =c: write it as NAME=PATH"),
        (["--expert", "a=x"], "--expert a=x: the name a is given twice"),
        (["--expert", "(base)=x"], "--expert (base)=x: "),
        (["--to", "gguf"], "--to gguf: not known; there are hf, megatron, megatron-legacy"),
        (["--average", "slerp"], "--average slerp: not known; there are mean, weighted, base, ties, dare"),
        (["--experts", "random"], "--experts random: not known; there are stack, split"),
        (["--router-init", "ones"], "--router-init ones: not known; there are normal, zero"),
        (["--average", "base"], "--average base measures from a base; name it with --base PATH"),
        (["--average", "ties"], "--average ties measures from a base; name it with --base PATH"),
        (["--average", "dare"], "--average dare measures from a base; name it with --base PATH"),
        (["--average", "weighted", "--weight", "c=1"], "--weight c=1.0: no such expert; there are a, b"),
        (["--average", "weighted", "--weight", "a"], "--weight a: write it as NAME=NUMBER"),
        (["--average", "weighted", "--weight", "a=much"], "--weight a=much: write it as NAME=NUMBER"),
        (["--average", "weighted", "--weight", "a=-1"], "--weight a=-1.0: a weight is a number that is not"),
        (["--average", "weighted", "--weight", "a=nan"], "--weight a=nan: a weight is a number"),
        (["--average", "weighted", "--weight", "a=inf"], "--weight a=inf: a weight is a number"),
        (["--average", "weighted", "--weight", "a=0", "--weight", "b=0"], "--weight: all weights are 0"),
        (["--average", "weighted", "--weight", "a=1", "--weight", "a=2"], "the name a is given twice"),
        (["--weight", "a=1"], "--weight has no effect with --average mean"),
        (["--average", "ties", "--base", "a", "--density", "0"], "--density 0.0: must be above 0"),
        (["--average", "ties", "--base", "a", "--density", "1.1"], "--density 1.1: must be above 0"),
        (["--average", "ties", "--base", "a", "--density", "nan"], "--density nan: must be above 0"),
        (["--drop-ratio", "-0.1"], "--drop-ratio -0.1: must lie between 0 and 1"),
        (["--drop-ratio", "nan"], "--drop-ratio nan: must lie between 0 and 1"),
        (["--chunks", "2"], "--chunks 2 means nothing with --experts stack"),
        (["--copies", "2"], "--copies 2 means nothing with --experts stack"),
        (["--experts", "split"], "--experts split needs --chunks of at least 2, not 1"),
        (["--experts", "split", "--chunks", "-2"], "--experts split needs --chunks of at least 2, not -2"),
        (["--experts", "split", "--chunks", "5"], "feed-forward of width 24 does not divide into 5 equal"),
        (["--experts", "virtual", "--chunks", "7", "--router-topk", "7"], "does not divide into 7 equal"),
        (["--experts", "virtual", "--chunks", "3"], "moe_router_topk=2 cuts a group"),
        (["--experts", "virtual", "--chunks", "0"], "--experts virtual needs --chunks of at least 1, not 0"),
        (["--experts", "copies"], "--experts copies needs --copies of at least 2, not 1"),
        (["--router-std", "0"], "--router-std 0.0: must be above 0"),
        (["--router-std", "nan"], "--router-std nan: must be above 0"),
        (["--router-std", "inf"], "--router-std inf: must be above 0"),
        (["--router-topk", "0"], "moe_router_topk=0 must be at least 1"),
        (["--router-topk", "3"], "moe_router_topk=3 is more than the 2 experts"),
        (["--router-topk", "1", "--router-init", "zero"], "--router-init zero with top-k"),
        (["--router-topk", "1", "--to", "hf"], "moe_router_topk 1 without pre-softmax has a constant gate"),
        (["--router-topk", "1", "--to", "megatron"], "moe_router_topk 1 without pre-softmax has a constant"),
        (["--router-topk", "1", "--to", "hf", "--approximate"], "moe_router_topk 1 without pre-softmax has"),
        (["--tokenizer", "both"], "--tokenizer both: not known; there are base, union"),
        (["--router-pre-softmax", "--router-topk", "1", "--to", "hf"], "moe_router_pre_softmax: Mixtral ren"),
        (["--workers", "-1"], "--workers -1: must be at least 0"),
        (["--max-memory", "0"], "--max-memory 0: write it as 500M or 2G"),
        (["--max-memory", "2T"], "--max-memory 2T: write it as 500M or 2G"),
        (["--max-memory", "1K", "--average", "ties", "--base", "a"], "is made whole"),
        (["--random-seed", "99999999999999999999"], "--random-seed 99999999999999999999: "),
        (["--random-seed", "-1"], "--random-seed -1: "),
        (["--target-expert-model-parallel-size", "3"], "--target-expert-model-parallel-size 3 must divide"),
        (["--target-expert-model-parallel-size", "0"], "--target-expert-model-parallel-size 0: must be at l"),
        (["--to", "megatron-legacy", "--target-tensor-model-parallel-size", "0"], "-size 0: must be at le"),
        (["--to", "megatron-legacy", "--target-pipeline-model-parallel-size", "-1"], "-size -1: must be at"),
        (["--to", "megatron-legacy", "--target-tensor-model-parallel-size", "3"], "tensor-parallel size"),
        (["--to", "megatron-legacy", "--target-pipeline-model-parallel-size", "3"], "2 layers do not divide"),
        (["--to", "megatron-legacy", "--target-expert-model-parallel-size", "3"], "2 experts do not divide"),
        (["--drop-expert", "0"], "--drop-expert needs --moe"),
        (["--add-expert", "c=x"], "--add-expert needs --moe"),
        (["--lambda", "0.5"], "--lambda needs --moe"),
    ],
)  # fmt: skip
def test_a_bad_word_or_number(good: Path, more: list[str], message: str) -> None:
    other = write_llama(good.parent / "other", 1)
    more = [
        str(good) if before == "--base" else word for before, word in zip(["", *more], more, strict=False)
    ]
    if "--to" not in more:
        more += ["--to", "megatron"]
    assert_refused(good.parent, message, *mix_arguments([good, other], good.parent / "out", *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--average", "ties"], "--average"),
        (["--experts", "split"], "--experts"),
        (["--add-expert", "c=x"], "one --drop-expert NUMBER"),
    ],
)
def test_what_growing_does_not_do_is_refused(good: Path, more: list[str], message: str) -> None:
    assert run_btx(*mix_arguments([good, good], good.parent / "moe", "--to", "megatron"))[0] == 0
    arguments = ("mix", "--moe", good.parent / "moe", "--drop-expert", 0, "--output", good.parent / "out")
    assert_refused(good.parent, message, *arguments, *more)


@pytest.mark.parametrize("more", [["--average", "ties"], ["--dry-run"], ["--workers", "2"]])
def test_options_beside_a_recipe_are_refused(tmp_path: Path, more: list[str]) -> None:
    assert_refused(tmp_path, f"{more[0]} goes with --expert or --moe", "mix", "recipe.yaml", *more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mix"], "mix: give a RECIPE, or --expert NAME=PATH"),
        (["mix", "--expert", "a=b"], "mix: give a RECIPE, or --expert NAME=PATH"),
        (["mix", "--output", "out"], "mix: give a RECIPE, or --expert NAME=PATH"),
        (["convert", "good", "out", "--to", "gguf"], "--to gguf: not known"),
        (["convert", "good", "out", "--to", "hf", "--workers", "-1"], "--workers -1"),
        (["convert", "good", "out", "--to", "megatron", "--target-expert-model-parallel-size", "2"],
         "a dense model has no experts to spread"),
        (["convert", "good", "out", "--to", "megatron-legacy", "--target-tensor-model-parallel-size", "0"],
         "--target-tensor-model-parallel-size 0: must be at least 1"),
        (["convert", "good", "out", "--to", "megatron-legacy", "--target-expert-model-parallel-size", "2"],
         "a dense model has no experts to spread"),
    ],
)  # fmt: skip
def test_a_command_line_that_lacks_something(
    good: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good.parent)
    assert_refused(good.parent, message, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [["mix", "--chunks", "two"], ["mix", "--frobnicate"], ["convert", "a"], ["convert", "a", "b"]],
)
def test_usage_errors_are_exit_2_without_a_traceback(tmp_path: Path, arguments: list[str]) -> None:
    code, out, err = run_btx(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: btx" in err
    assert "Traceback" not in err


def test_a_tied_model_that_stores_another_head(good: Path) -> None:
    """A copy of the embedding is left out; another head would be lost."""
    tied = {"config": {"tie_word_embeddings": True}}
    bad = write_llama(good.parent / "bad", 1, **tied)
    assert_refused(
        good.parent, "lm_head.weight is not the embedding", "convert", bad, good.parent / "out", "--to", "hf"
    )
    copy = write_llama(
        good.parent / "copy",
        1,
        **tied,
        change=lambda weights: weights.update({HEAD: weights["model.embed_tokens.weight"].clone()}),
    )
    assert run_btx("convert", copy, good.parent / "out", "--to", "hf")[0] == 0
    assert HEAD not in read_hf(good.parent / "out")
